"""The scripts on a real Slurm: two nodes, a stop by signal, the requeue, and the resume. Skipped where Slurm is not installed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, missing_programs, slurm_cluster

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster(nodes=2, cpus=2) as running:
        yield running


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s until {what}"
        time.sleep(0.2)


def submit(
    cluster: SlurmCluster, run_dir: Path, *arguments: str, script: str = "debug_mm1", data: Path, options: tuple[str, ...] = ()
) -> str:
    output = f"--output={run_dir.parent / 'job.out'}"
    return cluster.run(
        *("sbatch", "--parsable", f"--chdir={ROOT}", output, *options, str(ROOT / "examples" / f"{script}.slurm"), *arguments),
        **{"DATA": str(data), "RUN_DIR": str(run_dir), "PYTHON": sys.executable, "MEGATRON_MM_HOME": str(ROOT)},
    )


def steps(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def output(run_dir: Path) -> str:
    return (run_dir.parent / "job.out").read_text()


def test_a_job_stops_on_a_signal_is_requeued_and_goes_on(cluster: SlurmCluster, demo_data: Path, tmp_path: Path) -> None:
    run_dir, last = tmp_path / "run", 16
    settings = ("--train.steps", str(last), "--checkpoint.interval", "1", "--eval.interval", "0", "--monitor.wandb", "disabled")
    job = submit(cluster, run_dir, *settings, data=demo_data)
    wait_until(lambda: len(steps(run_dir)) >= 3 or cluster.state(job) == "FAILED", "the first steps are done")
    assert cluster.state(job) == "RUNNING", output(run_dir)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "the job is requeued")
    stopped_after = len(steps(run_dir))
    assert stopped_after < last
    wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the job ends")
    assert cluster.state(job) == "COMPLETED", output(run_dir)
    assert steps(run_dir) == list(range(1, last + 1))
    assert f"stopped after step {stopped_after} of {last} on SIGUSR1: back into the queue" in output(run_dir)
    assert "attempt 2: debug_mm1 on 2 nodes x 1 processes" in output(run_dir)
    logs = [f"job-{job}-attempt-{attempt}-node-{node}.log" for attempt in (1, 2) for node in (0, 1)]
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == logs


def test_a_mistake_fails_the_job_with_its_message(cluster: SlurmCluster, demo_data: Path, tmp_path: Path) -> None:
    """The script of a GPU recipe on one node without GPUs: options of sbatch override those of the script."""
    options = ("--nodes=1", "--gpus-per-node=0")
    job = submit(cluster, tmp_path / "run", "--train.stepz", "3", script="mm1_1b", data=demo_data, options=options)
    wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the job ends")
    assert cluster.state(job) == "FAILED" and cluster.job(job)["Restarts"] == "0"
    assert "exit code 1: megatron-mm: error: unknown option --train.stepz: did you mean --train.steps?" in output(tmp_path / "run")
