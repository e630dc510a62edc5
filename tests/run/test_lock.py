"""Only one run may use a run directory: its lock refuses real other processes, and is taken over from dead ones."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.run import lock as locks
from megatron_mm.run.lock import LOCK_FILE, Holder, RunLock
from megatron_mm.run.start import start
from megatron_mm.training.trainer import Trainer

_HOLD = """
import sys, time
from dataclasses import replace
from pathlib import Path
from megatron_mm.run import lock
lock.BEAT_SECONDS, lock.STALE_SECONDS = 0.2, 3.0
held = lock.RunLock(Path(sys.argv[1]))
if sys.argv[2] == "elsewhere":
    held.me = replace(held.me, host="node7", machine="another boot")
held.acquire()
print("held", flush=True)
time.sleep(60)
"""


class Holding:
    """A process that holds the lock of a run directory."""

    def __init__(self, run_dir: Path, where: str = "here", **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(run_dir), where], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(locks, "STALE_SECONDS", 3.0)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[list[Holding]]:
    started: list[Holding] = []
    yield started
    for held in started:
        held.kill()


def test_a_second_run_is_refused_by_name_and_a_killed_one_leaves_the_directory_at_once(tmp_path: Path, holding: list[Holding]) -> None:
    holding.append(Holding(tmp_path, SLURM_JOB_ID="77"))
    said = rf"is in use by process {holding[0].process.pid} on {Holder().host}, Slurm job 77, since 20.* \(last beat \d+ s ago\)"
    with pytest.raises(ValueError, match=said):
        RunLock(tmp_path).acquire()
    holding[0].kill()
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began < locks.STALE_SECONDS / 2, "a dead process of this machine needs no waiting"
    assert os.listdir(tmp_path) == []


def test_a_holder_on_another_machine_is_believed_while_it_beats(tmp_path: Path, holding: list[Holding]) -> None:
    holding.append(Holding(tmp_path, "elsewhere"))
    with pytest.raises(ValueError, match=r"is in use by process \d+ on node7"):
        RunLock(tmp_path).acquire()
    holding[0].kill()
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began > locks.STALE_SECONDS / 2, "who has been heard of lately is waited for"


@pytest.mark.parametrize("jump", [-86400.0, 86400.0], ids=["a day back", "a day ahead"])
def test_a_file_system_whose_clock_jumps_fools_nobody(tmp_path: Path, holding: list[Holding], jump: float) -> None:
    """A live holder on another machine is respected; a dead one is not waited for until its last beat is in the past."""
    holding.append(Holding(tmp_path, "elsewhere"))
    now = time.time() + jump
    os.utime(tmp_path / LOCK_FILE, (now, now))
    with pytest.raises(ValueError, match=r"is in use by process \d+ on node7"):
        RunLock(tmp_path).acquire()
    holding[0].kill()
    os.utime(tmp_path / LOCK_FILE, (now, now))
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began < 3 * locks.STALE_SECONDS


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"},
        {"SLURM_JOB_ID": "77", "TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_RESTART_COUNT": "1"},
    ],
    ids=["requeued by Slurm", "restarted by torchrun"],
)
def test_the_next_attempt_of_the_same_job_takes_over_at_once(
    environment: dict[str, str], tmp_path: Path, holding: list[Holding], monkeypatch: pytest.MonkeyPatch
) -> None:
    holding.append(Holding(tmp_path, "elsewhere", SLURM_JOB_ID="77", TORCHELASTIC_RUN_ID=environment.get("TORCHELASTIC_RUN_ID", "none")))
    holding[0].kill()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began < locks.STALE_SECONDS / 2


def test_two_torchruns_of_one_name_are_two_runs(tmp_path: Path, holding: list[Holding], monkeypatch: pytest.MonkeyPatch) -> None:
    """Users choose --rdzv-id, and a script that is started twice passes the same one twice."""
    holding.append(Holding(tmp_path, "elsewhere", TORCHELASTIC_RUN_ID="mine", TORCHELASTIC_RESTART_COUNT="0"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    with pytest.raises(ValueError, match=r"is in use by process \d+ on node7"):
        RunLock(tmp_path).acquire()


def test_a_full_disk_leaves_no_lock_that_names_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*running.lock'"):
        RunLock(tmp_path).acquire()
    assert os.listdir(tmp_path) == []


def test_a_lock_that_is_no_text_is_waited_for_and_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_bytes(b"\xff\xfe\x00")
    with RunLock(tmp_path) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()


def test_of_several_runs_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    for _ in range(5):
        (tmp_path / LOCK_FILE).write_text(json.dumps({**vars(Holder()), "pid": 2**22 + 1, "started": "1"}))
        askers = [
            subprocess.Popen(
                [sys.executable, "-c", _HOLD, str(tmp_path), "here"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(3)
        ]
        deadline = time.monotonic() + 30
        while sum(asker.poll() is not None for asker in askers) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        refused = [asker for asker in askers if asker.poll() is not None]
        (winner,) = [asker for asker in askers if asker.poll() is None]
        winner.kill()
        assert all("is in use by" in asker.communicate()[1] for asker in refused)
        winner.communicate()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == winner.pid
        (tmp_path / LOCK_FILE).unlink()


def _clock_jumps(data: Path, run_dir: Path) -> int:
    """Train with the second process's clock a day ahead from step 2, then all clocks two days back; the watchdog allows eight seconds."""
    true, ahead = time.time, [0.0]
    time.time = lambda: true() + ahead[0]  # type: ignore[assignment]
    one_step = Trainer._one_step

    def jumping(self: Trainer) -> Any:
        if self.topology.rank == 1 or self.state.step > 4:
            ahead[0] = {2: 86400.0, 4: -86400.0}.get(self.state.step, ahead[0])
        return one_step(self)

    Trainer._one_step = jumping  # type: ignore[method-assign]
    experiment = small_run(data, steps=8, schedule_steps=20, watchdog=8.0)
    return start(replace(experiment, checkpoint=replace(experiment.checkpoint, interval=2)), run_dir).step


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(demo_data: Path, tmp_path: Path) -> None:
    """The test replaces `time.time`, since all programs share the machine's clock."""
    assert run_processes(_clock_jumps, 2, demo_data, tmp_path) == [8, 8]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9)) and all(0 < line["seconds"] < 100 for line in lines)
    assert (tmp_path / "checkpoints" / "step_00000008").is_dir() and not (tmp_path / "watchdog").exists()


