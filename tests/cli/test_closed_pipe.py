"""A reader may close the pipe before the end (`| head -4`): the program ends without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, sys
from megatron_mm.cli import main as cli
from megatron_mm.cli.command import Command, Group

def lines(given):
    for number in range(int({lines})):
        print(number)
    if {lost}:
        raise BrokenPipeError("a lost connection")

cli.COMMANDS = Group(help="", commands={{"doctor": Command(help="", run=lines)}})
cli.main(["doctor"])
"""


def _ended(*, lines: int, read: int, lost: bool = False) -> tuple[int, str]:
    """Run a command that prints lines, read some of them, close the pipe; return its exit code and errors."""
    root = Path(__file__).parents[2]
    code = CODE.format(lines=lines, lost=lost)
    reading, writing = os.pipe()
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    os.read(reading, read) if read else None
    if not lost:
        os.close(reading)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors


@pytest.mark.parametrize(("lines", "read", "code"), [(200_000, 10, 141), (3, 0, 0)])
def test_a_reader_that_leaves_ends_the_program_quietly(lines: int, read: int, code: int) -> None:
    """With more lines than a pipe holds it ends early (as if by SIGPIPE); a short output is complete before anybody notices."""
    assert _ended(lines=lines, read=read) == (code, "")


def test_another_lost_connection_is_still_an_error() -> None:
    code, errors = _ended(lines=3, read=0, lost=True)
    assert code == 1 and "a lost connection" in errors
