"""Time saved by leaving out padding: steps on captions whose sequences reach the image limit before the token limit.

    .venv/bin/python benchmarks/padding.py

The model is a decoder of width 768 on demo data; `data.max_images_per_sequence` is set so that sequences are about 60% full, as mm1_30b's
captions are. The baseline computes the same micro-batches padded to full sequences, as earlier versions did. Steps alternate. The medians'
ratio is printed together with the ratio of real to padded tokens, which the decoder's work should follow.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.prepare.demo import prepare_demo
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import TrainingData, open_tokenizer
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep


def settings(data: Path) -> Experiment:
    base = get_recipe("debug_mm1")
    decoder = replace(
        base.model.decoder, hidden_size=768, ffn_hidden_size=2304, num_layers=4, num_attention_heads=6, num_query_groups=6, head_dim=128
    )
    return replace(
        base,
        model=replace(base.model, decoder=decoder),
        data=replace(base.data, path=data, mixture={"pairs": 1.0}, sequence_length=512, max_images_per_sequence=14, decoder="pillow"),
        train=replace(base.train, global_batch_size=8, micro_batch_size=1),
    )


def padded(batch: PackedBatch, tokens: int) -> PackedBatch:
    """Return the micro-batch with a last document of padding, `tokens` tokens in all."""
    more = tokens - batch.num_tokens
    fields = ("token_ids", "labels", "loss_mask", "is_token", "source_ids")
    return replace(
        batch,
        **{name: F.pad(getattr(batch, name), (0, more)) for name in fields},
        position_ids=torch.cat([batch.position_ids, torch.arange(more)]),
        cu_seqlens=torch.cat([batch.cu_seqlens, torch.tensor([tokens], dtype=torch.int32)]),
        max_seqlen=max(batch.max_seqlen, more),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare_demo(data, samples=240)
        experiment = settings(data)
        topology = topologies.initialize(experiment.parallel, seed=1)
        batches = TrainingData(experiment, topology, open_tokenizer(experiment))
        try:
            without = [next(batches).micro_batches for _ in range(3)]
        finally:
            batches.close()
    length = experiment.data.sequence_length
    kinds = {"padded (baseline)": [[padded(batch, length) for batch in step] for step in without], "as long as their tokens": without}
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=1)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(arguments.steps + 2):
        for name, steps in kinds.items():
            began = time.perf_counter()
            step.run(steps[number % len(steps)], step=number + 1)
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    tokens = sum(batch.num_tokens for step in without for batch in step) / (length * sum(len(step) for step in without))
    for name, median in medians.items():
        print(f"{name:28} {1e3 * median:8.0f} ms a step")
    ratio = medians["as long as their tokens"] / medians["padded (baseline)"]
    print(f"step time {ratio:.3f} of the baseline; tokens {tokens:.3f}; step time / tokens {ratio / tokens:.3f}")


if __name__ == "__main__":
    main()