def _loses_its_lock(data: Path, run_dir: Path) -> str:
    locks.BEAT_SECONDS = 0.05
    experiment = small_run(data, steps=2000, schedule_steps=2000)
    experiment = replace(experiment, checkpoint=replace(experiment.checkpoint, interval=2000))
    take = RunLock._beat

    def beat(self: Any) -> None:
        if self.path.exists() and not (run_dir / "taken").exists():
            (run_dir / "taken").touch()
            self.path.write_text(json.dumps({**vars(self.me), "token": "another", "host": "node7"}))
        take(self)

    RunLock._beat = beat  # type: ignore[method-assign]
    try:
        start(experiment, run_dir)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_run_whose_lock_was_taken_over_ends_everywhere_and_saves_nothing(demo_data: Path, tmp_path: Path) -> None:
    errors = run_processes(_loses_its_lock, 2, demo_data, tmp_path)
    assert "no longer holds" in errors[0] and "on node7" in errors[0] and "no longer holds" in errors[1], errors
    assert not list((tmp_path / "checkpoints").iterdir())
    assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == "node7", "the other run's lock stays"


@pytest.mark.slow
def test_a_second_train_command_on_a_run_directory_is_refused(demo_data: Path, tmp_path: Path) -> None:
    options = ["--run-dir", str(tmp_path / "run"), "--data.path", str(demo_data), "--train.steps", "10000", "--monitor.wandb", "disabled"]
    command = [sys.executable, "-m", "megatron_mm", "train", "debug_mm1", *options, "--eval.interval", "0"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / LOCK_FILE).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        second = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert second.returncode == 2
        assert f"is in use by process {first.pid} on " in second.stderr
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700, "a run directory is for its owner alone"
    finally:
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=240)
    assert not (tmp_path / "run" / LOCK_FILE).exists()
