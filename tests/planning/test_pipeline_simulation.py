"""The simulated pipeline against known results of its schedules."""

from __future__ import annotations

import pytest

from megatron_mm.planning.pipeline import PipelineTimes, order, simulate


def _even(stages: int, count: int, *, forward: float = 1.0, backward: float = 2.0) -> PipelineTimes:
    return PipelineTimes(forward=[[forward] * count] * stages, backward=[[backward] * count] * stages, saved=[[1.0] * count] * stages)


@pytest.mark.parametrize(("ranks", "count"), [(1, 3), (2, 2), (4, 8), (8, 32)])
def test_one_forward_one_backward_takes_ranks_minus_one_more_micro_batches(ranks: int, count: int) -> None:
    result = simulate(_even(ranks, count), ranks=ranks, chunks=1)
    assert result.seconds == pytest.approx(3.0 * (count + ranks - 1))
    assert result.in_flight == tuple(min(ranks - rank, count) for rank in range(ranks))


@pytest.mark.parametrize(("ranks", "chunks", "count"), [(2, 2, 4), (4, 2, 8), (4, 3, 16), (8, 4, 32)])
def test_interleaving_divides_the_bubble(ranks: int, chunks: int, count: int) -> None:
    times = _even(ranks * chunks, count, forward=1.0 / chunks, backward=2.0 / chunks)
    result = simulate(times, ranks=ranks, chunks=chunks)
    assert result.seconds == pytest.approx(3.0 * (count + (ranks - 1) / chunks))


def test_orders_are_megatrons() -> None:
    assert order(ranks=2, chunks=1, micro_batches=3, rank=0) == [
        ("forward", 0, 0),
        ("forward", 0, 1),
        ("backward", 0, 0),
        ("forward", 0, 2),
        ("backward", 0, 1),
        ("backward", 0, 2),
    ]
    first = [(chunk, number) for kind, chunk, number in order(ranks=2, chunks=2, micro_batches=4, rank=0) if kind == "forward"]
    assert first == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


def test_the_slowest_stage_sets_the_pace() -> None:
    count, ranks = 20, 4
    forward = [[1.0] * count for _ in range(ranks)]
    forward[0] = [2.0] * count
    slow = simulate(PipelineTimes(forward=forward, backward=[[2.0] * count] * ranks), ranks=ranks, chunks=1)
    assert slow.seconds >= 4.0 * count
    assert slow.rank_busy[0] == pytest.approx(4.0 * count)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 9, 13])
def test_any_number_of_micro_batches_runs_to_its_end(count: int) -> None:
    for ranks, chunks in ((2, 2), (4, 2), (3, 3)):
        result = simulate(_even(ranks * chunks, count), ranks=ranks, chunks=chunks)
        assert result.seconds >= 3.0 * count * chunks
        assert max(result.saved_bytes) <= count * chunks
