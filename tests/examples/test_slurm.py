"""The Slurm scripts: what they start, their errors if something is missing, and a run through them on two stand-in nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import RECIPES, get_recipe

ROOT = Path(__file__).parents[2]
EVALUATE = ROOT / "examples" / "evaluate.slurm"
SCRIPTS = sorted(set((ROOT / "examples").glob("*.slurm")) - {EVALUATE})
JOB = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_ON_NODE": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_SUBMIT_DIR": str(ROOT),
}


def start(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "DATA", "RUN_DIR"))}
    command = ["bash", str(script), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=ROOT, env={**clean, "PYTHON": sys.executable, **environment}
    )


def recipes_of(script: Path) -> list[Experiment]:
    """Return the recipe that a script trains, or the recipes of its chain of stages, from its last line."""
    last = script.read_text().splitlines()[-1]
    if last == f'exec "$launch" {script.stem} "$@"':
        return [get_recipe(script.stem)]
    stages = re.fullmatch(rf'exec "\$chain" {script.stem} "([\w ]+)" "\$@"', last)
    assert stages, f"{script.name} ends with {last}"
    return [get_recipe(f"{script.stem}_{stage}") for stage in stages[1].split()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_sound_and_their_nodes_fit_the_recipe(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    text = script.read_text()
    assert f"--job-name={script.stem}\n" in text
    nodes = int(re.search(r"--nodes=(\d+)", text)[1])  # type: ignore[index]
    per_node = re.search(r"--gpus-per-node=(\d+)", text)
    for recipe in recipes_of(script) if per_node else []:
        world_size = nodes * int(per_node[1])  # type: ignore[index]
        assert recipe.num_micro_batches(recipe.parallel.data_parallel_size(world_size)) % recipe.parallel.pipeline == 0
        assert recipe.parallel.tensor <= int(per_node[1]), "tensor parallelism stays inside a node"  # type: ignore[index]
    for option in ("--requeue", "--signal=B:USR1@", "--open-mode=append"):
        assert f"#SBATCH {option}" in text


def test_a_chain_has_all_stages_of_its_model() -> None:
    trained = {recipe.recipe for recipe in recipes_of(ROOT / "examples" / "mono_internvl_2b.slurm")}
    assert trained == {name for name in RECIPES if name.startswith("mono_internvl_2b_")}


def test_mm1_30b_asks_for_512_gpus() -> None:
    text = (ROOT / "examples" / "mm1_30b.slurm").read_text()
    assert "#SBATCH --nodes=64\n" in text and "#SBATCH --gpus-per-node=8\n" in text


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "this is not a Slurm job: submit it, for example: sbatch examples/mm1_1b.slurm"),
        (JOB, "DATA is not set: the folder that"),
        ({**JOB, "DATA": "/tmp"}, "RUN_DIR is not set: the run's folder"),
        ({**JOB, "DATA": "/nowhere", "RUN_DIR": "/tmp"}, "DATA=/nowhere is not a folder on"),
    ],
)
def test_what_is_missing_is_said_in_one_line(environment: dict[str, str], message: str) -> None:
    done = start(ROOT / "examples" / "mm1_1b.slurm", **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"launch.sh: error: {message}") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "job", [{}, {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}], ids=["here", "in a job"]
)
def test_a_dry_run_starts_nothing(job: dict[str, str], tmp_path: Path) -> None:
    settings = {**job, "DRY_RUN": "1", "DATA": "/nowhere", "RUN_DIR": str(tmp_path / "run"), "PATH": "/usr/bin:/bin"}
    done = start(ROOT / "examples" / "mm1_30b.slurm", "--train.steps", "5", "--monitor.run-name", "two words", **settings)
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "run").exists()
    train = f"megatron-mm train mm1_30b --run-dir {tmp_path / 'run'} --data.path /nowhere --train.steps 5 --monitor.run-name two\\ words"
    assert f"{'2 nodes x 4' if job else '64 nodes x 8'} processes of: {train}\n" in done.stdout
    assert "note: DATA=/nowhere is not a folder on" in done.stdout and f": {train} --dry-run\n" in done.stdout


@pytest.fixture
def two_nodes(tmp_path: Path) -> str:
    """A PATH with an srun that starts its command locally, once for each of two nodes."""
    programs = {
        "scontrol": 'if [ "$2" = hostnames ]; then echo n1; echo n2; else echo "NodeName=$3 NodeAddr=127.0.0.1 CPUs=2"; fi',
        "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 "$@" & a=$!\nSLURM_NODEID=1 "$@" & b=$!\nwait $a && wait $b',
        "scancel": "exit 0",
    }
    for name, body in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


@pytest.mark.slow
def test_a_run_on_two_nodes(two_nodes: str, demo_data: Path, tmp_path: Path) -> None:
    settings = {**JOB, "PATH": two_nodes, "DATA": str(demo_data), "RUN_DIR": str(tmp_path / "run"), "PROCESSES_PER_NODE": "2"}
    arguments = ("--parallel.tensor", "2", "--train.steps", "2", "--eval.interval", "0", "--monitor.wandb", "disabled")
    done = start(ROOT / "examples" / "debug_mm1.slurm", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    assert "attempt 1: debug_mm1 on 2 nodes x 2 processes, meeting at 127.0.0.1:" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["parallel"]["tensor"] == 2


@pytest.mark.slow
def test_a_mistake_ends_the_job_with_an_error(two_nodes: str, demo_data: Path, tmp_path: Path) -> None:
    settings = {**JOB, "PATH": two_nodes, "DATA": str(demo_data), "RUN_DIR": str(tmp_path / "run"), "PROCESSES_PER_NODE": "1"}
    done = start(ROOT / "examples" / "debug_mm1.slurm", "--parallel.pipeline", "3", **settings)
    assert done.returncode != 0
    assert 1 <= done.stderr.count("megatron-mm: error:") <= 2 and "cannot be divided into groups of" in done.stderr


def test_evaluation_takes_the_checkpoints_that_are_asked_for_and_comes_again(tmp_path: Path) -> None:
    """Each is evaluated once; a checkpoint without its manifest is not complete."""
    run_dir, programs, log = tmp_path / "run", tmp_path / "bin", tmp_path / "log"
    for step in (10, 20, 30, 40):
        (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    for step in (10, 20, 30):
        (run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").write_text("{}")
    programs.mkdir()
    for name, body in {"srun": "", "sbatch": "", "squeue": "echo 12", "scontrol": "echo n1"}.items():
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{log}\n{body}\n')
        (programs / name).chmod(0o755)
    options = {**JOB, "RUN_DIR": str(run_dir), "TASKS": "vqav2,gqa", "SHOTS": "0 4", "EVERY": "20", "WATCH": "12"}
    options["PATH"] = f"{programs}:{os.environ['PATH']}"
    done = start(EVALUATE, "--limit", "5", **options)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    (ran,) = [line for line in lines if line.startswith("srun")]
    assert f"evaluate {run_dir}/checkpoints/step_00000020 --tasks vqav2,gqa --shots 0 4 --limit 5" in ran
    assert any(line.startswith("sbatch --begin=now+60minutes") for line in lines)
    start(EVALUATE, "--limit", "5", **options)
    assert log.read_text().count("srun") == 1
    start(EVALUATE, **options)
    assert log.read_text().count("srun") == 2, "without --limit it is another evaluation"
    newest = {name: value for name, value in options.items() if name not in ("EVERY", "WATCH")}
    start(EVALUATE, **newest)
    assert "step_00000030" in log.read_text().splitlines()[-1]
    assert "TASKS is not set" in start(EVALUATE, **JOB, RUN_DIR=str(run_dir)).stderr


def test_a_checkpoint_that_fails_or_is_gone_does_not_end_the_watch(tmp_path: Path) -> None:
    """The second of four fails, and the third is removed meanwhile, as by a training run that keeps only the newest checkpoints."""
    run_dir, programs, log = tmp_path / "run", tmp_path / "bin", tmp_path / "log"
    for step in (10, 20, 30, 40):
        (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        (run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").write_text("{}")
    programs.mkdir()
    fails = f"case $* in *step_00000020*) rm -r {run_dir}/checkpoints/step_00000030; exit 1;; esac"
    for name, body in {"srun": fails, "sbatch": "", "squeue": "echo 12", "scontrol": "echo n1"}.items():
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{log}\n{body}\n')
        (programs / name).chmod(0o755)
    options = {**JOB, "RUN_DIR": str(run_dir), "TASKS": "vqav2", "EVERY": "10", "WATCH": "12", "PATH": f"{programs}:{os.environ['PATH']}"}
    done = start(EVALUATE, **options)
    assert done.returncode == 1
    assert "step_00000020 could not be evaluated" in done.stdout and "step_00000030 was removed by the training" in done.stdout
    lines = log.read_text().splitlines()
    assert sum(line.startswith("srun") for line in lines) == 3 and lines[-1].startswith("sbatch --begin=now+60minutes")
    start(EVALUATE, **options)
    again = [line for line in log.read_text().splitlines()[len(lines) :] if line.startswith("srun")]
    assert len(again) == 1 and "step_00000020" in again[0], "the one that failed is tried again"
