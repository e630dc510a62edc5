"""What a save costs each process: bytes that processes gather, how long training stands still, and how much memory it takes.

    .venv/bin/python benchmarks/checkpoint_save.py --processes 4

A model of about 30M parameters on data-parallel gloo processes. The baseline is megatron-core's "fully reshardable" state of the
distributed optimizer, which gathers whole parameters on every process before they are written; both write the same tensors in the same
format. "Plain copy" is a copy, in memory, of the bytes that this process writes. Memory is the peak of the process's resident set while it
saves (sampled every millisecond) above what it was before.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import STATE_METADATA
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import Checkpointer, TrainState, optimizer_state, state
from megatron_mm.training.optimizer import build_optimizer, initialize_state


def experiment() -> Experiment:
    base = get_recipe("debug_mm1")
    decoder = replace(base.model.decoder, hidden_size=512, ffn_hidden_size=1536, num_layers=8, num_attention_heads=8, head_dim=64)
    return replace(base, model=replace(base.model, decoder=decoder))


def gathering(optimizer: Any, weights: dict[str, Any], *, loading: bool) -> Any:
    """The baseline: megatron-core's own state."""
    return optimizer.sharded_state_dict(weights, is_loading=loading, metadata=dict(STATE_METADATA))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Watches the resident set from a thread of its own."""

    def __init__(self) -> None:
        self.before = self.peak = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, resident())

    def stop(self) -> int:
        """Bytes above what it was at the beginning."""
        self.done.set()
        self.thread.join()
        return self.peak - self.before


class Gathered:
    """Counts the bytes of floating-point numbers that arrive in gathers."""

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


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """On one process; both kinds of saves in turn, twice, of which the second counts."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    settings = experiment()
    topology = topologies.initialize(settings.parallel, seed=1)
    model = build_model(settings, topology)
    optimizer = build_optimizer(settings, model)
    initialize_state(optimizer)
    gathered, found = Gathered(), {}
    ours = optimizer_state.optimizer_state
    for repetition in range(2):
        for name, make in (("gathering (baseline)", gathering), ("own runs", ours)):
            state.optimizer_state = make
            checkpointer = Checkpointer(settings, topology, folder / name.split()[0], model, optimizer)
            dist.barrier()
            gathered.bytes = 0
            memory = PeakMemory()
            began = time.perf_counter()
            checkpointer.save(TrainState(step=repetition + 1))
            blocked = time.perf_counter() - began
            checkpointer.finish()
            peak = memory.stop()
            (tensors,) = (folder / name.split()[0] / "checkpoints").glob(f"step_{repetition + 1:08d}/tensors")
            written = sum(path.stat().st_size for path in tensors.glob(f"__{topology.rank}_*.distcp"))
            source = torch.zeros(written, dtype=torch.uint8)
            source.clone()
            began = time.perf_counter()
            source.clone()
            copied = time.perf_counter() - began
            found[name] = {"gathered": gathered.bytes, "written": written, "blocked": blocked, "copy": copied, "memory": peak}
            dist.barrier()
    topologies.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        found = measure(arguments.folder)
        (arguments.folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes), __file__]
    try:
        subprocess.run([*command, "--folder", str(folder)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{arguments.processes} processes, MB a process (largest of all): gathered  written  peak memory   ms: blocked  plain copy")
    worst = {name: {key: max(rank[name][key] for rank in ranks) for key in ranks[0][name]} for name in ranks[0]}
    for name, of in worst.items():
        print(
            f"  {name:36} {of['gathered'] / 1e6:18.1f} {of['written'] / 1e6:8.1f} {of['memory'] / 1e6:12.1f} "
            f"{1e3 * of['blocked']:13.0f} {1e3 * of['copy']:11.1f}"
        )
    baseline, ours = worst["gathering (baseline)"], worst["own runs"]
    print(f"blocked, own runs / gathering: {ours['blocked'] / baseline['blocked']:.2f}; memory {ours['memory'] / baseline['memory']:.2f}")
    print(f"own runs: memory / written {ours['memory'] / ours['written']:.2f}")


if __name__ == "__main__":
    main()
