"""`megatron-mm train`: train a recipe, or resume the run in a directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mm.cli.command import Command, Parser
from megatron_mm.cli.recipe import add_recipe, list_recipes, recipe_of


def _arguments(parser: Parser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="directory of the run: configuration, metrics, checkpoints, W&B; resumes from the newest checkpoint in it",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, the parameters of every pipeline stage and the first steps' plan, and stop",
    )
    parser.add_argument("--force", action="store_true", help="train even where the planner says that the layout cannot fit the GPUs")


def _run(given: argparse.Namespace) -> None:
    if given.dry_run:
        from megatron_mm.run.dry_run import describe

        for line in describe(given.experiment):
            print(line)
        return
    if given.run_dir is None:
        raise ValueError("no run directory given: add --run-dir DIR")
    from megatron_mm.planning.watch import examine, plan_hooks
    from megatron_mm.run.start import start
    from megatron_mm.run.watchdog import EXIT_LOST, LostContact, end_process

    try:
        if given.force:
            start(given.experiment, given.run_dir, more_hooks=plan_hooks)
        else:
            start(given.experiment, given.run_dir, examine=examine, more_hooks=plan_hooks)
    except LostContact:  # one process has said it for all
        end_process(EXIT_LOST)


TRAIN = Command(help="train a recipe, or resume a run", run=_run, arguments=_arguments, experiment=recipe_of, notes=list_recipes)
