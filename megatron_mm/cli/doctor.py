"""`megatron-mm doctor`: what is installed on this machine, and what is used in place of missing parts. --node: whether it is fit to join a
run."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

from megatron_mm.cli.command import Command, Parser


def _arguments(parser: Parser) -> None:
    parser.add_argument("--node", action="store_true", help="only check whether this node is fit to join a run; the exit code is 1 if not")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --node: number of GPUs that it should have")
    parser.add_argument(
        "--min-gb-per-s",
        type=float,
        default=0.0,
        metavar="X",
        help="with --node: lowest acceptable speed of an all-reduce within the node, GB/s",
    )
    parser.add_argument(
        "--path",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="with --node: directory to which the run will write (default: current directory)",
    )


def _run(given: argparse.Namespace) -> None:
    if not given.node:
        from megatron_mm.run.doctor import report

        print(report())
        return
    from megatron_mm.run.node_check import check_node

    findings = check_node(gpus=given.gpus, min_gb_per_s=given.min_gb_per_s, path=given.path)
    for finding in findings:
        print(f"{socket.gethostname()}  {finding}", flush=True)
    if not all(finding.fit for finding in findings):
        raise SystemExit(1)


DOCTOR = Command(
    help="report what is installed and what replaces missing parts; --node: check whether this node is fit to join a run",
    run=_run,
    arguments=_arguments,
)
