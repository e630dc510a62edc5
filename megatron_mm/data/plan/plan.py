"""The plan: which samples are packed into which sequence of which micro-batch of which rank, before any data is read.

A plan is a pure function of (indexes, mixture, seed, cursor). Every process computes the same plan, so nothing has to be broadcast. The
cursor is a few integers, so a resume is exact. Sequences are drawn independently of the number of processes, so a global batch has the same
samples for any data-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.plan.balance import BY_TOKENS, Batching, Costs, Work
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.mixture import choose_sources
from megatron_mm.data.plan.packing import Window, check_largest_image, pack_window
from megatron_mm.data.plan.stream import SampleStream
from megatron_mm.data.sources.source import Source


@dataclass(frozen=True)
class PlanState:
    """The cursor: number of sequences drawn from each source, and its position in the source's stream."""

    drawn: tuple[int, ...]
    """Number of sequences drawn from each source so far."""
    window: tuple[int, ...]
    """For each source, the window of its stream that contains its next sequence."""
    next_sequence: tuple[int, ...]
    """For each source, the number of the next sequence within that window."""

    def to_dict(self) -> dict[str, Any]:
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PlanState:
        return cls(**{name: tuple(numbers) for name, numbers in values.items()})


@dataclass(frozen=True)
class PackedSequence:
    """One packed sequence: pieces [first, last) of a window of a source."""

    source: int
    window: Window
    first: int
    last: int
    num_tokens: int
    num_images: int
    """Number of images, or of tiles if images are cut into tiles."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece."""
        return self.window.end[self.first : self.last] - self.window.begin[self.first : self.last]

    @cached_property
    def work(self) -> Work:
        return Work(tokens=self.num_tokens, squares=int((self.lengths**2).sum()), images=self.num_images)


@dataclass(frozen=True)
class GlobalBatch:
    """One global batch."""

    sequences: list[PackedSequence]
    batching: Batching
    """How the sequences are grouped into micro-batches."""
    next_state: PlanState

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens, including image tokens but not padding."""
        return sum(sequence.num_tokens for sequence in self.sequences)

    @cached_property
    def num_images(self) -> int:
        return sum(sequence.num_images for sequence in self.sequences)

    @cached_property
    def works(self) -> list[Work]:
        """Work of each sequence."""
        return [sequence.work for sequence in self.sequences]

    @cached_property
    def sum_squared_lengths(self) -> int:
        """Sum over documents of the squared length, to which the cost of attention is proportional."""
        return sum(work.squares for work in self.works)

    @property
    def fill(self) -> float:
        """Fraction of the sequences' capacity that is filled with tokens."""
        return self.num_tokens / (len(self.sequences) * self.batching.sequence_length)

    def micro_batches_of(self, data_rank: int, data_size: int) -> list[list[PackedSequence]]:
        """Return the micro-batches of a data-parallel rank (see `Batching.micro_batches`)."""
        mine = self.batching.micro_batches(self.works, data_size)[data_rank]
        return [[self.sequences[i] for i in group] for group in mine]


