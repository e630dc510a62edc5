"""`megatron-mm watch`: show the progress of a run until it ends."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mm.cli.command import Command, Parser


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive number of seconds (less than a day)")
    return seconds


def _arguments(parser: Parser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run directory, on this machine or a shared file system")
    parser.add_argument("--interval", metavar="SECONDS", type=_seconds, default=2.0, help="seconds between updates (default: 2)")
    parser.add_argument("--once", action="store_true", help="show the progress once and exit")


def _run(given: argparse.Namespace) -> None:
    from megatron_mm.reporting.progress import GONE, watch
    from megatron_mm.run.lock import gone_since, held_since

    try:
        ended = watch(given.run_dir, interval=given.interval, once=given.once, gone_since=gone_since, held_since=held_since)
    except KeyboardInterrupt:
        return
    if ended in ("failed", GONE):
        raise SystemExit(1)


WATCH = Command(help="show the progress of a run until it ends", run=_run, arguments=_arguments)
