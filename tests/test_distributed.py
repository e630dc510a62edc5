"""The runner of multi-process tests itself: a rank that fails or hangs fails the test, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.distributed import run_processes


def _who() -> tuple[str, str]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"]


def _is_gone(pid: int) -> bool:
    """Return True if a process has ended, including a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_until_gone(folder: Path, names: set[str]) -> None:
    pids = {path.name: int(path.read_text()) for path in folder.iterdir()}
    assert set(pids) == names
    while not all(_is_gone(pid) for pid in pids.values()):
        time.sleep(0.02)  # a kill takes a moment; the test's own time limit ends this


def _fail_beside_a_rank_that_waits(folder: Path) -> None:
    rank = os.environ["RANK"]
    (folder / rank).write_text(str(os.getpid()))
    if rank == "0":
        while True:
            time.sleep(1)
    while not (folder / "0").is_file():
        time.sleep(0.02)
    raise ValueError("the reason")


def _wait_for_ever(folder: Path) -> None:
    rank = os.environ["RANK"]
    (folder / rank).write_text(str(os.getpid()))
    if rank == "1":
        helper = subprocess.Popen(["sleep", "600"])
        (folder / "helper").write_text(str(helper.pid))
        helper.wait()


def _die() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_by_rank() -> None:
    assert run_processes(_who, 3) == [("0", "3"), ("1", "3"), ("2", "3")]


def test_a_failure_shows_its_traceback_and_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed.*_fail_beside_a_rank_that_waits.*ValueError: the reason"):
        run_processes(_fail_beside_a_rank_that_waits, 2, tmp_path)
    _wait_until_gone(tmp_path, {"0", "1"})


def test_a_hang_ends_at_the_time_limit_with_the_stack_of_who_hangs(tmp_path: Path) -> None:
    run_processes(_who, 1)  # starts the fork server, so that the time limit below covers only the function
    with pytest.raises(AssertionError, match=r"(?s)timed out; ranks without a result: \[1\].*_wait_for_ever"):
        run_processes(_wait_for_ever, 2, tmp_path, timeout=6)
    _wait_until_gone(tmp_path, {"0", "1", "helper"})


def test_a_death_is_told_from_a_hang() -> None:
    with pytest.raises(AssertionError, match=r"ended without a result, exit codes by rank: \{1: -9\}"):
        run_processes(_die, 2)
