"""chain.sh without Slurm and training: its submissions, the initial weights of every stage, and its errors."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from support.stand_in_slurm import ROOT, Cluster, stand_in_cluster

from megatron_mm.families.recipes import RECIPES, get_recipe

NAME = "mono_internvl_2b"
SCRIPT = ROOT / "examples" / f"{NAME}.slurm"
STAGES = ("s1_1", "s1_2", "s1_3", "s2")
BEGIN = ("--init-from", "/imported/internlm2")


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return stand_in_cluster(tmp_path, script=NAME)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """DATA_* of every stage, each with its own folder."""
    folders = {f"DATA_{stage.upper()}": tmp_path / f"data_{stage}" for stage in STAGES}
    for folder in folders.values():
        folder.mkdir()
    return {name: str(folder) for name, folder in folders.items()}


def submissions(cluster: Cluster) -> list[list[str]]:
    """Return arguments and environment of each call of sbatch."""
    calls: list[list[str]] = []
    for word in cluster.called("sbatch"):
        if word == "sbatch":
            calls.append([])
        else:
            calls[-1].append(word)
    return calls


def trained(cluster: Cluster) -> list[str]:
    """Return the words of the training command after `train`."""
    words = cluster.called("training")
    return words[words.index("train") + 1 :]


def dry_run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    settings = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, env=settings, check=False)


def test_the_first_stage_runs_and_every_other_waits_for_the_one_before(cluster: Cluster, data: dict[str, str]) -> None:
    code, out, err = cluster.run(*BEGIN, "--monitor.run-name", "two words", **data)
    assert (code, err) == (0, "")
    runs, words = cluster.folder / "run", trained(cluster)
    assert words[0] == f"{NAME}_s1_1" and words[-4:] == [*BEGIN, "--monitor.run-name", "two words"]
    assert words[words.index("--run-dir") + 1] == str(runs / "s1_1") and words[words.index("--data.path") + 1] == data["DATA_S1_1"]
    calls = submissions(cluster)
    assert len(calls) == 3
    for stage, after, call in zip(STAGES[1:], ("77", "101", "102"), calls, strict=True):
        assert {f"STAGE={stage}", "CHAIN=no", f"RUN_DIR={runs}", f"DATA_{stage.upper()}={data[f'DATA_{stage.upper()}']}"} <= set(call)
        assert {f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes", f"--job-name={NAME}_{stage}"} <= set(call)
        script = call.index(str(SCRIPT))
        assert call[script + 1 : script + 3] == ["--monitor.run-name", "two words"] and "--init-from" not in call
        assert f"--output={runs / stage / 'logs' / 'slurm-%j.out'}" in call and (runs / stage / "logs").is_dir()
        assert f"PWD={ROOT}" in call, "a relative path means the same to all stages"
        assert not any(word.startswith("SLURM_") for word in call), "what describes this job is not the next one's"
    assert "stage s1_2 is job 101 and begins when job 77 is done" in out


@pytest.mark.parametrize(("stage", "before"), [("s1_2", "s1_1"), ("s1_3", "s1_2"), ("s2", "s1_3")])
def test_a_later_stage_begins_with_the_one_before_and_may_run_alone(
    cluster: Cluster, data: dict[str, str], stage: str, before: str
) -> None:
    assert cluster.run("--train.steps", "5", STAGE=stage, CHAIN="no", **data)[0] == 0
    words = trained(cluster)
    assert words[0] == f"{NAME}_{stage}" and words[-4:] == ["--init-from", str(cluster.folder / "run" / before), "--train.steps", "5"]
    assert not submissions(cluster)


def test_a_chain_may_begin_in_the_middle_with_other_weights(cluster: Cluster, data: dict[str, str]) -> None:
    del data["DATA_S1_1"], data["DATA_S1_2"]
    assert cluster.run("--init-from=/released", STAGE="s1_3", **data)[0] == 0
    assert trained(cluster)[-2:] == ["--init-from", "/released"]
    assert [next(word for word in call if word.startswith("STAGE=")) for call in submissions(cluster)] == ["STAGE=s2"]


def test_the_others_ask_for_what_this_job_was_given(cluster: Cluster, data: dict[str, str]) -> None:
    given = {"SLURM_JOB_PARTITION": "big", "SLURM_JOB_ACCOUNT": "mm", "SLURM_JOB_QOS": "high", "SLURM_GPUS_PER_NODE": "4"}
    assert cluster.run(*BEGIN, **data, **given)[0] == 0
    wanted = {"--nodes=2", "--time=2-00:00:00", "--partition=big", "--account=mm", "--qos=high", "--gpus-per-node=4"}
    assert all(wanted <= set(call) for call in submissions(cluster))


def test_a_requeued_stage_submits_nothing_twice(cluster: Cluster, data: dict[str, str]) -> None:
    assert cluster.run(*BEGIN, **data)[0] == 0
    assert cluster.run(*BEGIN, **data, SLURM_RESTART_COUNT="1")[0] == 0
    assert len(submissions(cluster)) == 3
    assert trained(cluster)[0] == f"{NAME}_s1_1"
    assert cluster.run(*BEGIN, **data, SLURM_JOB_ID="78")[0] == 0
    assert len(submissions(cluster)) == 6, "the same command once more is another chain"


def test_a_chain_that_was_cut_off_is_completed(cluster: Cluster, data: dict[str, str]) -> None:
    """After a node failure between two submissions, the restart submits the rest."""
    record = cluster.folder / "run" / "s1_1" / "logs" / "job-77-submitted.txt"
    record.parent.mkdir(parents=True)
    record.write_text("s1_2 55\n")
    assert cluster.run(*BEGIN, **data, SLURM_RESTART_COUNT="1")[0] == 0
    calls = submissions(cluster)
    assert len(calls) == 2 and "--dependency=afterok:55" in calls[0] and "--dependency=afterok:101" in calls[1]


def test_a_cluster_where_jobs_cannot_submit_says_what_to_do(cluster: Cluster, data: dict[str, str]) -> None:
    (cluster.folder / "closed").touch()
    code, _, err = cluster.run(*BEGIN, **data)
    assert code == 2 and not cluster.called("training")
    assert "chain.sh: error: stage s1_2 cannot be submitted from here: use CHAIN=no, and submit what DRY_RUN=1 prints" in err


def test_one_recipe_for_all_stages_gets_their_policies(cluster: Cluster, data: dict[str, str]) -> None:
    assert cluster.run(STAGE="s1_3", CHAIN="no", RECIPE="debug_mono_internvl", **data)[0] == 0
    words = trained(cluster)
    assert words[0] == "debug_mono_internvl" and words[words.index("--train.freeze-policy") + 1] == "s1_3"


@pytest.mark.parametrize("script", ["infimm_zephyr_7b", "infimm_llama_13b", "infimm_vicuna_13b"])
def test_infimm_s_stages_are_a_chain_too(script: str, tmp_path: Path) -> None:
    data = {f"DATA_{stage}": str(tmp_path) for stage in ("PT", "MTT", "IFT")}
    command = ["bash", str(ROOT / "examples" / f"{script}.slurm"), "--init-from", "/imported"]
    settings = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "RUN_DIR": "/runs", **data}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, env=settings, check=True)
    first, second, third = done.stdout.splitlines()
    assert f"examples/launch.sh {script}_pt --init-from /imported" in first
    assert "STAGE=mtt" in second and "--dependency=afterok:JOB_OF_PT" in second
    assert "STAGE=ift" in third and "--dependency=afterok:JOB_OF_MTT" in third
    assert {f"{script}_{stage}" for stage in ("pt", "mtt", "ift")} <= set(RECIPES)


def test_every_stage_s_policy_has_its_name() -> None:
    assert [get_recipe(f"{NAME}_{stage}").train.freeze_policy for stage in STAGES] == list(STAGES)


def test_a_dry_run_prints_commands_that_can_be_pasted(cluster: Cluster, data: dict[str, str], tmp_path: Path) -> None:
    done = dry_run(*BEGIN, "--monitor.run-name", "two words", RUN_DIR=str(tmp_path / "runs with spaces"), **data)
    assert done.returncode == 0 and not done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith("stage s1_1 runs: ") and first.endswith("--init-from /imported/internlm2 --monitor.run-name two\\ words")
    assert len(others) == 3 and not (tmp_path / "runs with spaces").exists()
    for stage, before, line in zip(STAGES[1:], STAGES[:-1], others, strict=True):
        words = shlex.split(line.removeprefix("and submits: "))
        assert words[:2] == ["env", f"STAGE={stage}"] and f"--dependency=afterok:JOB_OF_{before.upper()}" in words
        assert words[-2:] == ["--monitor.run-name", "two words"]


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"STAGE": "s3"}, BEGIN, f"STAGE=s3 is not a stage of {NAME}: choose one of s1_1 s1_2 s1_3 s2"),
        ({"CHAIN": "1"}, BEGIN, "CHAIN=1 is neither yes nor no"),
        ({"RUN_DIR": ""}, BEGIN, "RUN_DIR is not set: the folder of the stages' run directories"),
        ({"DATA_S1_2": ""}, BEGIN, "DATA_S1_2 is not set: the data set of stage s1_2, seen by every node: export DATA_S1_2="),
        ({}, (), "stage s1_1 begins with other weights: add --init-from DIR, as `megatron-mm convert from-hf` has made it"),
        ({}, ("--init-from",), "--init-from needs a checkpoint or a run directory"),
        ({"SLURM_JOB_ID": ""}, BEGIN, f"this is not a Slurm job: submit it, sbatch examples/{NAME}.slurm, or look at it with DRY_RUN=1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    cluster: Cluster, data: dict[str, str], environment: dict[str, str], arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = cluster.run(*arguments, **{**data, **environment})
    assert code == 2 and not cluster.called("training") and not submissions(cluster)
    assert err.startswith(f"chain.sh: error: {message}") and len(err.splitlines()) == 1


def test_data_that_a_later_stage_needs_may_come_later(cluster: Cluster, data: dict[str, str]) -> None:
    Path(data["DATA_S2"]).rmdir()
    code, out, _ = cluster.run(*BEGIN, **data)
    assert code == 0 and f"note: DATA_S2={data['DATA_S2']} is not there yet, and must be when stage s2 starts" in out


def test_scripts_say_where_to_submit_from(cluster: Cluster) -> None:
    code, _, err = cluster.run(SLURM_SUBMIT_DIR="/nowhere")
    assert code == 2
    assert err == "error: there is no /nowhere/examples/chain.sh: submit from the repository's root, or set MEGATRON_MM_HOME to it\n"
