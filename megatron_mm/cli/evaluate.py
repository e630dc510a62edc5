"""`megatron-mm evaluate`: run benchmarks on a run or an exported model, few-shot and zero-shot, and plot the results of several runs."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from megatron_mm.cli.checks import place
from megatron_mm.cli.command import Command, Parser, at_least, integer, one_of
from megatron_mm.cli.recipe import experiment_in
from megatron_mm.config import Experiment, ParallelConfig


def _arguments(parser: Parser) -> None:
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN_OR_EXPORT",
        type=Path,
        help="RUN_DIR for its newest checkpoint, RUN_DIR/checkpoints/step_..., or a folder written by `convert to-hf`; "
        "with a run, --help lists every field",
    )
    parser.add_argument("--tasks", metavar="TASK,...", help="tasks and groups of tasks (see below), or FILE.py:TASK")
    parser.add_argument("--shots", nargs="+", type=at_least(0), default=[0], metavar="N", help="numbers of demonstrations (default: 0)")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder with the tasks' files, in one folder per task (default: the run's data.path)"
    )
    parser.add_argument("--out", type=place, metavar="FOLDER", help="folder for the results (default: RUN_OR_EXPORT/evaluation)")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="number of items per task, drawn by --seed (default: all)")
    parser.add_argument("--seed", type=integer, default=0, metavar="N", help="seed of the demonstrations and of --limit (default: 0)")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=16, metavar="N", help="items that a data-parallel rank processes at once (default: 16)"
    )
    parser.add_argument("--beams", type=at_least(1), default=1, metavar="N", help="number of beams in beam search (default: 1, greedy)")
    parser.add_argument(
        "--method", help="generate answers or rank choices, instead of the tasks' own method", **one_of(["generate", "rank"])
    )
    parser.add_argument(
        "--form", metavar="TEXT", help="form of the prompts, instead of the tasks' own, such as '{image}Describe:' (docs/evaluation.md)"
    )
    parser.add_argument(
        "--text-demonstrations",
        type=at_least(0),
        default=0,
        metavar="N",
        help="number of demonstrations without images for --shots 0; Flamingo's zero-shot has two (default: 0)",
    )
    parser.add_argument(
        "--low-resolution-demonstrations",
        action="store_true",
        help="show images of demonstrations only as overviews, for models that show images as an overview and crops",
    )
    parser.add_argument("--recipe", metavar="RECIPE", help="recipe of an exported model (default: the one that it states)")
    parser.add_argument("--compare", nargs="+", type=Path, metavar="RUN", help="plot the results of several runs, instead of evaluating")


def _experiment(given: argparse.Namespace) -> Experiment | None:
    if given.target is None:
        return None
    from megatron_mm.conversion.export_settings import read_export_settings

    if given.recipe is not None:
        from megatron_mm.families.recipes import get_recipe

        experiment = get_recipe(given.recipe)
    else:
        found = experiment_in(given.target) or read_export_settings(given.target)
        if found is None:
            _say_what_is_missing(given.target)
            return None
        experiment = found
    return replace(experiment, parallel=ParallelConfig(distributed_optimizer=experiment.parallel.distributed_optimizer))


def _say_what_is_missing(target: Path) -> None:
    """Raise ValueError if the target cannot be evaluated with the given arguments."""
    from megatron_mm.run.evaluate_tasks import is_export, no_recipe
    from megatron_mm.training.checkpoint import find_checkpoint

    if is_export(target):
        raise ValueError(no_recipe(target))
    find_checkpoint(target)


def _run(given: argparse.Namespace) -> None:
    if given.compare is not None:
        from megatron_mm.evaluation.compare import compare

        for line in compare(given.compare, out=given.out or Path("comparison.png")):
            print(line)
        return
    if given.target is None or not given.tasks:
        raise ValueError(
            "nothing to evaluate: specify RUN_OR_EXPORT and --tasks, or use --compare RUN RUN ...: see megatron-mm evaluate --help"
        )
    from megatron_mm.evaluation.tasks.registry import tasks_of

    tasks = tasks_of([name for name in given.tasks.split(",") if name])
    from megatron_mm.evaluation.runner import Options
    from megatron_mm.run.evaluate_tasks import evaluate_tasks, open_target, report

    target = open_target(given.target, given.experiment, out=given.out, own=_experiment(given))
    options = Options(
        seed=given.seed,
        limit=given.limit,
        batch_size=given.batch_size,
        beams=given.beams,
        form=given.form,
        method=given.method,
        text_demonstrations=given.text_demonstrations,
        low_resolution_demonstrations=given.low_resolution_demonstrations,
    )
    results = evaluate_tasks(
        given.experiment,
        target,
        tasks,
        shots=list(dict.fromkeys(given.shots)),
        data=given.data or given.experiment.data.path,
        out=given.out,
        options=options,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        for line in report(results, given.experiment, target, out=given.out):
            print(line)


def _notes() -> str:
    from megatron_mm.evaluation.tasks.registry import GROUPS, TASKS

    width = max(map(len, TASKS)) + 2
    lines = [f"  {task.name:{width}}{task.title}; {task.metric}" for task in TASKS.values()]
    groups = [f"  {name:{width}}{', '.join(members)}" for name, members in GROUPS.items()]
    return "\n".join(
        ["tasks:", *lines, "", "groups:", *groups, "", "Files that each needs, prompts and papers' figures: docs/evaluation.md"]
    )


EVALUATE = Command(
    help="run benchmarks, few-shot and zero-shot, on a run or an exported model",
    run=_run,
    arguments=_arguments,
    experiment=_experiment,
    notes=_notes,
)
