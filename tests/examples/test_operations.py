"""docs/operations.md: all its commands are valid, and its walk to a finished run works on a Slurm cluster of three nodes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.slurm_cluster import SlurmCluster, missing_programs, slurm_cluster

from megatron_mm.cli.command import Command, Group, _run_command
from megatron_mm.cli.main import COMMANDS
from megatron_mm.training.checkpoint import completed_checkpoints

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("operations", "monitoring", "security", "evaluation", "gpu", "moe", "infimm", "mono_internvl", "conversion", "planning")
PROGRAM = r"(?:megatron-mm|-m megatron_mm)"


def blocks(document: str) -> list[str]:
    """Return the indented lines of a document, with continued lines joined and comments removed."""
    text = (ROOT / "docs" / f"{document}.md").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if re.match(r" {4,}\S", line)]
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def commands(document: str) -> list[list[str]]:
    """Return the words of every call of the program, in blocks and in running text."""
    text = (ROOT / "docs" / f"{document}.md").read_text()
    quoted = re.findall(rf"`([^`\n]*{PROGRAM} [^`\n]*)`", text)
    found = []
    for line in [*blocks(document), *quoted]:
        called = re.search(rf"{PROGRAM} ((?:[a-z][a-z-]*)\b.*)", line)
        if called and "..." not in line and ": error" not in line:
            found.append(shlex.split(called[1].partition("&&")[0]))
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_that_is_named_can_be_given(document: str) -> None:
    """Commands are parsed as written, but not run; an upper-case letter is a placeholder. A single word is only a mention."""
    for words in commands(document):
        group: Command | Group = COMMANDS
        rest, names = list(words), []
        while isinstance(group, Group):
            assert rest and rest[0] in group.commands, f"docs/{document}.md: there is no command {' '.join(words)}"
            names.append(rest.pop(0))
            group = group.commands[names[-1]]
        if not rest or any(word.startswith("[") for word in rest):
            continue
        if names[0] in ("eval", "evaluate"):  # their fields depend on a run that does not exist here
            rest = shlex.split(re.sub(r"--\w+\.\S+ \S+", "", shlex.join(rest)))
        rest = ["debug_mm1" if word == "RECIPE" else "1" if re.fullmatch(r"(?!RECIPE)[A-Z]", word) else word for word in rest]
        try:
            _run_command(replace(group, run=lambda given: None), rest, program=" ".join(names))
        except ValueError as error:
            if "neither a complete checkpoint" not in str(error) and "there is no file" not in str(error):
                raise AssertionError(f"docs/{document}.md: {' '.join(words)}: {error}") from None


# ------------------------------------------------------------------------------------------------------------------ the walk


@pytest.fixture
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster(nodes=3, cpus=2) as running:
        yield running


class Account:
    """An account on a cluster: a folder with the repository, in which its user runs commands."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder, self.home = cluster, folder, folder / "megatron_mm"
        self.job = ""
        (self.home / ".venv" / "bin").mkdir(parents=True)
        for name in ("examples", "megatron_mm"):
            (self.home / name).symlink_to(ROOT / name)
        for name, words in (("python", '"$@"'), ("megatron-mm", '-m megatron_mm "$@"')):
            path = self.home / ".venv" / "bin" / name
            path.write_text(f"#!/bin/sh\nexec {sys.executable} {words}\n")
            path.chmod(0o755)

    def types(self, line: str, *, seconds: float = 1200.0) -> str:
        """Run a line of the document, with this cluster's folders and a small run instead of the large one."""
        for written, here in (
            ("/scratch", str(self.folder / "scratch")),
            ("/archive", str(self.folder / "archive")),
            ("/dev/shm/megatron_mm", str(self.folder / "memory")),
            ("examples/mm1_30b.slurm", "examples/debug_mm1.slurm --eval.interval 4"),
            ("NODES=64", "NODES=2"),
            ("--nodes=66", "--nodes=3"),
            ("interval 500", "interval 2 --checkpoint.memory-interval 1 --train.steps 6"),
            ("keep-every 10000", "keep-every 4"),
            ("--train.steps 50", "--train.steps 16 --checkpoint.interval 1 --eval.interval 0"),
            ("mm1_30b", "large"),
            ("plan large", "plan mm1_30b"),
            ("JOB", self.job),
            ("tail -f", "tail -n 3"),
        ):
            line = line.replace(written, here)
        if "sbatch" in line:
            line += " --monitor.wandb disabled"
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            line, shell=True, cwd=self.home, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        submitted = re.search(r"Submitted batch job (\d+)", done.stdout)
        self.job = submitted[1] if submitted else self.job
        return done.stdout

    def wait(self, what: str, *, seconds: float = 1200.0) -> None:
        """Wait until the job has this state, or number of restarts."""
        deadline = time.monotonic() + seconds
        while what not in (self.cluster.state(self.job), f"restarts {self.cluster.job(self.job)['Restarts']}"):
            assert time.monotonic() < deadline, (self.home / f"slurm-{self.job}.out").read_text()
            time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}")
def test_the_walk_from_an_empty_account_to_a_finished_run(cluster: SlurmCluster, tmp_path: Path) -> None:
    lines = [line for line in blocks("operations") if re.search(r"megatron-mm|sbatch|scancel|squeue|tail -f|srun", line)]
    account, typed = Account(cluster, tmp_path), 0
    for line in lines:
        if "git clone" in line:
            continue
        if "scancel" in line:
            path, deadline = tmp_path / "scratch" / "runs" / "try" / "metrics.jsonl", time.monotonic() + 1200
            while not path.exists() or len(path.read_text().splitlines()) < 3:
                assert time.monotonic() < deadline and cluster.state(account.job) in ("PENDING", "RUNNING")
                time.sleep(0.2)
        if "watch" in line:  # once it has begun
            path, deadline = tmp_path / "scratch" / "runs" / "large" / "metrics.jsonl", time.monotonic() + 1200
            while not path.exists():
                assert time.monotonic() < deadline and cluster.state(account.job) in ("PENDING", "RUNNING")
                time.sleep(0.2)
        said = account.types(line)
        typed += 1
        if "scancel" in line:
            account.wait("restarts 1")
            account.wait("COMPLETED")
        if "watch" in line:
            account.wait("COMPLETED")
            assert "6 of 6 steps" in said and "end: all 6 steps are done" in said
        if "--dry-run" in line:
            assert "parameters" in said
    assert typed == len(lines) - sum("git clone" in line for line in lines) and typed >= 12
    tried = [json.loads(line)["step"] for line in (tmp_path / "scratch" / "runs" / "try" / "metrics.jsonl").read_text().splitlines()]
    assert tried == list(range(1, 17)), "stopped, put back into the queue, and resumed"
    assert [path.name for path in completed_checkpoints(tmp_path / "scratch" / "runs" / "large")][-1] == "step_00000006"
    assert len(list((tmp_path / "archive" / "large").glob("step_*/manifest.json"))) >= 1
    assert (tmp_path / "scratch" / "export" / "model.safetensors").is_file()
