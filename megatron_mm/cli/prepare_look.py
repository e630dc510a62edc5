"""`megatron-mm prepare view` and `prepare report`: inspect a data set."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_mm.cli.checks import place
from megatron_mm.cli.command import Command, Parser, at_least, show
from megatron_mm.cli.recipe import list_recipes, recipe_of
from megatron_mm.platform.files import write_whole


def _view_arguments(parser: Parser) -> None:
    parser.add_argument(
        "path", type=Path, metavar="DATA", help="indexed data set; all of its sources are shown if it lacks one of data.mixture"
    )
    parser.add_argument("--out", type=place, metavar="FILE", help="page to write (default: DATA/view.html)")
    parser.add_argument(
        "--recipe",
        default="debug_mm1",
        metavar="NAME",
        help="recipe whose packing and images are shown; its fields are options, as for train (default: %(default)s)",
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="split to show (default: %(default)s)")
    parser.add_argument(
        "--micro-batches", type=at_least(1), default=4, metavar="N", help="number of micro-batches to show (default: %(default)s)"
    )


def _view(given: argparse.Namespace) -> None:
    from megatron_mm.run.view import check_split, with_sources_of, write_view

    check_split(given.path, given.split)
    experiment = given.experiment
    if any(word.startswith("--data.mixture") for word in given.overrides):
        experiment = replace(experiment, data=replace(experiment.data, path=given.path))
    else:
        experiment = with_sources_of(experiment, given.path, split=given.split)
    out = given.out or given.path / "view.html"
    tokens = write_view(experiment, out, recipe=given.recipe, split=given.split, micro_batches=given.micro_batches)
    print(f"{out}: {tokens:,} tokens, {out.stat().st_size / 1e6:.1f} MB")


def _report_arguments(parser: Parser) -> None:
    parser.add_argument("path", type=Path, metavar="DATA", help="indexed data set, split or source")
    parser.add_argument("--json", type=place, metavar="FILE", help="also write the statistics as JSON")
    parser.add_argument("--picture", type=place, metavar="FILE", help="also plot them, as .png, .pdf or .svg")


def _report(given: argparse.Namespace) -> None:
    from megatron_mm.data.prepare.report import check_picture, draw_report, report

    if given.picture is not None:
        check_picture(given.picture)
    for out in filter(None, (given.json, given.picture)):
        out.parent.mkdir(parents=True, exist_ok=True)
    found = report(given.path)
    show(str(found))
    if given.json is not None:
        write_whole(given.json, found.to_json())
    if given.picture is not None:
        draw_report(found, given.picture)


LOOK_COMMANDS = {
    "view": Command(
        help="write an HTML page that shows packed sequences as a model sees them",
        run=_view,
        arguments=_view_arguments,
        experiment=recipe_of,
        notes=list_recipes,
    ),
    "report": Command(help="print statistics of an indexed data set", run=_report, arguments=_report_arguments),
}
