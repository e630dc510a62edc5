"""The command line under the real torchrun: SIGTERM to torchrun ends the run with a checkpoint, and the next start resumes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mm.run.hooks import STOPPED_FILE
from megatron_mm.run.lock import _start_of
from megatron_mm.training.checkpoint import completed_checkpoints

TIMEOUT = 120
"""Time limit of each start, in seconds; it takes about 15 on two cores."""


def _train_command(data: Path, run_dir: Path, *, steps: int, pipeline: int) -> list[str]:
    options = {
        "--run-dir": run_dir,
        "--data.path": data,
        "--train.steps": steps,
        "--train.global-batch-size": 2,
        "--train.micro-batch-size": 1,
        "--data.sequence-length": 64,
        "--parallel.pipeline": pipeline,
        "--eval.interval": 0,
        "--monitor.wandb": "disabled",
    }
    return ["-m", "megatron_mm", "train", "debug_mm1", *(str(word) for option in options.items() for word in option)]


class Torchrun:
    """torchrun with two processes; all are killed at the end of the context."""

    def __init__(self, command: list[str], *, metrics: Path, log: Path) -> None:
        self.metrics, self.log = metrics, log
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(TIMEOUT)}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*launcher, *command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environment}
            )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *exc: object) -> None:
        pids = [self.process.pid, *_children(self.process.pid)]
        for pid in pids:  # torchrun makes each of its processes the leader of a session
            for kill in (os.killpg, os.kill):
                try:
                    kill(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue
        self.process.wait()

    def wait_for_steps(self, count: int) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not self.metrics.is_file() or len(self.metrics.read_text().splitlines()) < count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            pytest.fail(f"torchrun did not end:\n{self.log.read_text()}")


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_with_a_checkpoint_and_the_next_start_goes_on(demo_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = _train_command(demo_data, run_dir, steps=1000, pipeline=2)
    with Torchrun(command, metrics=run_dir / "metrics.jsonl", log=tmp_path / "log") as torchrun:
        torchrun.wait_for_steps(3)
        torchrun.process.send_signal(signal.SIGTERM)
        code = torchrun.wait()
    done = _steps(run_dir)
    last = len(done)
    assert done == list(range(1, last + 1)) and 3 <= last < 1000, torchrun.log.read_text()
    assert code == 1, "torchrun's own code after a signal, whatever its processes return"
    assert [path.name for path in completed_checkpoints(run_dir)] == [f"step_{last:08d}"]
    assert (run_dir / STOPPED_FILE).read_text() == f"stopped after step {last} of 1000 on SIGTERM\n"

    subprocess.run([sys.executable, *_train_command(demo_data, run_dir, steps=last + 2, pipeline=1)], check=True, timeout=TIMEOUT)
    assert _steps(run_dir) == list(range(1, last + 3))
    assert completed_checkpoints(run_dir)[-1].name == f"step_{last + 2:08d}"
    assert not (run_dir / STOPPED_FILE).exists()


@pytest.mark.slow
def test_processes_whose_torchrun_is_killed_stop_with_a_checkpoint(demo_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Torchrun(
        _train_command(demo_data, run_dir, steps=1000, pipeline=2), metrics=run_dir / "metrics.jsonl", log=tmp_path / "log"
    ) as torchrun:
        torchrun.wait_for_steps(3)
        workers = _children(torchrun.process.pid)
        torchrun.process.kill()
        try:
            deadline = time.monotonic() + TIMEOUT
            while any(_start_of(worker) is not None for worker in workers):
                assert time.monotonic() < deadline, torchrun.log.read_text()
                time.sleep(0.1)
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker, signal.SIGKILL)
    last = len(_steps(run_dir))
    assert (run_dir / STOPPED_FILE).read_text() == f"stopped after step {last} of 1000 on the end of its launcher\n"
    assert [path.name for path in completed_checkpoints(run_dir)] == [f"step_{last:08d}"]
    assert not (run_dir / "running.lock").exists()


def _steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
