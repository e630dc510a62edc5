"""Inject one fault after another, in random order, into a small run: it must end with the weights of an undisturbed run.

    make test-faults                                      # or: python tools/fault_drill.py --out build/faults [--seed 2] [--faults 8]

For each start of the disturbed run, one fault, the process and the step are drawn at random; a start that survives its fault is stopped a
few steps later. Then the same command is started again, as a cluster would do, until all faults have occurred and all steps are done.
Weights, optimizer state and losses must be bit-identical to the undisturbed run's. With `--change-layout` each start draws its layout at
random, and weights and losses must agree to 1e-5 relative, moments to 1e-4, except for tensors that consist of rounding errors alone
(`ROUNDING`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from megatron_mm.data.prepare.demo import prepare_demo
from megatron_mm.training.checkpoint import completed_checkpoints
from megatron_mm.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
FAULTS = ("kill", "stop", "hang", "collective", "loader", "term", "full disk", "damaged checkpoint", "second run", "killed while saving")
LAYOUTS = ({"parallel.tensor": 2}, {"parallel.pipeline": 2}, {})
"""Layouts for two processes."""
SURVIVED = {"full disk": 5, "damaged checkpoint": 2, "second run": 2}
"""Faults that do not end a start, and how many steps later it is then stopped."""
STEPS, INTERVAL = 48, 3
"""More steps than the run completes before the last fault."""
WATCHDOG_SECONDS = 30.0
TIMEOUT = 300
TOLERANCE = 1e-5
"""Largest relative difference of weights and losses between layouts."""
MOMENTS = 1e-4
"""The same for the optimizer's moments: means of gradients, which are small differences of large sums."""
ROUNDING = "linear_qkv.bias"
"""Ending of the names of such tensors. The keys' part of this bias has no gradient, because a vector added to all keys does not change the
softmax: Adam scales the rounding errors up to full steps."""


def command(data: Path, run_dir: Path, layout: dict[str, int]) -> list[str]:
    options = {
        "run-dir": run_dir,
        "data.path": data,
        "data.sequence-length": 64,
        "train.steps": STEPS,
        "train.global-batch-size": 4,
        "train.micro-batch-size": 2,
        "train.watchdog": WATCHDOG_SECONDS,
        "checkpoint.interval": INTERVAL,
        "checkpoint.timeout-minutes": 1,  # a process that is stopped during a save is noticed after this time
        "eval.interval": 0,
        "monitor.wandb": "disabled",
        "extra-hooks": f"{ROOT / 'tests' / 'support' / 'faulty.py'}:Faulty",
        **layout,
    }
    launcher = [sys.executable, "-m", "megatron_mm.run.launcher", "--standalone", "--nproc-per-node", "2"]
    return [
        *launcher,
        "-m",
        "megatron_mm",
        "train",
        "debug_mm1",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]


