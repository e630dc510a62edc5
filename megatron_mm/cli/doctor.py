"""`megatron-mm doctor`: what this machine has, and what stands in for what it lacks."""

from __future__ import annotations

import argparse

from megatron_mm.cli.command import Command


def _run(given: argparse.Namespace) -> None:
    from megatron_mm.run.doctor import report

    print(report())


DOCTOR = Command(help="what this machine has, and what falls back to what", run=_run)
