"""A source's endless stream of samples: each epoch contains every sample once, in a new order.

Samples are shuffled in blocks. Rows are in the order of the shards, so a run of neighbouring rows is part of one shard (or of a few small
ones). An epoch shuffles the runs, makes blocks of RUNS_PER_BLOCK runs, and shuffles the samples within each block:

    runs of rows     0 1 2 3 4 5 6 7        shuffled   5 2 7 0 | 3 6 1 4        two blocks
    a block          the samples of runs 5, 2, 7 and 0 in random order, then those of 3, 6, 1 and 4

So planning reads the sizes of a block's samples as RUNS_PER_BLOCK sequential reads (those of the next block a few at a time, while the
current one is used), holds two blocks in memory however large the source is, and training reads from the shards of one block at a time. A
source of at most BLOCK samples is one block, so all of its samples are shuffled together.

How good is the shuffle? A batch of n samples of a source comes from up to RUNS_PER_BLOCK shards. If the samples of a shard have correlation
rho, the variance of a batch's mean is 1 + rho (n - 1) / RUNS_PER_BLOCK times that of independent samples (for a perfect shuffle of N
shards, replace RUNS_PER_BLOCK with N). `benchmarks/plan_time.py` measures it for rho = 1.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.plan.mixture import permute, stream_keys
from megatron_mm.data.sources.source import Source

RUN = 4096
"""Number of neighbouring samples that stay in the same block."""
RUNS_PER_BLOCK = 256
BLOCK = RUN * RUNS_PER_BLOCK
"""Approximate number of samples in a block. A source with no more samples than this is a single block."""
_EPOCHS_KEPT, _BLOCKS_KEPT = 2, 2


@dataclass(frozen=True)
class Samples:
    """Some samples of a source, with their sizes for packing."""

    rows: np.ndarray
    """[samples] int64: rows of the source, possibly repeated."""
    text_tokens: np.ndarray
    """[samples] int64."""
    num_images: np.ndarray
    """[samples] int64."""
    num_tiles: np.ndarray
    """[samples] int64: tiles of all images of a sample; without tiling, an image is one tile."""

    def __len__(self) -> int:
        return len(self.rows)


def samples_of(source: Source, rows: np.ndarray, image: ImageInput) -> Samples:
    """Return these rows with their sizes."""
    sizes = source.sizes(rows)
    return Samples(rows, sizes.text_tokens, sizes.num_images, document_tiles(source, rows, image))


def document_tiles(source: Source, rows: np.ndarray | slice, image: ImageInput) -> np.ndarray:
    """Return the total number of tiles of each document's images: [rows] int64."""
    sizes = source.sizes(rows)
    if image.tiling is not None:
        images = source.image_sizes(rows)
        document, tiles = images.document, image.num_tiles(images.widths, images.heights)
    elif image.low_resolution is not None:
        numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        document, tiles = np.repeat(np.arange(len(sizes)), sizes.num_images), image.num_sub_images(numbers, sizes.num_images)
    else:
        return sizes.num_images * image.max_tiles
    return np.bincount(document, weights=tiles, minlength=len(sizes)).astype(np.int64)


