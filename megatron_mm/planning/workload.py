"""The workload of a process in a step: the tokens, document lengths and images of its micro-batches.

If the experiment's data is available, the workload comes from its plan. Otherwise it is drawn at random, with lengths that we chose,
because MM1's are not published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_mm.config import Experiment
from megatron_mm.data.plan.balance import Batching, Costs, Work
from megatron_mm.data.plan.plan import Plan
from megatron_mm.families.registry import family_of
from megatron_mm.flops import StepWork

CAPTION_TOKENS = 90
"""Mean number of text tokens in a caption; the number is drawn from a gamma distribution of shape 4."""
DOCUMENT_TOKENS = 700
"""Mean number of text tokens in an interleaved or a text document, from the same kind of distribution."""
IMAGES_OF_DOCUMENT = 3.0
"""Mean number of images in an interleaved document, which has at least one. With sub-images every document has exactly one image."""


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one data-parallel rank."""

    tokens: int
    """Computed tokens, padding included."""
    real_tokens: int
    sum_squared_lengths: int
    """Sum of the squared lengths of documents, including padding, which counts as one: the work of attention."""
    images: int


@dataclass(frozen=True)
class Workload:
    """The work of one data-parallel rank in a step, and of all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    whole: StepWork
    """Work of all ranks without padding, from which FLOPs are counted."""
    drawn: bool
    """Drawn at random and not from real data."""


class Workloads:
    """Distributes the first global batch of an experiment over data-parallel ranks, in micro-batches of any size (`data.plan.balance`)."""

    def __init__(self, experiment: Experiment, *, plan: Plan | None = None, images: int | None = None) -> None:
        """
        Args:
            plan: plan of the experiment's data; without one, sequences are drawn.
            images: largest number of images in a sequence; sequences are then drawn, with as many images as fit up to this number.
        """
        most = experiment.data.max_images_per_sequence
        if images is not None and not 0 <= images <= most:
            raise ValueError(
                f"images is {images}, but must be from 0 to data.max_images_per_sequence = {most}: "
                f"add --data.max-images-per-sequence {max(images, 1)}"
            )
        self.experiment = experiment
        self.drawn = plan is None or images is not None
        if plan is not None and images is None:
            self._works = plan.batch(plan.initial_state()).works
        else:
            rng = np.random.default_rng(0)
            self._works = [_sequence(experiment, rng, images=images) for _ in range(experiment.train.global_batch_size)]
        self._costs = _costs(experiment)
        self._made: dict[tuple[int, int, int], Workload] = {}

    def of(self, *, data_size: int, micro_batch_size: int | None = None, token_multiple: int | None = None) -> Workload:
        """Return the work of one of `data_size` ranks. Raises ValueError if the batch cannot be divided evenly."""
        train, data = self.experiment.train, self.experiment.data
        size = micro_batch_size or train.micro_batch_size
        replace(self.experiment, train=replace(train, micro_batch_size=size)).num_micro_batches(data_size)
        multiple = token_multiple or self.experiment.token_multiple
        key = (data_size, size, multiple)
        if key not in self._made:
            batching = Batching(
                micro_batch_size=size,
                sequence_length=data.sequence_length,
                max_images=data.max_images_per_sequence,
                costs=self._costs,
                token_multiple=multiple,
                fewest=train.fewest_micro_batches,
            )
            self._made[key] = self._distributed(batching, data_size)
        return self._made[key]

    def _distributed(self, batching: Batching, data_size: int) -> Workload:
        works = self._works
        micro = []
        for group in batching.micro_batches(works, data_size)[0]:
            real = sum(works[i].tokens for i in group)
            padding = batching.padded(real) - real
            squares = sum(works[i].squares for i in group) + padding**2
            micro.append(MicroBatch(real + padding, real, squares, sum(works[i].images for i in group)))
        whole = StepWork(
            num_tokens=sum(work.tokens for work in works),
            sum_squared_lengths=sum(work.squares for work in works),
            num_images=sum(work.images for work in works),
        )
        return Workload(tuple(micro), whole, drawn=self.drawn)


def _costs(experiment: Experiment) -> Costs:
    """FLOPs of training per token, per unit of squared length and per image, by which micro-batches are balanced."""
    flops, policy = family_of(experiment.model).step_flops, experiment.train.freeze_policy
    nothing = StepWork(num_tokens=0, sum_squared_lengths=0, num_images=0)
    token, square, image = (
        round(flops(experiment.model, policy, replace(nothing, **{part: 1})))
        for part in ("num_tokens", "sum_squared_lengths", "num_images")
    )
    return Costs(token=token, square=square, image=image)


def _sequence(experiment: Experiment, rng: np.random.Generator, *, images: int | None) -> Work:
    """Draw a packed sequence from one source of the mixture."""
    data = experiment.data
    names = list(data.sources)
    weights = np.array([data.mixture[name] for name in names])
    source = str(rng.choice(names, p=weights / weights.sum()))
    family = family_of(experiment.model)
    image = family.image_input(experiment.model)
    squares = image.max_tiles  # an image, or its sub-images; grids of tiles are drawn as images
    room, pictures, lengths = data.sequence_length, data.max_images_per_sequence if images is None else images, []
    held = 0
    for _ in range(10_000):
        mean = CAPTION_TOKENS if source == "pairs" else DOCUMENT_TOKENS
        text = 2 + int(rng.gamma(4.0, min(mean, data.sequence_length / 3) / 4.0))
        if source == "text":
            count = 0
        elif source == "pairs" or squares > 1:
            count = 1
        else:
            count = 1 + int(rng.poisson(IMAGES_OF_DOCUMENT - 1))
        if data.max_tiles is not None:
            count = int(rng.integers(max(1, data.max_images_per_sequence // 2), data.max_images_per_sequence + 1))
        if images is not None:
            count = min(images, max(count, 1))
        size_of_image = squares * image.tokens + 2
        count = min(count, pictures // squares, max(0, (room - text) // size_of_image))
        size = min(room, text + count * size_of_image)
        if size < 16 or (count == 0 and source in ("pairs",)):
            break
        lengths.append(size)
        room, pictures, held = room - size, pictures - squares * count, held + squares * count
        if room < 32:
            break
    real = data.sequence_length - room
    return Work(tokens=real, squares=sum(x * x for x in lengths), images=held)
