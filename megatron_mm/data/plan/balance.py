"""Groups sequences into micro-batches and assigns these to data-parallel ranks, so that no rank waits long for another.

A micro-batch is as long as its tokens, because padding is not computed. So `micro_batch_size` is not a count but a budget, the tokens and
images of that many full sequences: a micro-batch may contain more sequences if they are short.

Worked example: a budget of two sequences of 100 tokens, sequences of 90 80 50 40 40 30 20 10 tokens whose cost equals their length, and two
data-parallel ranks. The tokens fill 1.8 budgets, so two micro-batches are enough, whereas two sequences each would make four. The costliest
remaining sequence goes to the cheapest micro-batch: this gives 90 40 40 10 and 80 50 30 20, with 180 tokens each, one for each rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mm.data.plan.rounds import deal


@dataclass(frozen=True)
class Work:
    """The work that a sequence or a micro-batch requires."""

    tokens: int
    squares: int
    """Sum over documents of the squared length, to which the cost of attention is proportional."""
    images: int


@dataclass(frozen=True)
class Costs:
    """Costs of the parts of a sequence, all in the same unit (for example FLOPs). They are integers, so that all processors compute the
    same sums."""

    token: int = 1
    square: int = 0
    image: int = 0

    def of(self, work: Work) -> int:
        return self.token * work.tokens + self.square * work.squares + self.image * work.images


BY_TOKENS = Costs()
_EXCHANGES = 4
"""Maximum number of exchanges per micro-batch."""
_PARTNERS = 4
"""Number of micro-batches, cheapest first, that the costliest one may exchange a sequence with."""


@dataclass(frozen=True)
class Batching:
    """How sequences are grouped into micro-batches."""

    micro_batch_size: int
    """Number of full sequences that a process can handle at once."""
    sequence_length: int
    """Tokens in a full sequence."""
    max_images: int
    """Images in a full sequence."""
    costs: Costs = BY_TOKENS
    token_multiple: int = 1
    """The tokens of a micro-batch are padded to a multiple of this number."""
    fewest: bool = False
    """Make as few micro-batches as the budget allows, rather than micro_batch_size sequences on average."""

    def padded(self, tokens: int) -> int:
        """Tokens of a micro-batch, padding included."""
        return -(-tokens // self.token_multiple) * self.token_multiple

    def micro_batches(self, works: Sequence[Work], data_size: int) -> list[list[list[int]]]:
        """Return the sequences of each micro-batch of each data-parallel rank: [data_size][micro-batches][sequences].

        The k-th micro-batches of all ranks have similar costs and image counts, and so do the ranks (`rounds.deal`). The costliest
        micro-batches run first.
        """
        costs = [self.costs.of(work) for work in works]
        groups = self._group(works, costs, data_size)
        totals = [sum(costs[i] for i in group) for group in groups]
        if data_size == 1:
            return [[groups[number] for number in sorted(range(len(groups)), key=lambda number: -totals[number])]]
        images = [sum(works[i].images for i in group) for group in groups]
        squares = [sum(works[i].squares for i in group) for group in groups]
        loads = (np.array(load, dtype=np.int64) for load in (images, totals, squares))
        return [[groups[number] for number in rank] for rank in deal(*loads, data_size=data_size).T.tolist()]

    def _group(self, works: Sequence[Work], costs: list[int], data_size: int) -> list[list[int]]:
        usual = len(works) // self.micro_batch_size
        if self.micro_batch_size == 1 and not self.fewest:
            return [[i] for i in range(len(works))]
        tokens, images = self.micro_batch_size * self.sequence_length, self.micro_batch_size * self.max_images
        needed = max(-(-sum(work.tokens for work in works) // tokens), -(-sum(work.images for work in works) // images), 1)
        counts = range(-(-needed // data_size) * data_size, usual, data_size) if self.fewest else range(0)
        for count in (*counts, usual):
            groups = _fill(works, costs, count, tokens=tokens, images=images)
            if groups is not None:
                return _even_out(groups, works, costs, tokens=tokens, images=images)
        groups = _fill(works, costs, usual, tokens=tokens, images=images, most=self.micro_batch_size)
        assert groups is not None, "micro_batch_size sequences are within the budget"
        return _even_out(groups, works, costs, tokens=tokens, images=images)


def _fill(
    works: Sequence[Work], costs: list[int], count: int, *, tokens: int, images: int, most: int | None = None
) -> list[list[int]] | None:
    """Distribute the sequences over `count` groups of similar cost within the budget.

    Each sequence, costliest first, is added to the cheapest group that has room for it. Returns None if a sequence fits into no group.

    Args:
        most: maximum number of sequences in a group; None for no limit.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    room = [(tokens, images)] * count
    cheapest = [(0, number) for number in range(count)]
    for i in sorted(range(len(works)), key=lambda i: -costs[i]):
        work, full = works[i], []
        while cheapest:
            cost, number = heapq.heappop(cheapest)
            if work.tokens <= room[number][0] and work.images <= room[number][1] and (most is None or len(groups[number]) < most):
                break
            full.append((cost, number))
        else:
            return None
        groups[number].append(i)
        room[number] = room[number][0] - work.tokens, room[number][1] - work.images
        for entry in (*full, (cost + costs[i], number)):
            heapq.heappush(cheapest, entry)
    return groups


def _even_out(groups: list[list[int]], works: Sequence[Work], costs: list[int], *, tokens: int, images: int) -> list[list[int]]:
    """Exchange single sequences between the costliest group and cheap ones while that brings their costs closer. Works in place."""
    totals = [sum(costs[i] for i in group) for group in groups]

    def fits(group: list[int], leaves: int, comes: int) -> bool:
        after = [i for i in group if i != leaves] + [comes]
        return sum(works[i].tokens for i in after) <= tokens and sum(works[i].images for i in after) <= images

    for _ in range(_EXCHANGES * len(groups)):
        high = max(range(len(groups)), key=totals.__getitem__)
        for low in sorted(range(len(groups)), key=totals.__getitem__)[:_PARTNERS]:
            gap = totals[high] - totals[low]
            pairs = sorted((abs(gap - 2 * (costs[a] - costs[b])), a, b) for a in groups[high] for b in groups[low])
            found = next(((a, b) for off, a, b in pairs if off < gap and fits(groups[high], a, b) and fits(groups[low], b, a)), None)
            if found is not None:
                a, b = found
                groups[high][groups[high].index(a)], groups[low][groups[low].index(b)] = b, a
                totals[high] += costs[b] - costs[a]
                totals[low] += costs[a] - costs[b]
                break
        else:
            break
    return groups
