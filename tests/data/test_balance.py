"""Micro-batches stay within the budget, have similar costs, and are only as long as their tokens."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mm.data.plan.balance import Batching, Costs, Work


def by_tokens(*tokens: int) -> list[Work]:
    return [Work(tokens=count, squares=0, images=0) for count in tokens]


EXAMPLE = by_tokens(90, 80, 50, 40, 40, 30, 20, 10)


def sizes(ranks: list[list[list[int]]], works: list[Work]) -> list[list[list[int]]]:
    return [[[works[i].tokens for i in group] for group in rank] for rank in ranks]


def test_the_worked_example() -> None:
    batching = Batching(micro_batch_size=2, sequence_length=100, max_images=1, fewest=True)
    assert sizes(batching.micro_batches(EXAMPLE, 2), EXAMPLE) == [[[90, 40, 40, 10]], [[80, 50, 30, 20]]]


def test_micro_batches_are_as_many_as_before_unless_fewer_are_asked_for() -> None:
    batching = Batching(micro_batch_size=2, sequence_length=100, max_images=1)
    assert sizes(batching.micro_batches(EXAMPLE, 2), EXAMPLE) == [[[90], [50, 30, 10]], [[80, 20], [40, 40]]]


def test_what_does_not_fit_by_cost_is_dealt_by_number() -> None:
    """With three full sequences and one costly one, balancing by cost would put all full ones into one micro-batch."""
    works = [Work(100, 0, 0), Work(100, 0, 0), Work(100, 0, 0), Work(10, 1000, 0)]
    batching = Batching(micro_batch_size=2, sequence_length=100, max_images=1, costs=Costs(square=1))
    (groups,) = batching.micro_batches(works, 1)
    assert sorted(len(group) for group in groups) == [2, 2]


@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize("fewest", [False, True])
def test_nothing_is_lost_and_the_budget_holds(data_size: int, fewest: bool) -> None:
    rng = np.random.default_rng(0)
    tokens, images = rng.integers(1, 101, 64).tolist(), rng.integers(0, 9, 64).tolist()
    works = [Work(count, count**2, held) for count, held in zip(tokens, images, strict=True)]
    batching = Batching(micro_batch_size=4, sequence_length=100, max_images=8, costs=Costs(image=10), fewest=fewest)
    ranks = batching.micro_batches(works, data_size)
    assert sorted(i for rank in ranks for group in rank for i in group) == list(range(64))
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks[0]) <= 16 // data_size
    for group in (group for rank in ranks for group in rank):
        assert group and sum(works[i].tokens for i in group) <= 400 and sum(works[i].images for i in group) <= 32


def test_a_micro_batch_is_padded_to_what_its_processes_need() -> None:
    batching = Batching(micro_batch_size=1, sequence_length=100, max_images=1, token_multiple=32)
    assert [batching.padded(tokens) for tokens in (1, 32, 33)] == [32, 32, 64]
