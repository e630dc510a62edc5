"""Stand-ins for Slurm's programs: small scripts for jobs that run without Slurm and without training."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

SRUN = """
for word in "$@"; do echo "$word"; done > "$CALLS/srun"
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=1 PATH="$BIN:$PATH" "$@"
"""
"""Records its arguments and runs the command as the second node would."""
TRAINING = 'for word in "$@"; do echo "$word"; done > "$CALLS/training"; env > "$CALLS/environment"\n'
SCONTROL = """
case $1 in
  show) if [ "$2" = hostnames ]; then echo n1; echo n2; else echo "NodeName=$3 NodeAddr=10.0.0.7 NodeHostName=$3"; fi ;;
  requeue) echo "$2" >> "$CALLS/requeue"; [ ! -f "$CALLS/refuse" ] ;;
esac
"""
SCANCEL = 'echo "$@" >> "$CALLS/scancel"\n'
SQUEUE = "echo 2-00:00:00\n"
SBATCH = """
[ ! -f "$CALLS/closed" ] || { echo "sbatch: error: no" >&2; exit 1; }
{ echo "sbatch"; for word in "$@"; do echo "$word"; done; env | grep -E '^(STAGE|CHAIN|RUN_DIR|DATA_|SLURM_|PWD)'; } >> "$CALLS/sbatch"
echo "$((100 + $(grep -c '^sbatch$' "$CALLS/sbatch")));federation"
"""
"""Records its arguments and environment and numbers jobs from 101 on; fails if the cluster is closed."""


@dataclass
class Cluster:
    """Stand-ins for Slurm's programs that record their calls."""

    folder: Path
    script: str

    def training(self, body: str) -> None:
        """Set the bash code of the stand-in for training; RUN_DIR and CALLS are set in it."""
        path = self.folder / "bin" / "train-here"
        path.write_text(f"#!/bin/bash\n{TRAINING}{body}\n")
        path.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        job = {
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "96",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_GPUS_ON_NODE": "8",
        }
        own = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "CALLS": str(self.folder),
            "BIN": str(self.folder / "bin"),
            "PYTHON": "train-here",
            "DATA": str(self.folder),
            "RUN_DIR": str(self.folder / "run"),
        }
        command = ["bash", str(ROOT / "examples" / f"{self.script}.slurm"), *arguments]
        settings = {**own, **job, **environment}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings, cwd=self.folder)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Run a whole job; return its exit code, output and errors."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def called(self, program: str) -> list[str]:
        """Return the recorded lines: for srun and training one per argument, for the others one or more per call."""
        path = self.folder / program
        return path.read_text().splitlines() if path.exists() else []


def stand_in_cluster(folder: Path, *, script: str) -> Cluster:
    """Make a cluster whose programs are in `folder` and whose training ends at once.

    Args:
        script: name of the Slurm script to run, without its suffix.
    """
    (folder / "bin").mkdir()
    programs = {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "squeue": SQUEUE, "sbatch": SBATCH}
    for name, body in programs.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)
    made = Cluster(folder, script)
    made.training("")
    return made