class _Epoch:
    """The order of an epoch: the runs of each block."""

    def __init__(self, number: int, *, num_samples: int, seed: int) -> None:
        self.number = number
        self.num_samples = num_samples
        num_runs = -(-num_samples // RUN)
        num_blocks = 1 if num_samples <= BLOCK else -(-num_runs // RUNS_PER_BLOCK)
        self.runs = np.arange(num_runs)
        if num_blocks > 1:
            self.runs = np.random.default_rng((seed, number)).permutation(num_runs)
        self.first_run = np.arange(num_blocks + 1) * num_runs // num_blocks
        """[blocks + 1] index in `runs` of each block's first run."""
        self.sizes = np.minimum(RUN, num_samples - self.runs * RUN)
        """[runs] number of samples in each run; the last run of the source may be shorter."""
        self.first_place = np.concatenate([[0], np.cumsum(self.sizes)])[self.first_run]
        """[blocks + 1] position in the epoch at which each block begins."""

    @property
    def num_blocks(self) -> int:
        return len(self.first_run) - 1


class _Block:
    """A block's samples in the order of its runs, with their sizes, which are read run by run."""

    def __init__(self, source: Source, image: ImageInput, epoch: _Epoch, number: int) -> None:
        self.source, self.image = source, image
        self.runs = epoch.runs[epoch.first_run[number] : epoch.first_run[number + 1]]
        sizes = epoch.sizes[epoch.first_run[number] : epoch.first_run[number + 1]]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.text_tokens, self.num_images = (np.empty(self.starts[-1], dtype=np.int32) for _ in range(2))
        self.num_tiles = self.num_images if image.is_one_square else np.empty(self.starts[-1], dtype=np.int32)
        self.loaded = 0

    def load(self, count: int) -> None:
        """Read the sizes of the first `count` runs, except runs that were already read."""
        for number in range(self.loaded, min(count, len(self.runs))):
            first, size = int(self.runs[number]) * RUN, int(self.starts[number + 1] - self.starts[number])
            rows, mine = slice(first, first + size), slice(int(self.starts[number]), int(self.starts[number + 1]))
            sizes = self.source.sizes(rows)
            self.text_tokens[mine], self.num_images[mine] = sizes.text_tokens, sizes.num_images
            if not self.image.is_one_square:
                self.num_tiles[mine] = document_tiles(self.source, rows, self.image)
            self.loaded = number + 1

    def samples(self, places: np.ndarray) -> Samples:
        """Return the samples at these positions of the block."""
        run = np.searchsorted(self.starts, places, side="right") - 1
        rows = self.runs[run] * RUN + places - self.starts[run]
        return Samples(rows, *(column[places].astype(np.int64) for column in (self.text_tokens, self.num_images, self.num_tiles)))


class SampleStream:
    """The endless stream of a source: a pure function of (source, seed, position). It caches only what it would otherwise read again."""

    def __init__(self, source: Source, image: ImageInput, *, seed: int) -> None:
        self.source, self.image, self.seed = source, image, seed
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()

    def read(self, first: int, count: int) -> Samples:
        """Return the samples at positions [first, first + count)."""
        parts, position, stop = [], first, first + count
        while position < stop:
            epoch_number, place = divmod(position, len(self.source))
            epoch = self._epoch(epoch_number)
            number = int(np.searchsorted(epoch.first_place, place, side="right")) - 1
            begin, end = int(epoch.first_place[number]), int(epoch.first_place[number + 1])
            last = min(place + stop - position, end)
            parts.append(self._read(epoch, number, np.arange(place - begin, last - begin), size=end - begin))
            self._read_ahead(epoch, number, part=(last - begin) / (end - begin))
            position += last - place
        if len(parts) == 1:
            return parts[0]
        return Samples(*(np.concatenate(columns) for columns in zip(*map(_columns, parts), strict=True)))

    def _read(self, epoch: _Epoch, number: int, places: np.ndarray, *, size: int) -> Samples:
        block = self._block(epoch, number)
        block.load(len(block.runs))
        key = stream_keys(self.seed, epoch.number, block=number if epoch.num_blocks > 1 else None)
        return block.samples(permute(places, size=size, keys=np.full(len(places), key)))

    def _read_ahead(self, epoch: _Epoch, number: int, *, part: float) -> None:
        """Read the same fraction of the next block's sizes as is already used of this block."""
        if epoch.num_blocks == 1:
            return
        last = number + 1 == epoch.num_blocks
        following = self._block(self._epoch(epoch.number + 1), 0) if last else self._block(epoch, number + 1)
        following.load(int(np.ceil(part * len(following.runs))))

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            self._epochs[number] = _Epoch(number, num_samples=len(self.source), seed=self.seed)
            while len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _block(self, epoch: _Epoch, number: int) -> _Block:
        # In a source of one block, a block holds the same rows in the same order in every epoch, so their sizes are read once.
        key = (epoch.number if epoch.num_blocks > 1 else 0, number)
        if key not in self._blocks:
            self._blocks[key] = _Block(self.source, self.image, epoch, number)
            while len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return self._blocks[key]


def _columns(samples: Samples) -> tuple[np.ndarray, ...]:
    return samples.rows, samples.text_tokens, samples.num_images, samples.num_tiles
