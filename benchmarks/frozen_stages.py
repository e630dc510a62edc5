"""Compare InfiMM's pre-training (frozen language model) with training all but the tower; count the bytes sent between pipeline stages.

    .venv/bin/python benchmarks/frozen_stages.py --data data/demo

Both policies train the same model on the same batches, each in a process of its own: memory is counted (gradient buffers, optimizer state)
and measured (peak resident memory above that of the built model). Then two pipeline stages run the same decoder as InfiMM, which sends
latents after the hidden states, and as MM1, which sends hidden states alone; every byte that a process sends is counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import socket
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.families.infimm.config import GatedConfig, InfiMMConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import TrainingData, open_tokenizer
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

MIB = 2**20
POLICIES = {"pt": "frozen language model (pt)", "ift": "all but the tower (ift)"}


def experiment_for(data: Path, *, policy: str) -> Experiment:
    """Return debug_infimm with a decoder that dominates the model, as in a real one: 8 layers of width 384, a gated block per 4 layers."""
    base = get_recipe("debug_infimm")
    decoder = replace(base.model.decoder, num_layers=8, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=12, num_query_groups=12)
    assert isinstance(base.model, InfiMMConfig)
    return replace(
        base,
        model=replace(base.model, decoder=decoder, gated=GatedConfig(every_n_layers=4, num_attention_heads=8, head_dim=48)),
        data=replace(base.data, path=data),
        train=replace(base.train, freeze_policy=policy, global_batch_size=4, micro_batch_size=2),
    )


def train(experiment: Experiment, steps: int) -> dict[str, float]:
    """Train on this process; return the memory and step time of the experiment's freeze policy."""
    topology = topologies.initialize(experiment.parallel, seed=1)
    loader = TrainingData(experiment, topology, open_tokenizer(experiment))
    batches = [next(loader).micro_batches for _ in range(4)]
    loader.close()
    model = build_model(experiment, topology)
    built = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    optimizer = build_optimizer(experiment, model)
    step = TrainingStep(experiment, topology, model, optimizer, num_sources=len(experiment.data.sources))
    seconds = []
    for number in range(1, steps + 3):
        began = time.perf_counter()
        step.run(batches[number % len(batches)], step=number)
        seconds.append(time.perf_counter() - began)
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    states = [value for part in parts for state in part.optimizer.state.values() for value in state.values()]
    parameters = [p for chunk in model for p in chunk.parameters()]
    topologies.shutdown()
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "gradients": sum(buffer.grad_data.nbytes for chunk in model for buffer in chunk.buffers),
        "optimizer": sum(value.nbytes for value in states if isinstance(value, torch.Tensor)),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - built,
        "seconds": statistics.median(seconds[2:]),
    }


def count_bytes(experiment: Experiment) -> dict[str, float]:
    """Return the bytes that this stage sends per micro-batch, averaged over one step."""
    sent = 0
    send = dist.isend

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return send(tensor, *arguments, **options)

    topology = topologies.initialize(experiment.parallel, seed=1)
    torch.distributed.isend = counted
    loader = TrainingData(experiment, topology, open_tokenizer(experiment))
    micro_batches = next(loader).micro_batches
    loader.close()
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=len(experiment.data.sources))
    step.run(micro_batches, step=1)
    topologies.shutdown()
    count = len(micro_batches)
    return {"sent": sent / count, "images": sum(batch.num_images for batch in micro_batches) / count}


def _child(name: str, arguments: tuple[Any, ...], rank: int, world_size: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    results.put((rank, json.dumps({"train": train, "count_bytes": count_bytes}[name](*arguments))))


def run(name: str, *arguments: Any, world_size: int = 1) -> list[dict[str, float]]:
    """Call a function in `world_size` new processes; return the results by rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=_child, args=(name, arguments, rank, world_size, port, results)) for rank in range(world_size)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    return [json.loads(found[rank]) for rank in range(world_size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set of `megatron-mm prepare demo`")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each (default: %(default)s)")
    options = parser.parse_args()
    found = {policy: run("train", experiment_for(options.data, policy=policy), options.steps)[0] for policy in POLICIES}
    print(f"{'policy':30} {'trainable':>12} {'gradients':>12} {'optimizer':>12} {'peak above':>12} {'step':>9}")
    for policy, values in found.items():
        memory = "".join(f"{values[name] / MIB:8.1f} MiB " for name in ("gradients", "optimizer", "peak"))
        print(f"{POLICIES[policy]:30} {values['trainable'] / values['parameters']:11.1%}  {memory} {values['seconds']:7.3f} s")
    ratios = {name: found["pt"][name] / found["ift"][name] for name in ("gradients", "optimizer", "peak", "seconds")}
    print("pt / ift: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    print()
    pipeline = ParallelConfig(pipeline=2)
    infimm = replace(experiment_for(options.data, policy="pt"), parallel=pipeline)
    mm1 = replace(get_recipe("debug_mm1"), data=infimm.data, parallel=pipeline)
    mm1 = replace(mm1, model=replace(mm1.model, decoder=infimm.model.decoder), train=replace(infimm.train, freeze_policy="all"))
    with_latents, alone = (run("count_bytes", experiment, world_size=2) for experiment in (infimm, mm1))
    for rank, direction in enumerate(("forward", "backward")):
        first, second = with_latents[rank]["sent"], alone[rank]["sent"]
        print(f"{direction:9} {first:12,.0f} bytes a micro-batch with latents, {second:12,.0f} without: {first / second:.2f}")
    hidden, latents = infimm.train.micro_batch_size * infimm.data.sequence_length, infimm.model.resampler
    print(
        f"a micro-batch has {hidden} tokens of width {infimm.model.decoder.hidden_size} and {with_latents[0]['images']:.1f} images "
        f"of {latents.num_latents} latents of width {infimm.model.vision.hidden_size} on average; all have room for the fullest"
    )


if __name__ == "__main__":
    main()