class Plan:
    """Plans global batches over the sources of a split."""

    def __init__(
        self,
        indexes: Sequence[Source],
        *,
        weights: Sequence[float],
        limits: Limits,
        image: ImageInput,
        packing_window: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        token_multiple: int = 1,
        costs: Costs = BY_TOKENS,
        fewest_micro_batches: bool = False,
    ) -> None:
        self.indexes = list(indexes)
        self.weights = list(weights)
        self.limits = limits
        self.image = image
        self.packing_window = packing_window
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.batching = Batching(
            micro_batch_size=micro_batch_size,
            sequence_length=limits.sequence_length,
            max_images=limits.max_images,
            costs=costs,
            token_multiple=token_multiple,
            fewest=fewest_micro_batches,
        )
        self._streams = [SampleStream(index, image, seed=self._seed_of(number)) for number, index in enumerate(self.indexes)]
        self._windows: dict[int, tuple[int, Window]] = {}
        check_largest_image(limits, image)

    def initial_state(self) -> PlanState:
        """Return the cursor before the first batch."""
        zeros = (0,) * len(self.indexes)
        return PlanState(drawn=zeros, window=zeros, next_sequence=zeros)

    def batch(self, state: PlanState) -> GlobalBatch:
        """Return the global batch at a cursor; its `next_state` is the cursor after it."""
        drawn, window, used = list(state.drawn), list(state.window), list(state.next_sequence)
        sequences = []
        for source in choose_sources(self.weights, drawn, self.global_batch_size):
            packed = self._window(source, window[source])
            while used[source] >= packed.num_sequences:
                window[source] += 1
                used[source] = 0
                packed = self._window(source, window[source])
            number = used[source]
            sequences.append(
                PackedSequence(
                    source=source,
                    window=packed,
                    first=packed.first_pieces[number],
                    last=packed.first_pieces[number + 1],
                    num_tokens=packed.tokens[number],
                    num_images=packed.images_of[number],
                )
            )
            used[source] += 1
            drawn[source] += 1
        return GlobalBatch(
            sequences=sequences,
            batching=self.batching,
            next_state=PlanState(drawn=tuple(drawn), window=tuple(window), next_sequence=tuple(used)),
        )

    def _window(self, source: int, number: int) -> Window:
        """Return a packed window. The last window of each source is kept, because sequences are taken from it one after another."""
        kept = self._windows.get(source)
        if kept is None or kept[0] != number:
            first = number * self.packing_window
            samples = self._streams[source].read(first, self.packing_window)
            seed = self._seed_of(source) + 7919 * number
            packed = pack_window(self.indexes[source], samples, self.limits, self.image, seed=seed, first_position=first)
            kept = (number, packed)
            self._windows[source] = kept
        return kept[1]

    def _seed_of(self, source: int) -> int:
        return self.seed * 1_000_003 + source

    def describe(self, batch: GlobalBatch) -> Iterator[str]:
        """Describe a global batch in lines of text."""
        pictures = self.image.squares
        micro_batches = batch.micro_batches_of(0, 1)
        yield (
            f"  {len(batch.sequences)} sequences, {batch.num_tokens:,} tokens, {batch.num_images:,} {pictures}, "
            f"{100 * batch.fill:.2f}% full, {len(micro_batches)} micro-batches"
        )
        for source, index in enumerate(self.indexes):
            mine = [sequence for sequence in batch.sequences if sequence.source == source]
            documents = sum(sequence.last - sequence.first for sequence in mine)
            images = sum(sequence.num_images for sequence in mine)
            yield f"  {index.name}: {len(mine)} sequences, {documents:,} documents, {images:,} {pictures}"
        images_of = [sum(sequence.num_images for sequence in micro_batch) for micro_batch in micro_batches]
        yield f"  {pictures} of a micro-batch: {min(images_of)} to {max(images_of)}"


def image_owners(num_images: int, tensor_size: int) -> np.ndarray:
    """Return the tensor-parallel rank that decodes and encodes each image of a micro-batch: [num_images]. All images cost the same."""
    return np.arange(num_images, dtype=np.int64) % tensor_size


def encoding_stages(owners: Sequence[np.ndarray], *, stages: int) -> list[np.ndarray]:
    """Return the pipeline rank that encodes each image of a step, for each micro-batch.

    The images that a tensor-parallel rank encodes in a step are split into equal runs, one for each stage. Worked example: 2 stages, owners
    [0, 1, 0] and [0]. Rank 0 has images 0 and 2 of the first micro-batch and one of the second: the first two go to stage 0, the last to
    stage 1. Rank 1 has one image, which goes to stage 0. The result is [0, 0, 0] and [1].

    Args:
        owners: for each micro-batch of a data-parallel rank, the tensor-parallel rank of each image.
    """
    every = np.concatenate([np.zeros(0, dtype=np.int64), *owners])
    result = np.zeros_like(every)
    for rank in np.unique(every):
        mine = np.flatnonzero(every == rank)
        result[mine] = np.arange(len(mine)) * stages // len(mine)
    return np.split(result, np.cumsum([len(part) for part in owners])[:-1])


def tile_owners(num_tiles: int, tensor_size: int) -> np.ndarray:
    """Return the tensor-parallel rank that encodes each tile of a micro-batch: [num_tiles].

    Neighbouring tiles go to the same rank, so that few images are decoded by two ranks. Worked example: 7 tiles on 3 ranks: 0 0 0 1 1 2 2.
    """
    return np.arange(num_tiles, dtype=np.int64) * tensor_size // max(1, num_tiles)
