"""Balance of the micro-batches that data-parallel ranks compute at the same time: the costliest one's cost over the mean.

    .venv/bin/python benchmarks/micro_batch_balance.py

The batch is MM1's, with synthetic lengths (see `plan_time.py`), distributed over 32 ranks; costs are mm1_30b's FLOPs. The baseline is the
method used before micro-batches were balanced by cost: sequences are distributed by number of images, most images first; its micro-batches
are measured here without padding. `images` and `attention` are the same ratio for images and for attention's part of the cost; `of ranks`
is the ratio for that part summed over a rank's micro-batches. The columns named `at best` are the lowest possible values of `all k` and
`attention` for the same micro-batches: sorted by that cost alone and cut into rounds.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from plan_time import IMAGE, IMAGES, LENGTH, SEQUENCES, open_made_up_index, write_made_up_index

from megatron_mm.data.plan.balance import Costs, Work
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.plan import Plan
from megatron_mm.data.sources.source import Kind, Source
from megatron_mm.families.recipes import get_recipe
from megatron_mm.run.data import costs as costs_of

RANKS = 32


def by_images(works: list[Work], micro_batch_size: int) -> list[list[list[int]]]:
    """Return the baseline's micro-batches: [ranks][micro-batches][sequences]."""
    groups: list[list[int]] = [[] for _ in range(len(works) // micro_batch_size)]
    least = [(0, 0, number) for number in range(len(groups))]
    for i in sorted(range(len(works)), key=lambda i: (-works[i].images, -works[i].tokens)):
        images, tokens, number = heapq.heappop(least)
        groups[number].append(i)
        if len(groups[number]) < micro_batch_size:
            heapq.heappush(least, (images + works[i].images, tokens + works[i].tokens, number))
    groups.sort(key=lambda group: -sum(works[i].images for i in group))
    rounds = [groups[first : first + RANKS] for first in range(0, len(groups), RANKS)]
    return [[dealt[rank if k % 2 == 0 else -1 - rank] for k, dealt in enumerate(rounds)] for rank in range(RANKS)]


@dataclass(frozen=True)
class Level:
    """Balance of micro-batches; each number is a maximum over a mean (1 is perfect)."""

    of_k: list[float]
    """For each k, the cost of the costliest k-th micro-batch."""
    all_k: float
    """Cost of the whole batch if ranks wait for each other after every k-th micro-batch."""
    all_at_best: float
    """`all_k` of the same micro-batches sorted by cost: no other order has lower maxima."""
    images: float
    """Images, with maxima over ranks for each k summed as in `all_k`."""
    attention: float
    """Attention's cost, summed as in `all_k`."""
    attention_at_best: float
    """`attention` of the same micro-batches sorted by attention's cost."""
    of_ranks: float
    """Attention's cost of a rank's whole share of the batch."""


def imbalance(ranks: list[list[list[int]]], works: list[Work], costs: Costs) -> Level:
    """Measure the balance of a global batch's micro-batches."""
    cost, images, squares = (
        np.array([[sum(of(works[i]) for i in group) for group in rank] for rank in ranks], dtype=float)
        for of in (costs.of, lambda work: work.images, lambda work: work.squares)
    )
    total_cost, of_images, attention = (_over_mean(load) for load in (cost, images, squares))
    best_cost, best_attention = (_over_mean(np.sort(load.ravel()).reshape(-1, len(ranks)).T) for load in (cost, squares))
    total = squares.sum(axis=1)
    of_k = (cost.max(axis=0) / cost.mean(axis=0)).tolist()
    return Level(of_k, total_cost, best_cost, of_images, attention, best_attention, float(total.max() / total.mean()))


def _over_mean(load: np.ndarray) -> float:
    """Return the sum of the rounds' maxima over the sum of their means, for a load [ranks, rounds]."""
    return float(load.max(axis=0).sum() / load.mean(axis=0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000, help="of each source (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="global batches (default: %(default)s)")
    arguments = parser.parse_args()
    costs = costs_of(get_recipe("mm1_30b"))
    kinds: tuple[Kind, ...] = ("interleaved", "pairs", "text")
    heads = ("worst k", "mean k", "all k", "at best", "images", "attention", "at best", "of ranks")
    print(f"attention is {100 * attention_share(costs):.1f}% of the cost of a full text of {LENGTH} tokens")
    print(f"{'micro-batch':>12} {'':32}" + "".join(f" {head:>9}" for head in heads) + f" {'micro-batches':>14}")
    with tempfile.TemporaryDirectory() as root:
        for kind in kinds:
            (Path(root) / kind).mkdir()
            write_made_up_index(Path(root) / kind, kind, samples=arguments.samples)
        measure([open_made_up_index(Path(root) / kind, kind) for kind in kinds], costs, batches=arguments.batches)


def attention_share(costs: Costs) -> float:
    """Return attention's share of the cost of one document that fills a sequence."""
    whole = Work(tokens=LENGTH, squares=LENGTH**2, images=0)
    return costs.square * whole.squares / costs.of(whole)


def measure(indexes: Sequence[Source], costs: Costs, *, batches: int) -> None:
    """Print the lines of each micro-batch size."""
    for size in (1, 2, 4):
        plans = {
            fewest: Plan(
                indexes,
                weights=[0.45, 0.45, 0.10],
                limits=Limits(LENGTH, IMAGES),
                image=IMAGE,
                packing_window=4096,
                seed=0,
                global_batch_size=SEQUENCES,
                micro_batch_size=size,
                costs=costs,
                fewest_micro_batches=fewest,
            )
            for fewest in (False, True)
        }
        found: dict[str, list[tuple[Level, int]]] = {}
        state = plans[False].initial_state()
        for _ in range(batches):
            batch = plans[False].batch(state)
            dealt = {
                "most images first (baseline)": by_images(batch.works, size),
                "by cost": plans[False].batching.micro_batches(batch.works, RANKS),
                "by cost, fewest": plans[True].batching.micro_batches(batch.works, RANKS),
            }
            for name, ranks in dealt.items():
                found.setdefault(name, []).append((imbalance(ranks, batch.works, costs), len(ranks[0])))
            state = batch.next_state
        for plan, measured in found.items():
            of_k = [ratio for level, _ in measured for ratio in level.of_k]
            fields = ("all_k", "all_at_best", "images", "attention", "attention_at_best", "of_ranks")
            means = (statistics.mean(getattr(level, name) for level, _ in measured) for name in fields)
            counts = sorted({count for _, count in measured})
            numbers = "".join(f" {number:9.4f}" for number in (max(of_k), statistics.mean(of_k), *means))
            print(f"{size:>12} {plan:32}{numbers} {counts!s:>14}", flush=True)


if __name__ == "__main__":
    main()
