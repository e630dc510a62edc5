"""The plan loses nothing, respects the limits, is the same on every process, and resumes from a few integers."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mm.config import Experiment
from megatron_mm.data.plan.plan import GlobalBatch, PlanState, encoding_stages, image_owners
from megatron_mm.families.recipes import get_recipe
from megatron_mm.run.data import make_plan


def experiment(path: Path, **data: object) -> Experiment:
    base = get_recipe("debug_mm1")
    return replace(base, data=replace(base.data, path=path, **data))


def contents(batch: GlobalBatch) -> list[tuple[int, int, int, int]]:
    """Return (source, sample, begin, end) of every piece, in order."""
    found = []
    for sequence in batch.sequences:
        window, pieces = sequence.window, slice(sequence.first, sequence.last)
        for sample, begin, end in zip(window.sample[pieces], window.begin[pieces], window.end[pieces], strict=True):
            found.append((sequence.source, int(sample), int(begin), int(end)))
    return found


def test_every_sample_of_an_epoch_is_used_once_and_whole(demo_data: Path) -> None:
    """For global batches that end within a window or span several."""
    for global_batch_size in (1, 2, 16):
        base = experiment(demo_data, mixture={"pairs": 1.0}, packing_window=30)
        sizes = replace(base.train, global_batch_size=global_batch_size, micro_batch_size=1)
        plan = make_plan(replace(base, train=sizes), split="train")
        assert len(plan.indexes[0]) == 120  # four windows
        state, seen = plan.initial_state(), []
        while len(seen) < 120:
            batch = plan.batch(state)
            seen += contents(batch)
            state = batch.next_state
        assert sorted(sample for _, sample, _, _ in seen[:120]) == list(range(120))


def test_a_resume_from_any_cursor_gives_the_same_batches(demo_data: Path) -> None:
    plan = make_plan(experiment(demo_data, packing_window=32), split="train")
    state, straight, cursors = plan.initial_state(), [], []
    for _ in range(12):
        cursors.append(json.dumps(state.to_dict()))
        batch = plan.batch(state)
        straight.append(contents(batch))
        state = batch.next_state
    assert max(state.window) > 3, "cursors lie in several windows"
    for number, cursor in enumerate(cursors):
        fresh = make_plan(experiment(demo_data, packing_window=32), split="train")
        state = PlanState.from_dict(json.loads(cursor))
        for expected in straight[number : number + 3]:
            batch = fresh.batch(state)
            assert contents(batch) == expected
            state = batch.next_state
    assert all(len(cursor) < 200 for cursor in cursors)


def test_the_mixture_holds_over_a_long_run(demo_data: Path) -> None:
    """Sequences of each source are within one of its share after every global batch, across windows and epochs."""
    weights = {"interleaved": 0.45, "pairs": 0.45, "text": 0.1}
    plan = make_plan(experiment(demo_data, mixture=weights, packing_window=64), split="train")
    state, counts = plan.initial_state(), [0, 0, 0]
    for step in range(1, 101):
        batch = plan.batch(state)
        for sequence in batch.sequences:
            counts[sequence.source] += 1
        state = batch.next_state
        total = step * plan.global_batch_size
        assert list(state.drawn) == counts
        assert all(abs(count - total * weight) <= 1 for count, weight in zip(counts, weights.values(), strict=True))
    assert min(state.window) > 2


def test_another_seed_makes_other_batches_and_epochs_differ(demo_data: Path) -> None:
    base = experiment(demo_data, mixture={"pairs": 1.0}, packing_window=120)  # a window is an epoch
    other = replace(base, train=replace(base.train, seed=base.train.seed + 1))
    first, second = (make_plan(settings, split="train") for settings in (base, other))
    assert contents(first.batch(first.initial_state())) != contents(second.batch(second.initial_state()))
    epochs = [first.batch(PlanState(drawn=(0,), window=(number,), next_sequence=(0,))).sequences[0].window for number in range(2)]
    assert sorted(epochs[0].sample) == sorted(epochs[1].sample) == list(range(120))
    assert (epochs[0].sample != epochs[1].sample).mean() > 0.9


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("data_size", [1, 2, 4, 8])
def test_the_ranks_share_a_global_batch_whatever_their_number(demo_data: Path, data_size: int, micro_batch_size: int) -> None:
    base = experiment(demo_data)
    plan = make_plan(replace(base, train=replace(base.train, micro_batch_size=micro_batch_size)), split="train")
    batch = plan.batch(plan.initial_state())
    dealt = [micro for rank in range(data_size) for micro in batch.micro_batches_of(rank, data_size)]
    assert len(dealt) == plan.global_batch_size // micro_batch_size
    key = [(s.source, s.first, s.last, id(s.window)) for micro in dealt for s in micro]
    assert sorted(key) == sorted((s.source, s.first, s.last, id(s.window)) for s in batch.sequences)
    assert contents(batch) == contents(make_plan(base, split="train").batch(plan.initial_state()))


def test_micro_batches_and_ranks_cost_alike(demo_data: Path) -> None:
    base = experiment(demo_data)
    plan = make_plan(replace(base, train=replace(base.train, global_batch_size=64, micro_batch_size=4)), split="train")
    batch = plan.batch(plan.initial_state())
    costs = [plan.batching.costs.of(work) for work in batch.works]

    def spread(groups: list[list[int]]) -> float:
        found = [sum(costs[i] for i in group) for group in groups]
        return max(found) / (sum(found) / len(found))

    ranks = plan.batching.micro_batches(batch.works, 4)
    naive = [list(range(i, i + 4)) for i in range(0, 64, 4)]
    assert sorted(i for rank in ranks for group in rank for i in group) == list(range(64))
    at_once = [spread(list(groups)) for groups in zip(*ranks, strict=True)]
    assert sum(at_once) / len(at_once) < spread(naive), at_once
    assert spread([[i for group in rank for i in group] for rank in ranks]) < 1.02
    assert np.bincount(image_owners(7, 4), minlength=4).tolist() == [2, 2, 2, 1]


def test_pipeline_ranks_encode_equal_shares() -> None:
    """Equal shares of each tensor-parallel rank's images in a step; including a micro-batch and a step without images."""
    found = encoding_stages([np.array([0, 1, 0]), np.array([], dtype=np.int64), np.array([0])], stages=2)
    assert [stages.tolist() for stages in found] == [[0, 0, 0], [], [1]]
    assert [stages.tolist() for stages in encoding_stages([np.array([], dtype=np.int64)] * 2, stages=4)] == [[], []]
    owners = [image_owners(count, 4) for count in (7, 0, 16, 3, 11)]
    stages = np.concatenate(encoding_stages(owners, stages=3))
    for rank in range(4):
        shares = np.bincount(stages[np.concatenate(owners) == rank], minlength=3)
        assert shares.max() - shares.min() <= 1


