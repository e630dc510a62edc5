"""Downtime of a failed run when torchrun restarts its processes within the job, compared with the start of a new job.

    python benchmarks/restart_time.py

A run of `debug_mm1` on two processes loses one of them in step 8. Baseline: from the launch of torchrun to the end of the first step (a new
job takes this long plus its wait in the queue). Measured: from the failure to the end of the next step, with the state read from the newest
checkpoint or from the copy in the node's memory. The steps since the checkpoint are repeated; their number is printed separately.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_mm.data.prepare.demo import prepare_demo

ROOT = Path(__file__).parents[1]
FAILS_AFTER, INTERVAL, STEPS = 8, 5, 12


def run(data: Path, folder: Path, *extra: str) -> tuple[float, float, int]:
    """Return seconds from launch to the end of step 1, seconds from failure to the end of the next step, and the steps repeated."""
    run_dir, once = folder / "run", folder / "fault"
    options = {
        "--run-dir": run_dir,
        "--data.path": data,
        "--train.steps": STEPS,
        "--train.global-batch-size": 4,
        "--parallel.tensor": 2,
        "--checkpoint.interval": INTERVAL,
        "--eval.interval": 0,
        "--monitor.wandb": "disabled",
        "--extra-hooks": f"{ROOT / 'tests' / 'support' / 'faulty.py'}:Faulty",
    }
    launcher = [sys.executable, "-m", "megatron_mm.run.launcher", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    words = [*launcher, "-m", "megatron_mm", "train", "debug_mm1", *(str(word) for option in options.items() for word in option), *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "GLOO_SOCKET_IFNAME": "lo"}
    fault = {"FAULT": f"kill 1 {FAILS_AFTER}", "FAULT_ONCE": str(once)}
    launched = time.time()
    with (folder / "log").open("w") as log:
        subprocess.run(words, env={**environment, **fault}, stdout=log, stderr=subprocess.STDOUT, check=True, timeout=900)
    ended = {line["step"]: line["time"] for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())}
    failed = once.stat().st_mtime
    after = min(step for step, seconds in ended.items() if seconds > failed)
    return ended[1] - launched, ended[after] - failed, FAILS_AFTER + 1 - after


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_demo(folder / "data", samples=240)
        print(f"{os.cpu_count()} cores, two processes, debug_mm1; seconds")
        print(f"{'resumes from':16s} {'cold start':>10s} {'failure to next step':>21s} {'ratio':>6s} {'repeated steps':>15s}")
        for kind, extra in (
            ("checkpoint", ()),
            ("memory", ("--checkpoint.memory", str(folder / "memory"), "--checkpoint.memory-interval", "1")),
        ):
            (folder / kind).mkdir()
            cold, again, repeated = run(folder / "data", folder / kind, *extra)
            print(f"{kind:16s} {cold:10.1f} {again:21.1f} {again / cold:6.2f} {repeated:15d}", flush=True)


if __name__ == "__main__":
    main()
