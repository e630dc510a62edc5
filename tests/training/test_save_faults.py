"""A failed save loses that checkpoint, not the run. Full and read-only disks are real here (a small tmpfs)."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.platform import first_writer
from megatron_mm.run.start import start
from megatron_mm.training.checkpoint import completed_checkpoints, integrity
from megatron_mm.training.trainer import Hook, StepRecord


def _mount(*options: str, at: Path) -> bool:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(at)], capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose checkpoints are on a separate file system of 64 MB."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    if not _mount("size=64m", at=folder):
        pytest.skip("only root may mount a tmpfs")
    try:
        yield folder.parent
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class _AtStep(Hook):
    """Runs a command (a change of the disk) after a step."""

    step, command = 0, [""]

    def after_step(self, record: StepRecord) -> None:
        if record.step == self.step:
            self.trainer.checkpointer.finish()
            if self.trainer.topology.is_main:
                subprocess.run(self.command, check=True)


def _train(data: Path, run_dir: Path, steps: int, at_step: int, command: list[str], asynchronous: bool = True) -> tuple[str, str]:
    """Train; return the error that ended the run ("" if none), and the logged errors."""
    _AtStep.step, _AtStep.command = at_step, command
    experiment = small_run(data, steps=steps, schedule_steps=20)
    checkpoint = replace(experiment.checkpoint, interval=2, asynchronous=asynchronous)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    handler.setLevel(logging.ERROR)
    logging.getLogger("megatron_mm").addHandler(handler)
    ended = ""
    try:
        start(replace(experiment, checkpoint=checkpoint), run_dir, more_hooks=lambda trainer, monitor, plan: [_AtStep(trainer)])
    except ValueError as error:
        ended = str(error)
    return ended, "\n".join(said)


def _names(run_dir: Path) -> list[str]:
    return [path.name for path in completed_checkpoints(run_dir)]


def _steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["asynchronous", "synchronous"])
def test_a_full_disk_costs_checkpoints_until_there_is_room(asynchronous: bool, demo_data: Path, small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    fill = ["sh", "-c", f"dd if=/dev/zero of={folder}/filler bs=1M count=64 2>/dev/null; rm -f {folder}/.none"]
    ended, log = run_processes(_train, 2, demo_data, small_disk, 6, 3, fill, asynchronous)[0]
    assert "the checkpoint of step 4 is abandoned" in log and "No space left on device" in log and "is full" in log
    assert "the newest checkpoint is of step 2" in log
    assert "the last checkpoint, of step 6, could not be written" in ended and log.count("Training continues") == 1
    assert _names(small_disk) == ["step_00000002"] and _steps(small_disk) == [1, 2, 3, 4, 5, 6], "the run went on"
    (folder / "filler").unlink()
    assert run_processes(_train, 2, demo_data, small_disk, 6, 0, [])[0] == ("", "")
    assert _names(small_disk) == ["step_00000004", "step_00000006"]
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_a_save(demo_data: Path, small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    for free_kb in (1, 40, 200, 1500):  # the save fails at a different file each time
        fill = [
            "sh",
            "-c",
            f"rm -f {folder}/filler; dd if=/dev/zero of={folder}/filler bs=1M 2>/dev/null; truncate -s -{free_kb}K {folder}/filler",
        ]
        ended, log = run_processes(_train, 2, demo_data, small_disk, 4, 3, fill)[0]
        assert "the checkpoint of step 4 is abandoned" in log and "the last checkpoint, of step 4, could not be written" in ended, free_kb
        assert _names(small_disk) == ["step_00000002"]


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(demo_data: Path, small_disk: Path) -> None:
    remount = ["mount", "-o", "remount,ro", str(small_disk / "checkpoints")]
    ended, log = run_processes(_train, 2, demo_data, small_disk, 4, 3, remount)[0]
    assert "the checkpoint of step 4 is abandoned" in log and "Read-only file system" in log and "of step 4, could not" in ended
    assert _names(small_disk) == ["step_00000002"]


def _one_writer_fails(data: Path, run_dir: Path, how: str) -> tuple[str, str]:
    """Train with a failure in the save of step 4: on the second process, or in the metadata, which only the first process writes."""
    write = integrity.write_checksums

    def writing(partial: Path, *, rank: int) -> None:
        if "step_00000004" in partial.name and rank == 1:
            if how == "killed":
                os.kill(os.getpid(), 9)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(partial, rank=rank)

    if how in ("killed", "checksums"):
        integrity.write_checksums = writing
    else:
        from megatron.core.dist_checkpointing import serialization

        first_writer.install()
        noted, seen = serialization.save_config.__wrapped__, []

        def failing(*arguments: object) -> None:
            seen.append(1)
            if len(seen) == 2:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            noted(*arguments)

        serialization.save_config = first_writer._noting(failing)
    assert not multiprocessing.active_children()
    return _train(data, run_dir, 6, 0, [])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("killed", "has no checksum: the process that wrote it died"),
        pytest.param("checksums", "has no checksum", marks=pytest.mark.slow),
        pytest.param("metadata", "Disk quota exceeded", marks=pytest.mark.slow),
    ],
)
def test_a_failure_of_one_writer_is_one_of_all(how: str, reason: str, demo_data: Path, tmp_path: Path) -> None:
    ended = run_processes(_one_writer_fails, 2, demo_data, tmp_path, how, timeout=240)
    assert [end for end, _ in ended] == ["", ""]
    assert "the checkpoint of step 4 is abandoned" in ended[0][1] and reason in ended[0][1]
    assert _names(tmp_path) == ["step_00000002", "step_00000006"] and _steps(tmp_path) == [1, 2, 3, 4, 5, 6]


_FULL_SHARED_MEMORY = """
mount -t tmpfs -o size=64k tmpfs /dev/shm && { head -c 65536 /dev/zero >/dev/shm/filler || true; } && exec "$@"
"""


@pytest.mark.slow
def test_a_full_shared_memory_costs_copies_there_and_no_checkpoint(demo_data: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own, so that no other process sees this /dev/shm."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root may have a file system of its own")
    run_dir = tmp_path / "run"
    options = ["--run-dir", str(run_dir), "--data.path", str(demo_data), "--train.steps", "4", "--train.global-batch-size", "4"]
    options += ["--checkpoint.interval", "2", "--eval.interval", "0", "--monitor.wandb", "disabled"]
    options += ["--checkpoint.memory", "/dev/shm/copies", "--checkpoint.memory-interval", "1"]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_mm", "train", "debug_mm1", *options]
    own = ["unshare", "-m", "--propagation", "private", "sh", "-c", _FULL_SHARED_MEMORY, "sh"]
    done = subprocess.run([*own, *command], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert _names(run_dir) == ["step_00000002", "step_00000004"] and _steps(run_dir) == [1, 2, 3, 4]
    assert "no copy of step 1 in /dev/shm/copies" in done.stderr and "not enough space" in done.stderr
    again = subprocess.run([*command, "--train.steps", "5"], capture_output=True, text=True, timeout=250, check=False)
    assert again.returncode == 0 and "resumed from" in again.stderr, "it can be loaded"
