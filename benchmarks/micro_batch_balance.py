"""How alike the micro-batches are that data-parallel ranks compute at the same time: the costliest of them over their mean.

    .venv/bin/python benchmarks/micro_batch_balance.py

The batch is MM1's, from made-up lengths (see `plan_time.py`), dealt to 32 ranks; costs are mm1_30b's FLOPs. The baseline is the version
before micro-batches were balanced by cost: sequences by number, most images first, and every one computed to its full length. There a
micro-batch costs what its padded tokens do, so the baseline is given twice: as it was, all alike and all padding computed, and the same
micro-batches without padding. `images` and `attention` say the same of images and of attention's part of the cost, `of ranks` of that
part summed over a rank's micro-batches. The columns named `at best` are what `all k` and `attention` would be if the same micro-batches
were dealt by that alone: sorted by it and cut into rounds, which no other way of dealing them beats.
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
    """The baseline's micro-batches: [ranks][micro-batches][sequences]."""
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
    """How alike micro-batches are, each number a largest over a mean."""

    of_k: list[float]
    """For each k, the costliest k-th micro-batch."""
    all_k: float
    """What ranks that wait for each other at every k lose in all."""
    all_at_best: float
    """The same, of the same micro-batches sorted by cost: the largest of a round is never less than in that order."""
    images: float
    """The same of images."""
    attention: float
    """The same of attention's cost."""
    attention_at_best: float
    """The same of attention's cost, of the same micro-batches sorted by it."""
    of_ranks: float
    """Attention's cost of a rank's whole share of the batch."""


def imbalance(ranks: list[list[list[int]]], works: list[Work], costs: Costs) -> Level:
    """Of the micro-batches of a global batch."""
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
    """[ranks, rounds]: the largest of each round, summed, over the means."""
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
    """Of the cost of one document that fills a sequence."""
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
