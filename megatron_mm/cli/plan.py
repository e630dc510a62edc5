"""`megatron-mm plan`: what a run would cost before it is queued, and how far such predictions can be trusted."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_plan(commands: argparse._SubParsersAction) -> None:
    """Add the command to the program's."""
    plan = commands.add_parser(
        "plan", help="step time, memory, days and cost of a recipe on a cluster, before it is queued", add_help=False
    )
    plan.add_argument("recipe", nargs="?", help="name of a recipe")
    plan.add_argument("--measurements", type=Path, help="compare predictions with a table of published step times instead")
    plan.add_argument("--every-row", action="store_true", help="with --measurements: a line for each row")
    plan.add_argument("-h", "--help", action="store_true")
    plan.set_defaults(run=run_plan)


USAGE = """usage: megatron-mm plan --measurements FILE.csv [--every-row]

Compares predicted with published step times and memory, by source and kind (dense, moe). FILE has the columns of
benchmarks/anchors/throughput.csv; what a row lacks is chosen, and a row that cannot be predicted is named with the reason."""


def run_plan(known: argparse.Namespace, rest: list[str]) -> None:
    """Print what was asked for. Raises ValueError for a user's mistake."""
    if known.measurements is None:
        print(USAGE)
        if not known.help:
            raise ValueError("nothing to plan: give --measurements FILE.csv")
        return
    from megatron_mm.planning.validation import report

    for line in report(known.measurements, every_row=known.every_row):
        print(line)
