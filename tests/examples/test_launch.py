"""launch.sh without Slurm and training: what it starts, how it forwards signals, and when it requeues."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support.stand_in_slurm import ROOT, Cluster, stand_in_cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return stand_in_cluster(tmp_path, script="mm1_1b")


def after(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_every_node_starts_one_torchrun_that_knows_its_rank_and_where_to_meet(cluster: Cluster) -> None:
    code, out, err = cluster.run("--train.steps", "5", "--monitor.run-name", "two words")
    assert (code, err) == (0, "")
    assert "mm1_1b on 2 nodes x 8 processes, meeting at 10.0.0.7:15077" in out and "the run is done" in out
    words = cluster.called("training")
    for option in ("--nnodes=2", "--nproc-per-node=8", "--master-addr=10.0.0.7", "--master-port=15077", "--node-rank=1"):
        assert option in words
    module = words.index("megatron_mm")
    assert words[module - 1 : module + 3] == ["-m", "megatron_mm", "train", "mm1_1b"]
    assert after(words, "--run-dir") == str(cluster.folder / "run") and after(words, "--data.path") == str(cluster.folder)
    assert words[-4:] == ["--train.steps", "5", "--monitor.run-name", "two words"]
    options = cluster.called("srun")
    for option in ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=96", "--kill-on-bad-exit=1"):
        assert option in options
    assert not any("container" in option for option in options)


def test_what_is_set_already_is_kept(cluster: Cluster) -> None:
    given = {"NCCL_DEBUG": "INFO", "MASTER_PORT": "2222", "PROCESSES_PER_NODE": "3", "SLURM_CPUS_PER_TASK": "4"}
    assert cluster.run(**given)[0] == 0
    environment = cluster.called("environment")
    assert "NCCL_DEBUG=INFO" in environment and "CUDA_DEVICE_MAX_CONNECTIONS=1" in environment
    words = cluster.called("training")
    assert "--master-port=2222" in words and "--nproc-per-node=3" in words
    assert "--cpus-per-task=4" in cluster.called("srun")


def test_a_container_gets_code_data_and_run_directory(cluster: Cluster) -> None:
    assert cluster.run(CONTAINER_IMAGE="image.sqsh", CONTAINER_MOUNTS="/scratch:/scratch")[0] == 0
    options = cluster.called("srun")
    run_dir = cluster.folder / "run"
    mounts = f"{ROOT}:{ROOT},{cluster.folder}:{cluster.folder},{run_dir}:{run_dir},/scratch:/scratch"
    assert "--container-image=image.sqsh" in options and f"--container-mounts={mounts}" in options


@pytest.mark.parametrize(
    ("training", "code", "requeued"),
    [
        ("", 0, []),
        ('echo "stopped after step 3 of 9 on SIGUSR1" > "$RUN_DIR/stopped_early.txt"', 0, ["77"]),
        ("exit 1", 1, []),
        ('mkdir -p "$RUN_DIR/checkpoints/.partial-step_00000002-1234"; exit 1', 1, []),
        ('mkdir -p "$RUN_DIR/checkpoints/step_00000002"; exit 1', 0, ["77"]),
    ],
    ids=["done", "stopped early", "failed at once", "failed in its first save", "failed after progress"],
)
def test_a_job_is_requeued_while_steps_remain_and_it_makes_progress(
    cluster: Cluster, training: str, code: int, requeued: list[str]
) -> None:
    cluster.training(training)
    assert cluster.run()[0] == code
    assert cluster.called("requeue") == requeued


def test_the_reason_of_a_failure_is_found_in_the_logs(cluster: Cluster) -> None:
    cluster.training(
        'log=$RUN_DIR/logs/job-77-attempt-3-node; echo "06:00:00 INFO step 1" > $log-0.log\n'
        'printf "%s\\n" "Traceback" "megatron-mm: error: [rank 9] no such thing" "a.b.ChildFailedError: " "a table" > $log-1.log; exit 3'
    )
    code, _, err = cluster.run(SLURM_RESTART_COUNT="2")
    assert code == 3
    assert "exit code 3: megatron-mm: error: [rank 9] no such thing\n" in err and "see " in err.splitlines()[1]


def test_a_cluster_that_does_not_requeue_is_reported(cluster: Cluster) -> None:
    (cluster.folder / "refuse").touch()
    cluster.training('touch "$RUN_DIR/stopped_early.txt"')
    code, _, err = cluster.run()
    assert code == 2 and "this cluster does not requeue job 77: submit the same command again to resume" in err


def test_a_signal_to_the_job_is_passed_on_to_its_step_until_that_has_stopped(cluster: Cluster) -> None:
    """The stand-in for training ignores the first signal, as real training does while it is still loading."""
    cluster.training(
        'while [ "$(wc -l < "$CALLS/scancel" 2>/dev/null || echo 0)" -lt 2 ]; do sleep 0.02; done\n'
        'echo "stopped after step 3 of 9 on SIGUSR1" > "$RUN_DIR/stopped_early.txt"'
    )
    process = cluster.start(RESEND_SECONDS="0.1")
    deadline = time.monotonic() + 20
    while not cluster.called("environment") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGUSR1)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "asking the run to stop with a checkpoint" in out
    assert "stopped after step 3 of 9 on SIGUSR1: back into the queue" in out
    assert set(cluster.called("scancel")) == {"--signal=USR1 77.0"}
    assert cluster.called("requeue") == ["77"]


def test_scripts_say_where_to_submit_from(cluster: Cluster) -> None:
    code, _, err = cluster.run(SLURM_SUBMIT_DIR="/nowhere")
    assert code == 2
    assert err == ("error: there is no /nowhere/examples/launch.sh: submit from the repository's root, or set MEGATRON_MM_HOME to it\n")
