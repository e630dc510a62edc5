"""What a process works on in a step: the tokens, document lengths and images of its micro-batches.

From the plan of real data where the experiment's data is here; else drawn, with lengths that are ours: MM1's lengths are not published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_mm.config import Experiment
from megatron_mm.families.registry import family_of
from megatron_mm.flops import StepWork

CAPTION_TOKENS = 90
"""Mean text tokens of an image's caption, drawn from a gamma distribution of shape 4."""
DOCUMENT_TOKENS = 700
"""Mean text tokens of an interleaved or a text document, drawn likewise."""
IMAGES_OF_DOCUMENT = 3.0
"""Mean images of an interleaved document, at least one."""


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one data-parallel rank."""

    tokens: int
    """Rows that are computed, padding included."""
    real_tokens: int
    sum_squared_lengths: int
    """Of documents, padding's own included: what attention computes."""
    images: int


@dataclass(frozen=True)
class Workload:
    """A step of one data-parallel rank, and of all."""

    micro_batches: tuple[MicroBatch, ...]
    whole: StepWork
    """All processes' real work, as FLOPs are counted on it."""
    drawn: bool
    """Not from real data."""


class Workloads:
    """The first global batch of an experiment, for any data-parallel size and micro-batch."""

    def __init__(self, experiment: Experiment, *, images: int | None = None) -> None:
        """
        Args:
            images: so many in every sequence, instead of what the data or the drawing says.
        """
        self.experiment = experiment
        self.drawn = images is not None or not experiment.data.path.is_dir()
        if self.drawn:
            rng = np.random.default_rng(0)
            count = experiment.train.global_batch_size
            self._sequences = sorted(
                (_sequence(experiment, rng, images=images) for _ in range(count)), key=lambda s: (-s.images, -s.real_tokens)
            )

    def of(self, *, data_size: int, micro_batch_size: int | None = None) -> Workload:
        """What one rank of so many works on. Raises ValueError where the batch cannot be cut evenly."""
        size = micro_batch_size or self.experiment.train.micro_batch_size
        experiment = replace(self.experiment, train=replace(self.experiment.train, micro_batch_size=size))
        experiment.num_micro_batches(data_size)
        return self._draw(data_size, size) if self.drawn else _planned(experiment, data_size)

    def _draw(self, data_size: int, size: int) -> Workload:
        """Micro-batches take every so manieth sequence of those with most images first; ranks take micro-batches in turn."""
        sequences, length = self._sequences, self.experiment.data.sequence_length
        groups = len(sequences) // size
        micro = tuple(
            MicroBatch(
                tokens=size * length,
                real_tokens=sum(s.real_tokens for s in group),
                sum_squared_lengths=sum(s.sum_squared_lengths for s in group),
                images=sum(s.images for s in group),
            )
            for group in (sequences[number::groups] for number in range(0, groups, data_size))
        )
        whole = StepWork(
            num_tokens=sum(s.real_tokens for s in sequences),
            sum_squared_lengths=sum(s.sum_squared_lengths - (s.tokens - s.real_tokens) ** 2 for s in sequences),
            num_images=sum(s.images for s in sequences),
        )
        return Workload(micro, whole, drawn=True)


def _planned(experiment: Experiment, data_size: int) -> Workload:
    from megatron_mm.run.data import make_plan

    plan = make_plan(experiment, split="train")
    batch = plan.batch(plan.initial_state())
    length = experiment.data.sequence_length
    own = []
    for sequences in batch.micro_batches_of(0, data_size):
        squares = sum(int((s.lengths**2).sum()) + (length - s.num_tokens) ** 2 for s in sequences)
        real, pictures = sum(s.num_tokens for s in sequences), sum(s.num_images for s in sequences)
        own.append(MicroBatch(len(sequences) * length, real, squares, pictures))
    whole = StepWork(num_tokens=batch.num_tokens, sum_squared_lengths=batch.sum_squared_lengths, num_images=batch.num_images)
    return Workload(tuple(own), whole, drawn=False)


def _sequence(experiment: Experiment, rng: np.random.Generator, *, images: int | None) -> MicroBatch:
    """A packed sequence of one source of the mixture."""
    data = experiment.data
    names = list(data.sources)
    weights = np.array([data.mixture[name] for name in names])
    source = str(rng.choice(names, p=weights / weights.sum()))
    family = family_of(experiment.model)
    image = family.image_input(experiment.model)
    room, pictures, lengths = data.sequence_length, data.max_images_per_sequence if images is None else images, []
    held = 0
    for _ in range(10_000):
        mean = CAPTION_TOKENS if source == "pairs" else DOCUMENT_TOKENS
        text = 2 + int(rng.gamma(4.0, min(mean, data.sequence_length / 3) / 4.0))
        if source == "text":
            count = 0
        elif source == "pairs":
            count = 1
        else:
            count = 1 + int(rng.poisson(IMAGES_OF_DOCUMENT - 1))
        if data.max_tiles is not None:
            count = int(rng.integers(max(1, data.max_images_per_sequence // 2), data.max_images_per_sequence + 1))
        if images is not None:
            count = min(images, max(count, 1))
        count = min(count, pictures, max(0, (room - text) // (image.tokens + 2)))
        size = min(room, text + count * (image.tokens + 2))
        if size < 16 or (count == 0 and source in ("pairs",)):
            break
        lengths.append(size)
        room, pictures, held = room - size, pictures - count, held + count
        if room < 32:
            break
    real = data.sequence_length - room
    return MicroBatch(data.sequence_length, real, sum(x * x for x in lengths) + room * room, held)
