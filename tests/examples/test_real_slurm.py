"""The scripts on a real Slurm cluster of two nodes: a stop by signal, requeuing, resuming, and a chain of stages. Skipped if Slurm is
not installed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.slurm_cluster import SlurmCluster, missing_programs, slurm_cluster

from megatron_mm.conversion.reader import CheckpointReader
from megatron_mm.training.checkpoint import find_checkpoint

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster(nodes=2, cpus=2) as running:
        yield running


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 1200.0) -> None:
    """Wait for a condition. A job that cannot reach it fails by itself; the limit only catches a cluster that hangs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s until {what}"
        time.sleep(0.2)


def submit(
    cluster: SlurmCluster,
    run_dir: Path,
    *arguments: str,
    script: str = "debug_mm1",
    data: Path,
    options: tuple[str, ...] = (),
    **environment: str,
) -> str:
    output = f"--output={run_dir.parent / 'job.out'}"
    return cluster.run(
        *("sbatch", "--parsable", f"--chdir={ROOT}", output, *options, str(ROOT / "examples" / f"{script}.slurm"), *arguments),
        **{"DATA": str(data), "RUN_DIR": str(run_dir), "PYTHON": sys.executable, "MEGATRON_MM_HOME": str(ROOT), **environment},
    )


def ended(cluster: SlurmCluster, job: str) -> bool:
    return cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING")


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
    wait_until(lambda: ended(cluster, job), "the job ends")
    assert cluster.state(job) == "COMPLETED", output(run_dir)
    assert steps(run_dir) == list(range(1, last + 1))
    assert f"stopped after step {stopped_after} of {last} on SIGUSR1: back into the queue" in output(run_dir)
    assert "attempt 2: debug_mm1 on 2 nodes x 1 processes" in output(run_dir)
    logs = [f"job-{job}-attempt-{attempt}-node-{node}.log" for attempt in (1, 2) for node in (0, 1)]
    assert sorted(path.name for path in (run_dir / "logs").glob("*.log")) == logs


def test_a_mistake_fails_the_job_with_its_message(cluster: SlurmCluster, demo_data: Path, tmp_path: Path) -> None:
    """The script of a GPU recipe on one node without GPUs: options of sbatch override those of the script."""
    options = ("--nodes=1", "--gpus-per-node=0")
    job = submit(cluster, tmp_path / "run", "--train.stepz", "3", script="mm1_1b", data=demo_data, options=options)
    wait_until(lambda: ended(cluster, job), "the job ends")
    assert cluster.state(job) == "FAILED" and cluster.job(job)["Restarts"] == "0"
    assert "exit code 2: megatron-mm: error: unknown option --train.stepz: did you mean --train.steps?" in output(tmp_path / "run")


STAGES = ("s1_1", "s1_2", "s1_3", "s2")
ONE_SMALL_NODE = ("--nodes=1", "--gpus-per-node=0", "--time=00:20:00")


def submit_chain(cluster: SlurmCluster, run_dir: Path, *arguments: str, data: Path) -> tuple[str, list[str]]:
    """Submit Mono-InternVL's script with a tiny model; return its job, and the jobs of the later stages once they are submitted."""
    environment = {f"DATA_{stage.upper()}": str(data) for stage in STAGES} | {"RECIPE": "debug_mono_internvl"}
    job = submit(cluster, run_dir, *arguments, script="mono_internvl_2b", data=data, options=ONE_SMALL_NODE, **environment)
    record = run_dir / "s1_1" / "logs" / f"job-{job}-submitted.txt"
    wait_until(lambda: (record.exists() and len(record.read_text().splitlines()) == 3) or ended(cluster, job), "all are submitted")
    return job, [line.split()[1] for line in record.read_text().splitlines()]