def start(words: list[str], log: Path, fault: str, once: Path, *, stop: int = 0) -> tuple[int, float]:
    """Start the run, which is to end after step `stop` unless that is 0; return its exit code and seconds."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",
        "GLOO_SOCKET_IFNAME": "lo",
        "FAULT": fault,
        "FAULT_ONCE": str(once),
        "FAULT_STOP": str(stop),
    }
    began = time.monotonic()
    with log.open("a") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            return process.wait(timeout=TIMEOUT), time.monotonic() - began
        finally:
            process.kill()


def disturb(data: Path, run_dir: Path, *, count: int, seed: int, change_layout: bool) -> list[str]:
    """Start the run again and again until it is done; return the faults injected, in order."""
    chance, met = random.Random(seed), []
    kinds = [kind for _ in range(count) for kind in chance.sample(FAULTS, len(FAULTS))][:count]
    log, once = run_dir.parent / "log", run_dir.parent / "fault"
    for kind in [*kinds, "none"]:
        if kind == "damaged checkpoint" and len(completed_checkpoints(run_dir)) < 2:  # without an older one the run could not resume
            start(command(data, run_dir, LAYOUTS[0]), log, "none 0 0", once, stop=_steps(run_dir) + 2 * INTERVAL)
        steps = _steps(run_dir)
        rank, step = chance.randrange(2), steps + chance.randint(1, 3)
        stop = step + SURVIVED[kind] if kind in SURVIVED else 0
        layout = chance.choice(LAYOUTS) if change_layout else LAYOUTS[0]
        once.unlink(missing_ok=True)
        words = command(data, run_dir, layout)
        if kind == "damaged checkpoint":
            _damage(run_dir)
        if kind == "second run":
            code, seconds = _two(words, log, once, step=step, stop=stop)
        else:
            code, seconds = start(words, log, f"{kind.replace(' ', '_')} {rank} {step}", once, stop=stop)
        met.append(kind)
        found = bool(list(run_dir.glob("checkpoints/damaged-*"))) if kind == "damaged checkpoint" else once.exists()
        if not found and kind != "none":
            raise SystemExit(f"{kind}: the run has not met it in step {step}: see {log}")
        where = "the whole run" if kind in ("none", "damaged checkpoint") else f"process {rank} in step {step}"
        print(f"{kind} ({where}): exit code {code} after {seconds:.0f} s, {_steps(run_dir)} of {STEPS} steps done", flush=True)
        if _steps(run_dir) == STEPS and kind != "none":
            raise SystemExit(f"the run was done after {len(met)} of {count} faults: it has too few steps")
    if code != 0 or completed_checkpoints(run_dir)[-1].name != f"step_{STEPS:08d}":
        raise SystemExit(f"the run did not end: see {log}")
    return met


def _two(words: list[str], log: Path, once: Path, *, step: int, stop: int) -> tuple[int, float]:
    """Start the run, and while it pauses after a step, start another on the same directory, which must be refused."""
    other, go = once.with_name("second.log"), once.with_suffix(".go")
    go.unlink(missing_ok=True)
    first = subprocess.Popen(
        [sys.executable, __file__, "--only", json.dumps([words, str(log), f"pause 0 {step}", str(once), stop])], env=os.environ
    )
    began = time.monotonic()
    while not once.exists() and first.poll() is None:
        time.sleep(0.1)
    code, _ = start(words, other, "none 0 0", once)
    go.touch()
    assert code == 2 and "is in use by" in other.read_text(), f"two runs at once: see {other}"
    return first.wait(), time.monotonic() - began


def _damage(run_dir: Path) -> None:
    """Flip a bit in the newest checkpoint, if there is an older one."""
    found = completed_checkpoints(run_dir)
    if len(found) > 1:
        path = max((found[-1] / "tensors").glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def _steps(run_dir: Path) -> int:
    return max(_losses(run_dir), default=0)


def _losses(run_dir: Path) -> dict[int, float]:
    """Return the logged losses by step; steps on a full disk have no line."""
    path = run_dir / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    return {line["step"]: line["loss"] for line in lines}


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's last checkpoint except the generators' states: weights and optimizer."""
    folder = str(completed_checkpoints(run_dir)[-1] / "tensors")
    sizes = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in sizes.items()
        if hasattr(entry, "size") and not name.startswith("generators")
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state


def compare(one: Path, other: Path, *, exactly: bool) -> float:
    """Return the largest relative difference of weights and moments; raise SystemExit if it is too large."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys(), "not the same tensors"
    names = [name for name in a if exactly or not name.endswith(ROUNDING)]
    differences = {name: float((a[name] - b[name]).double().norm() / (a[name].double().norm() + 1e-12)) for name in names}
    worst = max(differences.values())
    losses = [_losses(run_dir) for run_dir in (one, other)]
    pairs = [(losses[0][step], losses[1][step]) for step in losses[1]]
    assert len(pairs) > STEPS // 2, "hardly a loss was written"
    if exactly and (worst > 0 or any(x != y for x, y in pairs)):
        raise SystemExit(f"weights or losses differ: by {worst:.3g} at most")
    for name, difference in differences.items():
        allowed = MOMENTS if name.startswith("optimizer.state.exp_avg") else TOLERANCE
        if difference > allowed:
            raise SystemExit(f"{name} differs by {difference:.3g} relative, more than {allowed}")
    if any(abs(x - y) > TOLERANCE * abs(x) for x, y in pairs):
        raise SystemExit(f"losses differ by more than {TOLERANCE} relative")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/faults"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=len(FAULTS), help="how many the run meets")
    parser.add_argument("--change-layout", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        words, log, fault, once, stop = json.loads(given.only)
        raise SystemExit(start(words, Path(log), fault, Path(once), stop=stop)[0])
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    data = given.out / "data"
    prepare_demo(data, samples=240)
    undisturbed = given.out / "undisturbed"
    code, seconds = start(command(data, undisturbed, LAYOUTS[0]), given.out / "log", "none 0 0", given.out / "fault")
    assert code == 0, f"the undisturbed run failed: see {given.out / 'log'}"
    print(f"undisturbed: {STEPS} steps, {seconds:.0f} s", flush=True)
    met = disturb(data, given.out / "disturbed", count=given.faults, seed=given.seed, change_layout=given.change_layout)
    worst = compare(undisturbed, given.out / "disturbed", exactly=not given.change_layout)
    same = "bit-identical" if worst == 0 else f"tensors within {worst:.2g} relative"
    print(f"seed {given.seed}: after {len(met) - met.count('none')} faults weights, optimizer and losses are the undisturbed run's: {same}")


if __name__ == "__main__":
    main()
