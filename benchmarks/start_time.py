"""Break down the time from launch to the first step on one process of 512, and show which parts grow with the number of processes.

    .venv/bin/python benchmarks/start_time.py [--recipe mm1_30b] [--world-sizes 8 512] [--shards 100000]

For each world size, a process of its own runs the real code of `megatron-mm train`, from its imports to its first batch: once as the first
process of the run, which checks all shards for the others, and once as another one. Process groups are fake and weights are on the meta
device (`planning.tracing.start`). The data set is the demo's, with its shards linked under many names. The baseline is the smallest world
size: each data-parallel rank gets as many sequences there, so that reading and decoding are alike and only the cost of the run's size
differs. Seconds are this machine's wall and processor time, with files in its page cache. Compilation and the time that NCCL and gloo take
to connect are not included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

OPENED = 0
"""Number of files that this process has opened."""


def count_opens() -> None:
    """Count opened files from here on, including those of imports."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        global OPENED
        OPENED += event == "open"

    sys.addaudithook(audit)


def processor_seconds() -> float:
    """Return the processor seconds of all of this process's threads so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def trace(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trace one process, started through the command line as a run's processes are."""
    count_opens()
    began = time.perf_counter()
    from megatron_mm.cli.main import main as command
    from megatron_mm.planning import watch  # what `train` imports
    from megatron_mm.planning.tracing import start

    assert watch
    imported = {"seconds": time.perf_counter() - began, "processor": processor_seconds(), "opened": OPENED}
    found = []
    began = time.perf_counter()

    def traced(experiment: Any, run_dir: Path, **options: Any) -> None:
        configured = time.perf_counter() - began
        found.append((configured, start.trace_start(experiment, run_dir, rank=arguments.rank, world_size=arguments.world_size)))

    start.starts.start = traced
    options = {
        "--run-dir": arguments.folder / f"run_{arguments.world_size}_{arguments.rank}",
        "--data.path": arguments.folder / "data",
        "--train.global-batch-size": arguments.batch,
        "--monitor.wandb": "disabled",
    }
    command(["train", arguments.recipe, *(str(word) for option in options.items() for word in option)])
    ((configured, done),) = found
    return {"imports": imported, "configuration": configured, **asdict(done)}


def link_shards(source: Path, *, shards: int) -> None:
    """Give a source at least `shards` shards: its own ones linked under more names, and an index of them."""
    from megatron_mm.data.sources.index import open_index
    from megatron_mm.data.sources.index_files import META, write_index
    from megatron_mm.data.sources.shard_table import Shard, ShardTable

    index = open_index(source)
    meta = json.loads((source / "index" / META).read_text())
    meta = {name: value for name, value in meta.items() if name not in ("version", "arrays")}
    assert isinstance(index.shards, ShardTable)
    own = list(index.shards.shards())
    copies = -(-shards // len(own))
    table, parts = [], []
    for copy in range(copies):
        for shard in own:
            path = source / f"copy-{copy:06d}-{shard.name}"
            try:
                os.link(source / shard.name, path)
            except OSError:  # file systems limit the links to a file
                path.write_bytes((source / shard.name).read_bytes())
            table.append(Shard(path.name, shard.size, path.stat().st_mtime_ns, shard.digest))
        samples, items = index.sample_rows.copy(), index.item_rows
        samples["shard"] += copy * len(own)
        samples["first_item"] += copy * len(items)
        parts.append((samples, items))
    write_index(
        source,
        meta=meta,
        shards=ShardTable.of(table),
        num_samples=copies * len(index),
        num_items=copies * len(index.item_rows),
        parts=parts,
    )


def prepare(folder: Path, *, shards: int) -> None:
    """Prepare the demo's data with about `shards` shards in all."""
    from megatron_mm.data.prepare.demo import prepare_demo

    prepare_demo(folder / "data", samples=240)
    sources = ("interleaved", "pairs", "text")
    for name in sources:
        link_shards(folder / "data" / "train" / name, shards=shards // len(sources))


def run_traced(arguments: argparse.Namespace, folder: Path, *, rank: int, world_size: int, batch: int) -> dict[str, Any]:
    """Launch one process; return its results."""
    words = [sys.executable, __file__, "--folder", str(folder), "--recipe", arguments.recipe]
    words += ["--rank", str(rank), "--world-size", str(world_size), "--batch", str(batch)]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(found: dict[tuple[int, int], dict[str, Any]], *, baseline: int) -> None:
    """Print the parts of each process's time, then files and messages, and ratios to the smallest world size."""
    for rank in sorted({rank for rank, _ in found}):
        ours = {size: run for (of, size), run in found.items() if of == rank}
        print(f"\nrank {rank}: seconds of the clock (of the processor)" + "".join(f"{size:>16} processes" for size in ours))
        lines = {"imports": [(run["imports"]["seconds"], run["imports"]["processor"]) for run in ours.values()]}
        lines["configuration"] = [(run["configuration"], run["configuration"]) for run in ours.values()]
        for part in next(iter(ours.values()))["seconds"]:
            lines[part] = [(run["seconds"][part], run["processor_seconds"][part]) for run in ours.values()]
        lines["all"] = [(sum(a for a, _ in column), sum(b for _, b in column)) for column in zip(*lines.values(), strict=True)]
        for part, values in lines.items():
            ratio = values[-1][1] / max(values[0][1], 1e-3)
            print(f"  {part:44}" + "".join(f"{a:14.2f} ({b:8.2f})" for a, b in values) + f"   {ratio:6.2f} x")
        for what in ("opened", "asked", "groups", "messages", "received"):
            values = [sum(counts[what] for counts in run["counts"].values()) for run in ours.values()]
            print(f"  {what:44}" + "".join(f"{value:25d}" for value in values) + f"   {values[-1] / max(1, values[0]):6.2f} x")
    last = found[max(found)]
    rate = last["drawn_a_second"]
    print(
        f"\nimports open {last['imports']['opened']} files a process. Initial weights of rank {max(found)[0]}: "
        f"{last['drawn'] / 1e9:.2f}e9 numbers; one thread of this processor draws {rate / 1e9:.3f}e9 a second "
        f"({last['drawn'] / rate:.0f} s); a GPU draws its own"
    )
    print(f"ratios: largest world size / {baseline} processes, processor seconds and counts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mm1_30b")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[8, 512])
    parser.add_argument("--shards", type=int, default=100_000, help="of all sources together (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=8, help="of a data-parallel rank in a step (default: %(default)s)")
    for name, kind in (("--folder", Path), ("--rank", int), ("--world-size", int), ("--batch", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(trace(arguments)), flush=True)
        os._exit(0)
    from megatron_mm.families.recipes import get_recipe

    parallel = get_recipe(arguments.recipe).parallel
    sizes = sorted(arguments.world_sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, shards=arguments.shards)
        found = {
            (rank, size): run_traced(
                arguments, folder, rank=rank, world_size=size, batch=arguments.sequences * parallel.data_parallel_size(size)
            )
            for rank in (0, 3)
            for size in sizes
        }
    print(f"{arguments.recipe}, {arguments.shards} shards, {arguments.sequences} sequences a data-parallel rank and step")
    report(found, baseline=sizes[0])


if __name__ == "__main__":
    main()