def weights(run_dir: Path, part: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's newest checkpoint whose names contain `part`."""
    reader = CheckpointReader(find_checkpoint(run_dir))
    return {name: reader.read(name) for name in reader.names() if part in name}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys() and first
    return all(torch.equal(first[name], second[name]) for name in first)


def test_stages_in_a_chain_begin_with_one_another_and_are_submitted_once(cluster: SlurmCluster, demo_data: Path, tmp_path: Path) -> None:
    """The first stage is stopped and requeued midway, and the others wait until it is done."""
    base, run_dir, last = tmp_path / "base", tmp_path / "runs", 12
    settings = ["--checkpoint.interval", "1", "--eval.interval", "0", "--monitor.wandb", "disabled", "--train.global-batch-size", "4"]
    command = [sys.executable, "-m", "megatron_mm", "train", "debug_mono_internvl", "--run-dir", base, "--data.path", demo_data]
    subprocess.run([*map(str, command), *settings, "--train.steps", "2", "--train.seed", "7"], check=True, timeout=150, cwd=ROOT)

    job, others = submit_chain(cluster, run_dir, "--init-from", str(base), "--train.steps", str(last), *settings, data=demo_data)
    wait_until(lambda: len(steps(run_dir / "s1_1")) >= 2 or ended(cluster, job), "the first steps are done")
    assert cluster.state(job) == "RUNNING", output(run_dir)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "the first stage is requeued")
    assert len(steps(run_dir / "s1_1")) < last
    wait_until(lambda: all(ended(cluster, each) for each in (job, *others)), "all stages end")

    text = (run_dir.parent / "job.out").read_text()
    assert [cluster.state(each) for each in (job, *others)] == ["COMPLETED"] * 4, text
    assert text.count("is job") == 3 and "attempt 2: debug_mono_internvl on 1 nodes" in text, "submitted by the first attempt alone"
    assert len(cluster.run("scontrol", "--oneliner", "show", "jobs").split("JobName=mono_internvl_2b_s")) == 4
    begins = {each: cluster.job(each)["StartTime"] for each in (job, *others)}
    ends = {each: cluster.job(each)["EndTime"] for each in (job, *others)}
    for before, stage, number in zip(STAGES[:-1], STAGES[1:], range(3), strict=True):
        assert steps(run_dir / stage) == list(range(1, last + 1))
        assert begins[others[number]] >= ends[(job, *others)[number]]
        log = (run_dir / stage / "logs" / f"job-{others[number]}-attempt-1-node-0.log").read_text()
        assert f"initialised with the weights of {run_dir / before}/checkpoints/step_{last:08d}" in log
        assert json.loads((run_dir / stage / "config.json").read_text())["train"]["freeze_policy"] == stage
    # Weights that a stage does not train equal its predecessor's, down to the initial weights of the first stage.
    frozen = {".mlp.text.": STAGES[:3], ".self_attention.linear_qkv.": STAGES[:2]}
    for part, stages in frozen.items():
        given = weights(base, part)
        assert all(same(weights(run_dir / stage, part), given) for stage in stages)
        later = STAGES[len(stages)]
        assert not same(weights(run_dir / later, part), given), "that part learns in the next stage"
    assert not same(weights(run_dir / "s1_1", ".mlp.visual."), weights(base, ".mlp.visual."))


def test_a_stage_that_fails_takes_the_later_ones_out_of_the_queue(cluster: SlurmCluster, demo_data: Path, tmp_path: Path) -> None:
    job, others = submit_chain(cluster, tmp_path / "runs", "--init-from", str(tmp_path / "nothing"), data=demo_data)
    wait_until(lambda: all(ended(cluster, each) for each in (job, *others)), "all jobs end")
    assert cluster.state(job) == "FAILED" and "neither a complete checkpoint nor a run directory" in output(tmp_path / "runs")
    assert [cluster.state(each) for each in others] == ["CANCELLED"] * 3


@pytest.fixture
def spare_cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster(nodes=3, cpus=2) as running:
        yield running


def test_an_unfit_node_is_left_out_and_a_failed_run_starts_again_within_the_job(
    spare_cluster: SlurmCluster, demo_data: Path, tmp_path: Path
) -> None:
    """The first of three nodes is unfit; on the other two, a process is killed in step 5."""
    run_dir, python = tmp_path / "run", tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        '[[ "$*" != *"doctor --node"* || $SLURMD_NODENAME != n1 ]] || { echo "n1  BAD  work: a GPU is gone"; exit 1; }\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    settings = ("--train.steps", "8", "--checkpoint.interval", "2", "--eval.interval", "0", "--monitor.wandb", "disabled")
    faulty = ("--extra-hooks", f"{ROOT / 'tests' / 'support' / 'faulty.py'}:Faulty")
    environment = {"NODES": "2", "PYTHON": str(python), "FAULT": "kill 1 5", "FAULT_ONCE": str(tmp_path / "once")}
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    job = submit(spare_cluster, run_dir, *settings, *faulty, data=demo_data, options=("--nodes=3", "--no-kill"), **environment, **path)
    wait_until(lambda: ended(spare_cluster, job), "the job ends")
    said = output(run_dir)
    assert spare_cluster.state(job) == "COMPLETED", said
    assert "node n1 is left out" in said and "on n2 n3" in said
    assert "starting again within the job, 1 of 3" in said and "the run is done" in said
    assert steps(run_dir) == list(range(1, 9))
    logs = "".join(path.read_text() for path in (run_dir / "logs").glob("*-node-*.log"))
    assert "resumed from" in logs
