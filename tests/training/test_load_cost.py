"""A load reads each stored byte once per data-parallel group, whatever layout wrote it, and one process reads the metadata for all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import counted_reads
from support.counted_reads import BLOCK, CountingFile
from support.distributed import run_processes
from support.small import random_step, small_experiment
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_mm.parallel import topology as topologies
from megatron_mm.platform import part_reader
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import Checkpointer, TrainState
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep


@dataclass
class Read:
    """Counts of what a process read while loading, and its losses afterwards."""

    bytes: int = 0
    descriptions: int = 0
    pieces: int = 0
    losses: tuple[float, ...] = ()


def build(parallel: dict[str, Any], folder: Path) -> tuple[Any, TrainingStep, Checkpointer]:
    experiment = small_experiment(parallel=parallel, global_batch_size=8)
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build_model(experiment, topology)
    optimizer = build_optimizer(experiment, model)
    step = TrainingStep(experiment, topology, model, optimizer, num_sources=2)
    return (experiment, topology), step, Checkpointer(experiment, topology, folder, model, optimizer)


def save(folder: Path, parallel: dict[str, Any]) -> tuple[float, ...]:
    """Save after a step; return the loss of the next step."""
    about, step, checkpointer = build(parallel, folder)
    step.run(random_step(*about, step=1), step=1)
    checkpointer.save(TrainState(step=1))
    checkpointer.finish()
    return (step.run(random_step(*about, step=2), step=2).losses.mean,)


def load(folder: Path, parallel: dict[str, Any]) -> Read:
    """Load; return what was read, and the loss of the next step."""
    about, step, checkpointer = build(parallel, folder)
    read = Read()
    stored_piece, of_file = part_reader._Piece.__init__, FileSystemReader.read_metadata

    def piece(self: Any, *arguments: Any) -> None:
        read.pieces += 1
        stored_piece(self, *arguments)

    def described(self: Any, *args: Any, **kwargs: Any) -> Any:
        read.descriptions += 1
        return of_file(self, *args, **kwargs)

    FileSystemReader.read_metadata = described
    part_reader._Piece.__init__ = piece  # type: ignore[method-assign]
    counted_reads.install()
    CountingFile.total = 0
    checkpointer.load(folder / "checkpoints" / "step_00000001")
    read.bytes = CountingFile.total
    read.losses = (step.run(random_step(*about, step=2), step=2).losses.mean,)
    return read


@pytest.mark.parametrize(
    ("writers", "written", "readers", "reading"),
    [
        (1, {}, 2, {}),
        pytest.param(2, {}, 4, {}, marks=pytest.mark.slow),
        pytest.param(4, {}, 2, {}, marks=pytest.mark.slow),
        pytest.param(1, {}, 4, {}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2}, 2, {}, marks=pytest.mark.slow),
    ],
)
def test_a_load_reads_each_byte_once(tmp_path: Path, writers: int, written: dict[str, Any], readers: int, reading: dict[str, Any]) -> None:
    expected = run_processes(save, writers, tmp_path, written)[0]
    of_ranks = run_processes(load, readers, tmp_path, reading)
    stored = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "step_00000001" / "tensors").glob("*.distcp"))
    pieces = sum(read.pieces for read in of_ranks)
    assert sum(read.bytes for read in of_ranks) <= stored + 3 * BLOCK * pieces
    assert all(read.descriptions == 0 for read in of_ranks), "the first process reads where pieces lie, and tells the others"
    for read in of_ranks:
        assert read.losses == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(torch.tensor(expected)).all()
