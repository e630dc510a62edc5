"""A process that hangs or dies is detected and named, and all processes end; under the real torchrun with four processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import support.faulty

from megatron_mm.run.incident import Here, Standing, report
from megatron_mm.training.checkpoint import completed_checkpoints

TIMEOUT = 400
"""Time limit of each start, in seconds; it takes about 40 on two idle cores."""

pytestmark = pytest.mark.timeout(2 * TIMEOUT + 60)
OPTIONS = {
    "--train.global-batch-size": "4",
    "--data.sequence-length": "64",
    "--parallel.tensor": "2",
    "--parallel.pipeline": "2",
    "--eval.interval": "0",
    "--checkpoint.interval": "2",
    "--monitor.wandb": "disabled",
    "--extra-hooks": f"{support.faulty.__file__}:Faulty",
}


@dataclass
class Ended:
    """A run that has ended."""

    code: int
    log: str
    seconds: float
    """Seconds from the fault to the end."""

    @property
    def said(self) -> list[str]:
        return [line for line in self.log.splitlines() if "megatron-mm: error:" in line]


def train(data: Path, run_dir: Path, fault: str, *, steps: int, restarts: int = 0, watchdog: float = 8) -> Ended:
    """Run torchrun to its end and kill all remaining processes."""
    options = {**OPTIONS, "--run-dir": run_dir, "--data.path": data, "--train.steps": steps, "--train.watchdog": watchdog}
    command = ["-m", "megatron_mm", "train", "debug_mm1", *(str(word) for option in options.items() for word in option)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", str(restarts)]
    once = run_dir.parent / "fault"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "FAULT": fault,
        "FAULT_ONCE": str(once),
        "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{Path(__file__).parents[1]}",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",
    }
    with (run_dir.parent / "log").open("w") as output:
        process = subprocess.Popen([*launcher, *command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        try:
            code = process.wait(timeout=TIMEOUT)
        finally:
            for pid in [process.pid, *_workers(run_dir)]:
                for kill in (os.killpg, os.kill):
                    try:
                        kill(pid, signal.SIGKILL)
                    except (ProcessLookupError, PermissionError):
                        continue
            process.wait()
    log = (run_dir.parent / "log").read_text()
    return Ended(code, log, time.time() - once.stat().st_mtime if once.exists() else 0.0)


def _workers(run_dir: Path) -> list[int]:
    """Return the pids of a run's processes that are still alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run_dir).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hang", r"rank 2 \(.*\) hangs in step 3, phase 'Faulty'"),
        ("loader", r"rank 0 \(.*\) hangs in step 4, phase 'wait for data' .*last collective \w+ of \d processes, number \d+ \(returned\)"),
        (
            "collective",
            r"all wait for one another, and rank 1 \(.*\) is apart from the others, in step 3, phase 'Faulty'.*last collective barrier",
        ),
        ("stop", r"rank 3 \(.*, process \d+\) has ended, or stopped responding"),
    ],
)
def test_a_process_that_hangs_is_named_and_all_end(kind: str, expected: str, demo_data: Path, tmp_path: Path) -> None:
    rank = {"hang": 2, "loader": 0, "collective": 1, "stop": 3}[kind]
    ended = train(demo_data, tmp_path / "run", f"{kind} {rank} 3", steps=1000)
    assert ended.code == 1, "torchrun's own"
    (said,) = ended.said
    assert re.search(rf"no progress for \d+ s in step \d: {expected}", said), said
    assert "exitcode  : 75" in ended.log
    (incident,) = (tmp_path / "run" / "watchdog").iterdir()
    assert (incident / "report.txt").read_text().startswith("no progress for")
    for number in range(4):
        assert (incident / f"rank-0000{number}.stacks").exists() or (kind == "stop" and number == rank), sorted(incident.iterdir())
    assert "most recent call first" in (incident / "rank-00001.stacks").read_text()


@pytest.mark.slow
def test_a_killed_process_ends_all_soon_and_a_restart_loses_the_steps_since_the_last_checkpoint(demo_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = train(demo_data, run_dir, "kill 2 5", steps=1000)
    assert ended.seconds < 30
    (said,) = ended.said
    assert re.search(r"contact with other processes was lost in step \d: .*rank 2 \(.*, process \d+\) ha(s|ve) ended", said), said
    assert "megatron_mm/run/start.py" not in ended.log, "a traceback says less than the message"
    newest = completed_checkpoints(run_dir)[-1].name
    assert newest in ("step_00000002", "step_00000004"), "the second may have been under way"
    again = train(demo_data, run_dir, "kill 2 5", steps=7)
    assert again.code == 0 and "resumed from" in again.log and newest in again.log
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
def test_torchrun_restarts_the_processes_within_the_job(demo_data: Path, tmp_path: Path) -> None:
    ended = train(demo_data, tmp_path / "run", "hang 1 5", steps=7, restarts=1)
    assert ended.code == 0, ended.log
    assert "rank 1 (" in ended.said[0] and "resumed from" in ended.log
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert not (tmp_path / "run" / "running.lock").exists()


def _standing(rank: int, *frames: str, phase: str = "optimizer", count: int = 7, problem: str = "") -> Standing:
    return Standing(
        rank=rank,
        host="node1",
        pid=100 + rank,
        step=5,
        phase=phase,
        seconds=30.0,
        since=1000.0 - 10 * (rank == 2),
        last_collective=f"barrier of 4 processes, number {count}",
        frames=list(frames),
        problem=problem,
    )


def test_who_is_to_blame_as_far_as_can_be_told() -> None:
    waiting, folder = "torch/distributed/distributed_c10d.py:2 all_reduce", Path("watchdog")
    hangs = report([_standing(0, waiting), _standing(1, "data/load/loader.py:1 __next__"), _standing(2, waiting)], [], folder=folder)
    assert hangs.startswith("no progress for 30 s in step 5: rank 1 (node1, process 101) hangs in step 5, phase 'optimizer' (data/load")
    assert "  ranks 0, 2: step 5, optimizer; last collective" in hangs
    odd = report([_standing(rank, waiting, phase="hook" if rank == 2 else "optimizer") for rank in range(4)], [], folder=folder)
    assert "all wait for one another, and rank 2 (node1, process 102) is apart from the others, in step 5" in odd
    halves = report([_standing(rank, waiting, phase="hook" if rank >= 2 else "optimizer") for rank in range(4)], [], folder=folder)
    assert "all wait for one another, and rank 2 (node1, process 102) has waited longest, in step 5" in halves
    alike = report([_standing(rank, waiting) for rank in range(2)], [], folder=folder)
    assert "the network or a device does not respond" in alike
    lost = report([_standing(0, waiting, problem="Connection closed by peer")], [Here(1, "node2", 7)], folder=folder)
    assert lost.startswith("contact with other processes was lost in step 5: rank 1 (node2, process 7) has ended\n")
    assert "  the error of rank 0 (node1, process 100): Connection closed by peer" in lost
