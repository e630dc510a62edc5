"""Cost of loading a checkpoint on another number of processes: bytes read from storage, time and memory of each process.

    .venv/bin/python benchmarks/checkpoint_load.py --writers 1 --readers 4

Loads the model of `checkpoint_save.py` on data-parallel gloo processes. The baseline is torch's reader, which reads a whole stored piece
for each box that a process needs of it (`platform.part_reader` explains why that happens more than once). Both load the same checkpoint
into the same memory. Bytes are the sum over all processes, divided by the bytes of the checkpoint. Memory is the largest increase of any
process's resident set during the load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from checkpoint_save import PeakMemory, built
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_mm.parallel import topology as topologies
from megatron_mm.platform import part_reader
from megatron_mm.training.checkpoint import Checkpointer, TrainState

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import counted_reads
from support.counted_reads import CountingFile

KINDS = ("torch's reader (baseline)", "parts of pieces")


def run(folder: Path, *, loads: bool) -> dict[str, Any]:
    """Save on this process, or load twice with each reader; the second load counts."""
    settings, topology, model, optimizer = built()
    checkpointer = Checkpointer(settings, topology, folder, model, optimizer)
    found: dict[str, Any] = {}
    if not loads:
        checkpointer.save(TrainState(step=1))
        checkpointer.finish()
    else:
        theirs = FileSystemReader.read_data
        part_reader.install()
        counted_reads.install()
        ours = FileSystemReader.read_data
        for name, read in [*zip(KINDS, (theirs, ours), strict=True)] * 2:
            read.reads_parts = True  # type: ignore[attr-defined]  # so that a load leaves it in place
            FileSystemReader.read_data = read  # type: ignore[method-assign]
            dist.barrier()
            CountingFile.total, memory = 0, PeakMemory()
            began, processor = time.perf_counter(), time.process_time()
            checkpointer.load(folder / "checkpoints" / "step_00000001")
            found[name] = {"clock": time.perf_counter() - began, "processor": time.process_time() - processor}
            found[name] |= {"memory": memory.stop(), "read": CountingFile.total}
    topologies.shutdown()
    return found


def launch(folder: Path, processes: int, *, loads: bool) -> list[dict[str, Any]]:
    """Launch the processes; return each one's results, by rank."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__]
    words += ["--folder", str(folder), *(["--loads"] if loads else [])]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, default=1, help="processes that save (default: %(default)s)")
    parser.add_argument("--readers", type=int, default=4, help="processes that load (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--loads", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        found = run(arguments.folder, loads=arguments.loads)
        (arguments.folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launch(folder, arguments.writers, loads=False)
        stored = sum(path.stat().st_size for path in folder.glob("checkpoints/*/tensors/*.distcp"))
        ranks = launch(folder, arguments.readers, loads=True)
    print(
        f"{arguments.writers} processes wrote {stored / 1e6:.0f} MB, {arguments.readers} load them: MB, of the checkpoint, peak MB, s (cpu)"
    )
    for kind in KINDS:
        read = sum(rank[kind]["read"] for rank in ranks)
        worst = {key: max(rank[kind][key] for rank in ranks) for key in ("memory", "clock", "processor")}
        times = f"{worst['clock']:8.2f} ({worst['processor']:.2f})"
        print(f"  {kind:28}{read / 1e6:10.1f}{read / stored:8.2f}{worst['memory'] / 1e6:10.1f}{times}")


if __name__ == "__main__":
    main()
