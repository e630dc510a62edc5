"""`megatron-mm plan`: predict the time, memory and cost of a run before it is queued, and compare predictions with measurements."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from megatron_mm.cli.checks import PICTURES, existing_file, number, output
from megatron_mm.cli.command import Command, Parser, at_least, choices, show
from megatron_mm.cli.recipe import list_recipes, recipe_of
from megatron_mm.config import Experiment
from megatron_mm.planning.hardware import GPUS, MICRO, OURS, gpu_named, with_host
from megatron_mm.planning.memory import USABLE, USABLE_BY_RECIPES, fits

if TYPE_CHECKING:
    from megatron_mm.planning.recipe_job import Planned


logger = logging.getLogger(__name__)


def _arguments(parser: Parser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a recipe; its fields are options, as for train")
    known = "{" + ",".join(GPUS) + "}"
    parser.add_argument("--gpu", type=_gpu, default="h100-sxm", metavar=known, help="kind of GPU (default: h100-sxm)")
    parser.add_argument("--num-gpus", type=at_least(1), metavar="N", help="number of GPUs of the run")
    parser.add_argument("--price", type=number(least=0), metavar="X", help="price of one GPU for one hour; adds the cost of the run")
    parser.add_argument("--search", action="store_true", help="find the layout with the shortest step, and show the ten best")
    parser.add_argument(
        "--usable-memory",
        type=number(above=0, most=1),
        metavar="X",
        help=f"with --search: fraction of the GPU's memory that a layout may use (default: {USABLE}; the recipes' layouts use "
        f"{USABLE_BY_RECIPES})",
    )
    parser.add_argument(
        "--host-microseconds",
        type=number(above=0),
        metavar="X",
        help="time that the host takes for one pass of a module around a matrix product; its other times are scaled in proportion "
        "(default: 250)",
    )
    parser.add_argument(
        "--images",
        type=at_least(0),
        metavar="N",
        help="largest number of images in a sequence, instead of the data's; sequences are then drawn at random, each with as many images "
        "as its documents have and fit",
    )
    parser.add_argument("--timeline", type=output(*PICTURES), metavar="FILE.png", help="draw the simulated pipeline")
    parser.add_argument("--chrome-trace", type=output(), metavar="FILE.json", help="write the simulated pipeline for chrome://tracing")
    parser.add_argument(
        "--trace", action="store_true", help="also run one step of every pipeline rank without devices, and count bytes, messages and FLOPs"
    )
    parser.add_argument("--memory-timeline", type=output(*PICTURES), metavar="FILE.png", help="with --trace: plot memory over the step")
    parser.add_argument(
        "--measurements",
        type=existing_file,
        metavar="FILE.csv",
        help="instead of planning, compare predictions with published measurements",
    )
    parser.add_argument("--every-row", action="store_true", help="with --measurements: print every row")


def _gpu(word: str) -> str:
    """The name of a kind of GPU, from any of its common spellings: h100, H100-SXM, a100."""
    found = gpu_named(word)
    if found is None or found.name not in GPUS:
        raise argparse.ArgumentTypeError(f"unknown {word!r}: {choices(word, GPUS)}")
    return found.name


def _experiment(given: argparse.Namespace) -> Experiment | None:
    return recipe_of(given) if given.recipe is not None else None


_NEEDS = {"memory_timeline": "trace", "every_row": "measurements", "usable_memory": "search"}
"""Options that mean nothing without another."""
_NOT_OF_MEASUREMENTS = ("recipe", "num_gpus", "price", "search", "host_microseconds", "images", "timeline", "chrome_trace", "trace")
"""Arguments that `--measurements` ignores."""


def _option(name: str) -> str:
    return "RECIPE" if name == "recipe" else "--" + name.replace("_", "-")


def _check(given: argparse.Namespace) -> None:
    """Raise ValueError if an option needs another that is not given; warn of what is ignored."""
    for name, needed in _NEEDS.items():
        if getattr(given, name) not in (None, False) and not getattr(given, needed):
            raise ValueError(f"{_option(name)} has an effect only together with {_option(needed)}: add {_option(needed)}")
    ignored = [_option(name) for name in _NOT_OF_MEASUREMENTS if getattr(given, name) not in (None, False)]
    if given.measurements is not None and ignored:
        logger.warning("ignored, because --measurements plans no run: %s", ", ".join(ignored))


def _run(given: argparse.Namespace) -> None:
    _check(given)
    if given.measurements is not None:
        from megatron_mm.planning.validation import report

        for line in report(given.measurements, every_row=given.every_row):
            print(line)
        return
    if given.experiment is None:
        raise ValueError("nothing to plan: specify a RECIPE and --num-gpus N, or use --measurements FILE.csv")
    if given.num_gpus is None:
        raise ValueError("no number of GPUs given: add --num-gpus N")
    _plan(given)


def _plan(given: argparse.Namespace) -> None:
    from megatron_mm.planning.drawing import draw_timeline, write_trace
    from megatron_mm.planning.recipe_job import check_number_format, plan_recipe
    from megatron_mm.planning.report import describe, table
    from megatron_mm.planning.search import search
    from megatron_mm.planning.step import StepModel
    from megatron_mm.planning.workload import Workloads
    from megatron_mm.run.data import TRAINING, has_data, make_plan

    experiment, gpu = given.experiment, GPUS[given.gpu]
    check_number_format(experiment, gpu)
    found = has_data(experiment)
    if not found and any(word.startswith("--data.path") for word in given.overrides):
        logger.warning("there is no data at data.path %s, so the lengths of texts are drawn at random", experiment.data.path)
    plan = make_plan(experiment, split=TRAINING) if found else None
    loads = Workloads(experiment, plan=plan, images=given.images)
    software = OURS
    if given.host_microseconds is not None:
        software = with_host(OURS, given.host_microseconds * MICRO / OURS.module_seconds)
    if given.search:
        result = search(experiment, gpu, given.num_gpus, loads=loads, software=software, usable=given.usable_memory or USABLE)
        for line in table(result):
            show(line)
        show("")
        planned = result.best[0].planned
    else:
        work = loads.of(data_size=experiment.parallel.data_parallel_size(given.num_gpus))
        planned = plan_recipe(experiment, gpu, given.num_gpus, work=work, software=software)
    pictures = given.timeline is not None or given.chrome_trace is not None
    prediction = StepModel(planned.job).predict(keep_events=pictures)
    for line in describe(planned, prediction, price=given.price):
        show(line)
    if given.timeline is not None:
        draw_timeline(prediction.pipeline, given.timeline, title=f"{experiment.recipe}, {planned.job.layout}, {given.num_gpus} {gpu.name}")
    if given.chrome_trace is not None:
        write_trace(prediction.pipeline, given.chrome_trace)
    if given.trace:
        _trace(given, planned)
    if not fits(prediction.peak_bytes, gpu):
        raise SystemExit(1)


def _trace(given: argparse.Namespace, planned: Planned) -> None:
    from megatron_mm.planning.tracing.report import describe_traces, draw_memory
    from megatron_mm.planning.tracing.trace import trace_ranks

    traces = trace_ranks(planned.experiment, world_size=given.num_gpus, work=planned.work)
    for line in describe_traces(traces):
        show(line)
    if given.memory_timeline is not None:
        draw_memory(traces, given.memory_timeline)


def _notes() -> str:
    return (
        "The exit code is 1 if the layout does not fit in the GPU's memory.\n\n"
        "With --measurements: predicted and published step times and memory, by source and kind (dense, moe). FILE.csv has the\n"
        "columns of benchmarks/anchors/throughput.csv. Missing values are assumed. Rows that cannot be predicted, for example\n"
        "because a cell cannot be read, are listed with the reason.\n\n" + list_recipes()
    )


PLAN = Command(
    help="predict step time, memory, days and cost of a run before it is queued",
    run=_run,
    arguments=_arguments,
    experiment=_experiment,
    notes=_notes,
)
