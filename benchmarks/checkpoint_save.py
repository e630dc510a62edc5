"""Cost of a save on each process: bytes gathered, time that training is blocked, and memory.

    .venv/bin/python benchmarks/checkpoint_save.py --processes 4 [--layers 16]

Saves a model of about 30M parameters (with 8 layers) on data-parallel gloo processes. With twice as many processes and `--layers`, each
writes as much as before, so that what a save costs per process, however little it writes, weighs the same. Each kind saves three times, and
the last save counts (the first two determine which process writes what). Baselines of the same run: megatron-core's "fully reshardable"
state of the distributed optimizer, which gathers whole parameters on every process before they are written, and a save plan that is made
anew for each save. All write the same tensors in the same format. "Plain copy" is an in-memory copy of as many bytes as this process
writes, made by all processes at the same time. Memory is the largest increase of the process's resident set during the save (sampled every
millisecond). Wall times are how long `save` keeps a process from training; with more processes than cores they consist mostly of waiting
for a core, and processor time is more meaningful.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import STATE_METADATA
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import Checkpointer, TrainState, optimizer_state, save_plan, state
from megatron_mm.training.optimizer import build_optimizer, initialize_state

SAVES = 3
GATHERING, ANEW, OURS = "gathering (baseline)", "own runs, planned anew", "own runs"


def experiment(*, layers: int) -> Experiment:
    base = get_recipe("debug_mm1")
    decoder = replace(base.model.decoder, hidden_size=512, ffn_hidden_size=1536, num_layers=layers, num_attention_heads=8, head_dim=64)
    return replace(base, model=replace(base.model, decoder=decoder))


def gathering(optimizer: Any, weights: dict[str, Any], *, loading: bool) -> Any:
    """Baseline: megatron-core's own optimizer state."""
    return optimizer.sharded_state_dict(weights, is_loading=loading, metadata=dict(STATE_METADATA))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Samples the peak of the resident set in a background thread."""

    def __init__(self) -> None:
        self.before = self.peak = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, resident())

    def stop(self) -> int:
        """Return the peak, in bytes above the resident set at the beginning."""
        self.done.set()
        self.thread.join()
        return self.peak - self.before


class Gathered:
    """Counts the bytes of floating-point tensors received in gathers."""

    def __init__(self) -> None:
        self.bytes = 0
        for name in ("all_gather", "all_gather_into_tensor", "gather"):
            setattr(dist, name, self._counting(getattr(dist, name)))

    def _counting(self, collective: Any) -> Any:
        def call(received: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = received if isinstance(received, list) else [received]
            self.bytes += sum(t.numel() * t.itemsize for t in tensors if t.is_floating_point())
            return collective(received, *args, **kwargs)

        return call


class NoPlans(save_plan.SavePlans):
    """Baseline: the save plan is made anew for each save."""

    def must_be_made(self, state: dict[str, Any]) -> bool:
        return True


def timed(function: Callable[[], object]) -> dict[str, float]:
    """Return wall and processor seconds of a call that all processes begin together."""
    dist.barrier()
    began, processor = time.perf_counter(), time.process_time()
    function()
    return {"clock": time.perf_counter() - began, "processor": time.process_time() - processor}


def plain_copy(written: int) -> dict[str, float]:
    """Time a copy of `written` bytes into memory that this process has not touched yet, as in a save."""
    source = torch.zeros(written, dtype=torch.uint8)
    return timed(source.clone)


def built(*, layers: int = 8) -> tuple[Experiment, topologies.Topology, list[DistributedDataParallel], MegatronOptimizer]:
    """Build the experiment on this process, with initialized optimizer state."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    settings = experiment(layers=layers)
    topology = topologies.initialize(settings.parallel, seed=1)
    model = build_model(settings, topology)
    optimizer = build_optimizer(settings, model)
    initialize_state(optimizer)
    return settings, topology, model, optimizer


def measure(folder: Path, only: list[str], *, layers: int) -> dict[str, dict[str, float]]:
    """Measure each kind of save in turn on this process."""
    settings, topology, model, optimizer = built(layers=layers)
    gathered, found = Gathered(), {}
    ours = optimizer_state.optimizer_state
    kinds = {GATHERING: (gathering, NoPlans), ANEW: (ours, NoPlans), OURS: (ours, save_plan.SavePlans)}
    for number, (name, (make, plans)) in enumerate((name, kinds[name]) for name in only):
        state.optimizer_state = make
        checkpointer = Checkpointer(settings, topology, folder / f"run_{number}", model, optimizer)
        checkpointer.plans = plans()
        for step in range(1, SAVES + 1):
            gathered.bytes = 0
            memory = PeakMemory()
            blocked = timed(partial(checkpointer.save, TrainState(step=step)))
            checkpointer.finish()
            peak = memory.stop()
        (tensors,) = (folder / f"run_{number}" / "checkpoints").glob(f"step_{SAVES:08d}/tensors")
        written = sum(path.stat().st_size for path in tensors.glob(f"__{topology.rank}_*.distcp"))
        found[name] = {
            "gathered": gathered.bytes,
            "written": written,
            "memory": peak,
            **{f"blocked {key}": value for key, value in blocked.items()},
            **{f"copy {key}": value for key, value in plain_copy(written).items()},
        }
        dist.barrier()
    topologies.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the model (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", default=[GATHERING, ANEW, OURS], choices=[GATHERING, ANEW, OURS], help="(default: all)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        found = measure(arguments.folder, arguments.kinds, layers=arguments.layers)
        (arguments.folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes), __file__]
    try:
        options = ["--layers", str(arguments.layers), "--kinds", *arguments.kinds]
        subprocess.run([*command, "--folder", str(folder), *options], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{arguments.processes} processes, {arguments.layers} layers, MB and ms of the costliest process; clock (processor)")
    print(f"  {'':28}{'gathered':>10}{'written':>10}{'memory':>10}{'blocked':>18}{'plain copy':>18}{'ratio':>16}")
    for name in ranks[0]:
        of = {key: max(rank[name][key] for rank in ranks) for key in ranks[0][name]}
        times = "".join(f"{1e3 * of[f'{what} clock']:9.0f} ({1e3 * of[f'{what} processor']:6.0f})" for what in ("blocked", "copy"))
        ratio = "".join(f"{of[f'blocked {clock}'] / of[f'copy {clock}']:8.2f}" for clock in ("clock", "processor"))
        print(f"  {name:28}{of['gathered'] / 1e6:10.1f}{of['written'] / 1e6:10.1f}{of['memory'] / 1e6:10.1f}{times}{ratio}")


if __name__ == "__main__":
    main()
