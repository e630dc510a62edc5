"""`megatron-mm eval`: held-out losses with true, shuffled and blank images, and captions."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from megatron_mm.cli.command import Command, Parser
from megatron_mm.cli.recipe import experiment_in
from megatron_mm.config import Experiment, ParallelConfig


def _arguments(parser: Parser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="RUN_DIR/checkpoints/step_..., or RUN_DIR for its newest one; if given, --help lists every field with the checkpoint's value",
    )


def _experiment(given: argparse.Namespace) -> Experiment:
    found = experiment_in(given.checkpoint)
    if found is not None:
        return replace(found, parallel=ParallelConfig(distributed_optimizer=found.parallel.distributed_optimizer))
    from megatron_mm.run.evaluate import experiment_of
    from megatron_mm.training.checkpoint import find_checkpoint

    return experiment_of(find_checkpoint(given.checkpoint))


def _run(given: argparse.Namespace) -> None:
    from megatron_mm.run.evaluate import evaluate
    from megatron_mm.training.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(given.checkpoint)
    found = evaluate(given.experiment, checkpoint)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{checkpoint}")
        for line in found.report():
            print(line)


EVAL = Command(
    help="compute held-out losses with true, shuffled and blank images, and generate captions",
    run=_run,
    arguments=_arguments,
    experiment=_experiment,
)
