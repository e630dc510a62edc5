"""`megatron-mm train`: train a recipe, or resume the run in a directory."""

from __future__ import annotations

import argparse

from megatron_mm.cli.checks import directory
from megatron_mm.cli.command import Command, Parser
from megatron_mm.cli.recipe import add_recipe, list_recipes, recipe_of


def _arguments(parser: Parser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--run-dir",
        type=directory,
        metavar="DIR",
        help="run directory, for configuration, metrics, checkpoints and W&B; if it has a checkpoint, the run resumes from the newest one",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, the parameters on each pipeline stage and the plan of the first steps, then exit",
    )
    parser.add_argument("--force", action="store_true", help="train even if the planner predicts that the layout does not fit on the GPUs")


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
    except LostContact:  # one process has already reported it for all
        end_process(EXIT_LOST)


TRAIN = Command(help="train a recipe, or resume a run", run=_run, arguments=_arguments, experiment=recipe_of, notes=list_recipes)
