"""The cost of a run's start on one process does not grow with the number of processes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from support.distributed import run_processes

from megatron_mm.config import ParallelConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.planning.tracing.start import StartTrace, trace_start

SHARDS = 4
"""Shards of the demo's three training sources."""


def trace(data: Path, folder: Path, rank: int, world_size: int) -> StartTrace:
    """Trace a start with four sequences per data-parallel rank, whatever the size of the run."""
    base = get_recipe("debug_mm1")
    parallel = ParallelConfig(tensor=2, pipeline=2)
    experiment = replace(
        base,
        parallel=parallel,
        data=replace(base.data, path=data, decoder="pillow"),
        train=replace(base.train, global_batch_size=4 * parallel.data_parallel_size(world_size)),
    )
    return trace_start(experiment, folder / f"{rank}_{world_size}", rank=rank, world_size=world_size)


def test_a_start_among_512_asks_no_more_than_among_8(demo_data: Path, tmp_path: Path) -> None:
    (few,), (many,) = (run_processes(trace, 1, demo_data, tmp_path, 3, size) for size in (8, 512))
    assert few.counts.keys() == many.counts.keys()
    for part, of_few in few.counts.items():
        of_many = asdict(many.counts[part])
        if "batch" in part or "hooks" in part:
            # Which samples a process reads, and when, depends on the size of the run.
            of_many.pop("opened")
        for what, number in of_many.items():
            assert number <= 1.05 * asdict(of_few)[what] + 2, f"{part}: {what}"
    shards = [path for path in many.files if path.endswith((".tar", ".jsonl"))]
    assert many.counts["data opened and checked"].opened == few.counts["data opened and checked"].opened
    assert not {path for path in many.files if "heldout" in path}, "the first process looks at the held-out split for all"
    assert len(shards) <= SHARDS


def test_one_process_looks_at_every_shard(demo_data: Path, tmp_path: Path) -> None:
    sources = get_recipe("debug_mm1").data.sources
    shards = [path for name in sources for path in (demo_data / "train" / name).iterdir() if path.suffix in (".tar", ".jsonl")]
    (first,), (other,) = (run_processes(trace, 1, demo_data, tmp_path, rank, 64) for rank in (0, 5))
    assert first.counts["data opened and checked"].asked - other.counts["data opened and checked"].asked >= len(shards)
