"""Streams over many blocks: every sample once per epoch, the same order from any position, few reads, good mixing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.plan import stream as stream_module
from megatron_mm.data.plan.mixture import permute, stream_keys
from megatron_mm.data.plan.stream import SampleStream, samples_of
from megatron_mm.data.sources.index import ITEM, SAMPLE, SourceIndex
from megatron_mm.data.sources.source import DocumentSizes

IMAGE = ImageInput(size=8, fill=(0, 0, 0), tokens=4)


class Counting(SourceIndex):
    """A source of pairs whose row r has r text tokens; records its reads."""

    reads: list[object]

    def sizes(self, rows: np.ndarray | slice) -> DocumentSizes:
        self.reads.append(rows)
        return super().sizes(rows)


def source(samples: int) -> Counting:
    rows = np.zeros(samples, SAMPLE)
    rows["text_tokens"], rows["num_images"] = np.arange(samples), np.arange(samples) % 3
    found = Counting("made", "pairs", Path("made"), ("0.tar",), "", {}, rows, np.zeros(0, ITEM))
    object.__setattr__(found, "reads", [])
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 10 samples, 4 of them in a block."""
    for name, value in (("RUN", 10), ("RUNS_PER_BLOCK", 4), ("BLOCK", 40)):
        monkeypatch.setattr(stream_module, name, value)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("samples", [1, 7, 40, 41, 95, 400, 1003])
@pytest.mark.parametrize("step", [1, 9, 64, 2000])
def test_every_epoch_has_every_sample_once_with_its_sizes(samples: int, step: int) -> None:
    stream = SampleStream(source(samples), IMAGE, seed=5)
    parts = [stream.read(first, min(step, 3 * samples - first)) for first in range(0, 3 * samples, step)]
    rows = np.concatenate([part.rows for part in parts]).reshape(3, samples)
    assert (np.sort(rows, axis=1) == np.arange(samples)).all()
    assert all((part.text_tokens == part.rows).all() and (part.num_images == part.rows % 3).all() for part in parts)
    assert all((part.num_tiles == part.num_images).all() for part in parts)
    if samples >= 95:
        assert (rows[0] != rows[1]).mean() > 0.9


@pytest.mark.usefixtures("small_blocks")
def test_a_position_has_the_same_sample_whatever_was_read_before() -> None:
    straight = SampleStream(source(333), IMAGE, seed=5).read(0, 1000).rows
    for first in (0, 17, 330, 333, 640, 999):
        fresh = SampleStream(source(333), IMAGE, seed=5)
        assert fresh.read(first, 1).rows.tolist() == straight[first : first + 1].tolist()
    assert (SampleStream(source(333), IMAGE, seed=6).read(0, 1000).rows != straight).mean() > 0.9


def test_a_source_of_one_block_keeps_the_order_that_it_always_had() -> None:
    """All samples are permuted at once; checkpoints of earlier versions rely on this order."""
    rows = SampleStream(source(1025), IMAGE, seed=5).read(0, 2050).rows.reshape(2, 1025)
    for epoch in range(2):
        assert rows[epoch].tolist() == permute(np.arange(1025), size=1025, keys=np.full(1025, stream_keys(5, epoch))).tolist()
    # The first samples in version 0.1.
    assert rows[0, :8].tolist() == [979, 253, 651, 936, 334, 101, 335, 609]


@pytest.mark.usefixtures("small_blocks")
def test_sizes_are_read_in_runs_and_ahead_of_their_use() -> None:
    made = source(400)
    stream = SampleStream(made, IMAGE, seed=5)
    per_window = []
    for first in range(0, 1200, 10):
        before = len(made.reads)
        stream.read(first, 10)
        per_window.append(len(made.reads) - before)
    assert all(isinstance(rows, slice) and rows.stop - rows.start == 10 for rows in made.reads)
    assert len(made.reads) == 120 + 4, "each run once an epoch, and one block ahead"
    assert max(per_window[1:]) <= 2


@pytest.mark.usefixtures("small_blocks")
def test_a_window_comes_from_one_block_of_many_shards() -> None:
    """Of 100 shards of 10 samples, each block uses 4, in other combinations in each epoch."""
    stream = SampleStream(source(1000), IMAGE, seed=5)
    shards = [[set((stream.read(1000 * epoch + 40 * block, 40).rows // 10).tolist()) for block in range(25)] for epoch in range(2)]
    assert all(len(found) == 4 for epoch in shards for found in epoch)
    assert sum(found in shards[1] for found in shards[0]) == 0
    within = stream.read(0, 40).rows
    assert np.abs(np.diff(within // 10)).astype(bool).mean() > 0.5, "samples of its shards take turns"


def test_sizes_of_chosen_rows() -> None:
    found = samples_of(source(50), np.array([7, 3, 7]), IMAGE)
    assert found.text_tokens.tolist() == [7, 3, 7] and found.num_images.tolist() == [1, 0, 1] == found.num_tiles.tolist()
