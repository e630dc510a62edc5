"""A process that others wait for is found, with the phase in which it is slow."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.families.mm1.model import MM1Model
from megatron_mm.run.data import TrainingData
from megatron_mm.run.slow_processes import Slow, SlowProcesses, _Window, pack, unpack
from megatron_mm.run.start import start
from megatron_mm.run.step_measures import is_due
from megatron_mm.training.phases import OWN_WORK, PHASES
from megatron_mm.training.trainer import Trainer

INTERVAL = 4
SLEEP = 0.6

Delays = list[tuple[str, int, range]]
"""(phase, rank, steps): the process of this rank sleeps in this phase of these steps."""


def train(data: Path, run_dir: Path, parallel: dict[str, Any], steps: int, delays: Delays) -> list[float]:
    """Train with delays; return the relative difference between each step's time and the sum of its phases."""
    mine = [(phase, steps) for phase, rank, steps in delays if rank == int(os.environ["RANK"])]
    now, missed = [0], []

    def sleep(phase: str) -> None:
        if any(phase == where and now[0] in steps for where, steps in mine):
            time.sleep(SLEEP)

    one_step, forward, next_batch = Trainer._one_step, MM1Model.forward, TrainingData.__next__

    def counted_step(self: Trainer) -> Any:
        now[0] = self.state.step + 1
        record = one_step(self)
        assert set(record.phases) == set(PHASES)
        missed.append(abs(record.seconds - sum(record.phases.values())) / record.seconds)
        return record

    def slow_forward(self: MM1Model, *args: Any, **kwargs: Any) -> Any:
        sleep("forward")
        return forward(self, *args, **kwargs)

    def slow_next(self: TrainingData) -> Any:
        sleep("data")
        return next_batch(self)

    Trainer._one_step, MM1Model.forward, TrainingData.__next__ = counted_step, slow_forward, slow_next
    SlowProcesses.WINDOWS, SlowProcesses.LEAST_SECONDS = 1, 0.0
    experiment = small_run(data, parallel=parallel, steps=steps, schedule_steps=40, global_batch_size=4)
    start(replace(experiment, monitor=replace(experiment.monitor, detail_interval=INTERVAL, slow_process=0.02)), run_dir)
    return missed


def found(run_dir: Path) -> dict[int, tuple[int, str]]:
    """Return the rank that exceeds its peers most, and the phase, by the last step of each window."""
    lines = [json.loads(line) for line in (run_dir / "phases.jsonl").read_text().splitlines()]
    return {line["step"]: (line["greatest"]["rank"], line["greatest"]["phase"]) for line in lines}


def events(run_dir: Path) -> Iterator[str]:
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "slow":
            yield event["text"]


@pytest.mark.slow
def test_a_delay_in_the_loader_of_one_process_and_in_the_forward_pass_of_another_are_found(demo_data: Path, tmp_path: Path) -> None:
    delays: Delays = [("data", 1, range(4, 8)), ("forward", 0, range(8, 12))]
    missed = run_processes(train, 2, demo_data, tmp_path, {}, 13, delays)
    windows = found(tmp_path)
    assert windows[8] == (1, "data") and windows[12] == (0, "forward")
    texts = list(events(tmp_path))
    assert any("rank 1 is slow in data" in text for text in texts) and any("rank 0 is slow in forward" in text for text in texts)
    assert max(max(of_rank) for of_rank in missed) < 0.01, "the phases of a step sum to it"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_delay_within_a_tensor_parallel_group_is_found(demo_data: Path, tmp_path: Path, world_size: int) -> None:
    """All members of the group wait in every layer; they differ in how long they wait."""
    last = world_size - 1
    delays: Delays = [("data", 1, range(4, 8)), ("forward", last, range(8, 12)), ("forward", last - 1, range(12, 16))]
    run_processes(train, world_size, demo_data, tmp_path, {"tensor": 2}, 17, delays)
    windows = found(tmp_path)
    assert windows[8] == (1, "data") and windows[12] == (last, "forward") and windows[16] == (last - 1, "forward")


@pytest.mark.slow
def test_a_stage_of_one_process_is_compared_with_its_earlier_windows(demo_data: Path, tmp_path: Path) -> None:
    run_processes(train, 2, demo_data, tmp_path, {"pipeline": 2}, 21, [("forward", 1, range(16, 20))])
    windows = found(tmp_path)
    assert windows[20] == (1, "forward")
    assert any("than before (" in text for text in events(tmp_path))


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([(1, 0.4), (1, 0.5), (1, 0.3)], [False, False, True]),
        ([(1, 0.4), (0, 0.5), (1, 0.4), (1, 0.3)], [False] * 4),  # different processes in turn
        ([(1, 0.4), (1, 0.05), (1, 0.4), (1, 0.3)], [False] * 4),  # one excess in between is too small
        ([(2, 0.3)] * 5, [False, False, True, True, True]),
    ],
)
def test_only_who_is_the_slowest_again_and_again_is_slow(windows: list[tuple[int, float]], expected: list[bool]) -> None:
    hook = object.__new__(SlowProcesses)
    hook.limit, hook._streak = 0.15, []
    found = [hook._is_slow(_Window(Slow(rank, "forward", excess), steps=10, step_seconds=3.0)) for rank, excess in windows]
    assert found == [False] * len(windows), "a tenth of a step is not worth a word"
    hook._streak = []
    assert [hook._is_slow(_Window(Slow(rank, "forward", 3 * excess), steps=10, step_seconds=3.0)) for rank, excess in windows] == expected


def test_half_a_minute_of_short_steps_is_no_reason_to_warn() -> None:
    hook = object.__new__(SlowProcesses)
    hook.limit, hook._streak = 0.15, []
    found = [hook._is_slow(_Window(Slow(1, "forward", 0.1), steps=10, step_seconds=0.2)) for _ in range(40)]
    assert found.index(True) == 29, "30 windows of 2 s"


def test_a_packed_excess_is_ordered_by_its_seconds() -> None:
    values = [pack(micros=micros, rank=rank, phase=phase) for micros, rank, phase in ((5, 1048575, 3), (6, 0, 0), (10**11, 7, 2))]
    assert values == sorted(values) and values[-1] < 2**63
    slow = unpack(values[-1])
    assert (slow.rank, slow.phase, slow.seconds) == (7, OWN_WORK[2], 1e5)
    assert unpack(pack(micros=-5, rank=3, phase=1)).seconds == 0


def test_the_first_step_is_looked_at_and_none_where_the_interval_is_0() -> None:
    assert [step for step in range(1, 12) if is_due(step, 5)] == [1, 5, 10]
    assert not any(is_due(step, 0) for step in range(1, 12))
