"""How alike the micro-batches are that data-parallel ranks compute at the same time: the costliest of them over their mean.

    .venv/bin/python benchmarks/micro_batch_balance.py

The batch is MM1's, from made-up lengths (see `plan_time.py`), dealt to 32 ranks; costs are mm1_30b's FLOPs. The baseline is the version
before micro-batches were balanced by cost: sequences by number, most images first, and every one computed to its full length. There a
micro-batch costs what its padded tokens do, so the baseline is given twice: as it was, all alike and all padding computed, and the same
micro-batches without padding.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
from typing import Any

import numpy as np
from plan_time import IMAGE, IMAGES, LENGTH, SEQUENCES, made_up_index

from megatron_mm.data.plan.balance import Costs, Work
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.plan import Plan
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


def imbalance(ranks: list[list[list[int]]], works: list[Work], costs: Costs) -> tuple[list[float], float]:
    """(for each k the costliest k-th micro-batch over the mean, what ranks that wait for each other at every k lose in all)."""
    found = np.array([[sum(costs.of(works[i]) for i in group) for group in rank] for rank in ranks])
    return (found.max(axis=0) / found.mean(axis=0)).tolist(), float(found.max(axis=0).sum() / found.mean(axis=0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8, help="global batches (default: %(default)s)")
    arguments = parser.parse_args()
    costs = costs_of(get_recipe("mm1_30b"))
    rng = np.random.default_rng(0)
    kinds = ("interleaved", "pairs", "text")
    indexes = [made_up_index(kind, kind, samples=200_000, rng=rng) for kind in kinds]
    print(f"{'micro-batch':>12} {'':32} {'worst k':>9} {'mean k':>9} {'all k':>9} {'micro-batches':>14}")
    for size in (1, 4):
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
        found: dict[str, list[Any]] = {}
        state = plans[False].initial_state()
        for _ in range(arguments.batches):
            batch = plans[False].batch(state)
            dealt = {
                "most images first (baseline)": by_images(batch.works, size),
                "by cost": plans[False].batching.micro_batches(batch.works, RANKS),
                "by cost, fewest": plans[True].batching.micro_batches(batch.works, RANKS),
            }
            for name, ranks in dealt.items():
                found.setdefault(name, []).append((*imbalance(ranks, batch.works, costs), len(ranks[0])))
            state = batch.next_state
        for name, measured in found.items():
            of_k = [ratio for ratios, _, _ in measured for ratio in ratios]
            overall = statistics.mean(total for _, total, _ in measured)
            counts = sorted({count for _, _, count in measured})
            print(f"{size:>12} {name:32} {max(of_k):9.4f} {statistics.mean(of_k):9.4f} {overall:9.4f} {counts!s:>14}")


if __name__ == "__main__":
    main()
