"""If W&B's server is unreachable or stops answering, the run continues, reports it once, keeps all data on disk, and exits with 0."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.wandb_file import history

ROOT = Path(__file__).parents[2]
SERVER = Path(__file__).parents[1] / "support" / "wandb_server.py"

TRAIN = """
import sys
from megatron_mm.reporting import wandb_run
wandb_run._INIT_SECONDS = 3
from megatron_mm.cli.main import main
main(sys.argv[1:])
"""
LOSES_IT = """
import logging, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
from megatron_mm.reporting import sinks
from megatron_mm.reporting.monitor import Monitor
from support.monitors import experiment, metrics
logging.basicConfig(level="WARNING", format="%(message)s", stream=sys.stdout)
sinks._CLOSE_SECONDS = 5
base = experiment()
online = replace(base, monitor=replace(base.monitor, wandb="online"))
watched = Monitor(online, Path(sys.argv[1]), resume_step=0, world_size=1, is_main=True)
while watched._wandb._run is None:
    assert watched._wandb.is_on
    time.sleep(0.05)
print("hang", flush=True)
sys.stdin.readline()
for step in range(1, 20):
    watched.log_step(metrics(step))
watched.close(exit_code=0)
"""


def environment(port: int) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}  # not this process's service
    return {
        **own,
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "0" * 40,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def silent_port(*, listens: bool) -> Iterator[int]:
    """Yield a port that accepts connections but never answers, or one that refuses them."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen(64)
        yield server.getsockname()[1]


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "hangs"])
def test_a_run_whose_wandb_cannot_be_reached_keeps_it_for_later(listens: bool, demo_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["train", "debug_mm1", "--run-dir", str(run_dir), "--data.path", str(demo_data), "--train.steps", "3", "--eval.interval", "0"]
    with silent_port(listens=listens) as port:
        command = [sys.executable, "-W", "ignore", "-c", TRAIN, *words, "--monitor.wandb", "online"]
        done = subprocess.run(command, env=environment(port), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "W&B" in line]
    assert len(said) == 1 and f"are kept in {run_dir / 'wandb'}; upload them later with `wandb sync`" in said[0], done.stderr
    assert steps(run_dir) == [1, 2, 3]
    (kept,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    assert [entry["train/step"] for entry in history(kept) if "train/loss" in entry] == [1, 2, 3]


@pytest.mark.slow
def test_a_run_whose_wandb_stops_answering_ends_all_the_same(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    server = subprocess.Popen([sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        command = [sys.executable, "-W", "ignore", "-c", LOSES_IT, str(run_dir)]
        run = subprocess.Popen(command, env=environment(port), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert run.stdout.readline() == "hang\n"
            server.stdin.write("\n")
            server.stdin.flush()
            said, _ = run.communicate("\n", timeout=240)
        finally:
            run.kill()
    finally:
        server.kill()
        server.wait()
    assert run.returncode == 0
    assert said.splitlines() == ["W&B did not accept the last metrics within 5 s: they are in metrics.jsonl"]
    assert steps(run_dir) == list(range(1, 20))
