"""Overhead of the trainer: its step compared with a bare megatron-core loop on the same model and batches.

    .venv/bin/python benchmarks/trainer_overhead.py --data data/demo

Both run in one process, in turn, on the same weights, optimizer and micro-batches. The bare loop zeroes the gradients, runs the schedule
and steps the optimizer, with batches already in memory; the trainer's step includes the wait for data, metrics, console and hooks. Prints
the median of each and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.start import assemble, check
from megatron_mm.training.trainer import Trainer


def bare_step(trainer: Trainer, micro_batches: list[PackedBatch]) -> None:
    """Run a step with megatron-core alone: the least that every loop on it must do."""

    def forward_step(batches: Iterator[PackedBatch], chunk: torch.nn.Module) -> tuple[Any, ...]:
        batch = next(batches)

        def loss(losses: torch.Tensor) -> tuple[Any, ...]:
            total = (losses.flatten() * batch.loss_mask).sum()
            return total, batch.loss_mask.sum().int(), total.detach()

        return chunk(batch), loss

    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    train = trainer.experiment.train
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=trainer.model[0],
        num_microbatches=len(micro_batches),
        seq_length=train.micro_batch_size * trainer.experiment.data.sequence_length,
        micro_batch_size=1,
        forward_only=False,
    )
    # As the optimizer's own step(), whose clipping requires CUDA tensors.
    trainer.optimizer.prepare_grads()
    norm = torch.tensor(float(trainer.optimizer.get_grad_norm()))
    torch.nn.utils.clip_grads_with_norm_(trainer.optimizer.get_parameters(), trainer.experiment.optimizer.clip_grad_norm, norm)
    trainer.optimizer.step_with_ready_grads()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set of `megatron-mm prepare demo`")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each (default: %(default)s)")
    arguments = parser.parse_args()
    recipe = get_recipe("debug_mm1")
    experiment = replace(
        recipe,
        data=replace(recipe.data, path=arguments.data),
        eval=replace(recipe.eval, interval=0),
        train=replace(recipe.train, steps=10**6),
        checkpoint=replace(recipe.checkpoint, interval=10**6),
    )
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = assemble(check(experiment, Path(run_dir)), Path(run_dir))
        full: list[float] = []
        bare: list[float] = []
        for index in range(arguments.steps + 3):
            began = time.perf_counter()
            record = trainer._one_step()
            for hook in trainer.hooks:
                hook.after_step(record)
            middle = time.perf_counter()
            bare_step(trainer, record.batch.micro_batches)
            ended = time.perf_counter()
            if index >= 3:
                full.append(middle - began)
                bare.append(ended - middle)
        trainer.data.close()
        for hook in reversed(trainer.hooks):
            hook.close(failed=False)
        topologies.shutdown()
    ratios = [a / b for a, b in zip(full, bare, strict=True)]
    print(f"trainer step {1e3 * statistics.median(full):8.2f} ms (median of {len(full)})")
    print(f"bare loop    {1e3 * statistics.median(bare):8.2f} ms")
    print(f"ratio        {statistics.median(ratios):8.3f} (median of the pairs; aim: at most 1.03)")


if __name__ == "__main__":
    main()
