"""`megatron-mm report`: write one HTML page about one or more runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mm.cli.checks import output
from megatron_mm.cli.command import Command, Parser
from megatron_mm.platform.files import file_error


def _arguments(parser: Parser) -> None:
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="run directory; several are compared")
    parser.add_argument("--out", metavar="FILE", type=output(), help="page to write (default: report.html in the first run directory)")


def _run(given: argparse.Namespace) -> None:
    from megatron_mm.reporting.run_report import write_report

    out = given.out or given.run_dirs[0] / "report.html"
    try:
        runs = write_report(given.run_dirs, out)
    except OSError as error:
        if given.out is not None or error.filename != str(out):
            raise
        raise ValueError(f"{file_error(error, places=())}: choose another place with --out FILE") from error
    for run in runs:
        damaged = f", damaged lines left out: {sum(run.damaged.values())}" if run.damaged else ""
        replaced = f", {run.metrics.replaced} lines of repeated steps replaced" if run.metrics.replaced else ""
        print(f"{run.path}: {len(run.metrics.steps)} steps{replaced}{damaged}")
    print(f"written to {out}")


REPORT = Command(
    help="write one HTML page about one or more runs: curves, evaluations, events, differences", run=_run, arguments=_arguments
)
