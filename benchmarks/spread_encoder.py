"""Gain from encoding images on every pipeline rank: step time compared with a tower on the first stage, in one run.

    .venv/bin/python benchmarks/spread_encoder.py

A pipeline of 2 on gloo, one process per core, trains on demo data. The tower takes a large share of the work, and micro-batches have from
zero to many images. The baseline is the fastest of several splits that assign the first stage fewer decoder layers. The variants run one
after another; medians and ratios to the baseline are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.data.prepare.demo import prepare_demo
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import TrainingData, open_tokenizer
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

LAYERS = 8
BASELINE = "tower on the first stage"
KINDS = {
    **{
        f"{BASELINE}, {first} + {LAYERS - first} layers": ParallelConfig(pipeline=2, stage_layers=(first, LAYERS - first))
        for first in (2, 3, 4)
    },
    "all ranks encode, 4 + 4 layers": ParallelConfig(pipeline=2, spread_encoder=True),
}


def settings(data: Path, parallel: ParallelConfig) -> Experiment:
    base = get_recipe("debug_mm1")
    decoder = replace(
        base.model.decoder, hidden_size=192, ffn_hidden_size=576, num_layers=LAYERS, num_attention_heads=6, num_query_groups=6, head_dim=32
    )
    vision = replace(base.model.vision, hidden_size=192, ffn_hidden_size=768, num_layers=8)
    return replace(
        base,
        model=replace(base.model, decoder=decoder, vision=vision),
        parallel=parallel,
        data=replace(base.data, path=data, sequence_length=384, max_images_per_sequence=16, decoder="pillow"),
        train=replace(base.train, global_batch_size=8, micro_batch_size=1),
    )


def measure(data: Path, kind: str, steps: int) -> list[float]:
    """Return the seconds of a kind's timed steps; both processes call this."""
    torch.set_num_threads(1)
    experiment = settings(data, KINDS[kind])
    topology = topologies.initialize(experiment.parallel, seed=1)
    batches = TrainingData(experiment, topology, open_tokenizer(experiment))
    try:
        held = [next(batches).micro_batches for _ in range(3)]
    finally:
        batches.close()
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=len(experiment.data.sources))
    seconds = []
    for number in range(steps + 1):
        dist.barrier()
        began = time.perf_counter()
        step.run(held[number % len(held)], step=number + 1)
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    topologies.shutdown()
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        seconds = measure(arguments.data, arguments.kind, arguments.steps)
        if os.environ["RANK"] == "0":
            print(json.dumps(seconds))
        return
    medians = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare_demo(data, samples=240)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "--data", str(data)]
        for kind in KINDS:
            options = ["--steps", str(arguments.steps), "--kind", kind]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*command, *options], env=environment, stdout=subprocess.PIPE, text=True, check=True)
            medians[kind] = statistics.median(json.loads(done.stdout.splitlines()[-1]))
    best = min(median for name, median in medians.items() if name.startswith(BASELINE))
    for name, median in medians.items():
        print(f"{name:42} {1e3 * median:8.0f} ms a step  {median / best:.3f} of the best baseline")


if __name__ == "__main__":
    main()
