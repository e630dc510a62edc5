"""`megatron-mm plan`: what a run would cost before it is queued, and how far such predictions can be trusted."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mm.cli.command import Command, Parser


def _arguments(parser: Parser) -> None:
    parser.add_argument("--measurements", type=Path, metavar="FILE.csv", help="compare predictions with this table of published step times")
    parser.add_argument("--every-row", action="store_true", help="with --measurements: a line for each row")


def _run(given: argparse.Namespace) -> None:
    if given.measurements is None:
        raise ValueError("nothing to plan: give --measurements FILE.csv")
    from megatron_mm.planning.validation import report

    for line in report(given.measurements, every_row=given.every_row):
        print(line)


_NOTES = """Compares predicted with published step times and memory, by source and kind (dense, moe). FILE.csv has the columns of
benchmarks/anchors/throughput.csv; what a row lacks is chosen, and a row that cannot be predicted is named with the reason."""

PLAN = Command(help="predicted step time and memory against published measurements", run=_run, arguments=_arguments, notes=lambda: _NOTES)