def test_long_documents_are_cut_between_images_and_nothing_is_lost(demo_data: Path) -> None:
    plan = make_plan(experiment(demo_data, mixture={"interleaved": 1.0}, sequence_length=32, packing_window=96), split="train")
    index, state, seen = plan.indexes[0], plan.initial_state(), {}
    first_window = plan.batch(state).sequences[0].window
    while state.window[0] < 1:
        batch = plan.batch(state)
        assert all(sequence.num_tokens <= 32 for sequence in batch.sequences)
        mine = [sequence for sequence in batch.sequences if sequence.window is first_window]
        for _, sample, begin, end in contents(replace(batch, sequences=mine)):
            seen.setdefault(sample, []).append((begin, end))
        state = batch.next_state
    assert len(seen) == 96
    for sample, pieces in seen.items():
        row = index.sample_rows[sample]
        length = 2 + int(row["text_tokens"]) + 16 * int(row["num_images"])
        pieces.sort()
        assert pieces[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
        assert pieces[-1][1] == length


def test_an_image_that_fits_no_sequence_is_an_error(demo_data: Path) -> None:
    with pytest.raises(ValueError, match=r"an image takes 16 tokens, more than data.sequence_length 12"):
        make_plan(experiment(demo_data, sequence_length=12), split="train")
