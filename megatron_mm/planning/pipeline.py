"""Simulates the pipeline event by event: when each rank runs the forward and the backward pass of each micro-batch.

The order of passes is that of megatron-core's schedules (pipeline_parallel/schedules.py): one forward, one backward after a warm-up, plain
or interleaved. A stage is a chunk of one pipeline rank: stage s is chunk s // ranks of rank s % ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

Pass = Literal["forward", "backward"]


@dataclass(frozen=True)
class Event:
    """One pass of a micro-batch; times in seconds from the start of the step."""

    rank: int
    kind: str
    stage: int
    micro_batch: int
    begin: float
    end: float


@dataclass(frozen=True)
class PipelineTimes:
    """Durations of passes in seconds, [stage][micro_batch], and of messages."""

    forward: Sequence[Sequence[float]]
    backward: Sequence[Sequence[float]]
    send: float = 0.0
    """Duration of a message between stages."""
    send_overlaps: bool = False
    """Messages are sent while the ranks compute; otherwise the sender waits for them, too."""
    first_ready: Sequence[float] = ()
    """Time before which a stage cannot start, because its weights are still being gathered."""
    saved: Sequence[Sequence[float]] = ()
    """Bytes that a stage keeps for a micro-batch between its forward and its backward pass, [stage][micro_batch]."""


@dataclass(frozen=True)
class PipelineResult:
    """Result of a simulation."""

    seconds: float
    """End of the last backward pass on any rank."""
    rank_end: tuple[float, ...]
    rank_busy: tuple[float, ...]
    stage_last_backward: tuple[float, ...]
    """End of each stage's last backward pass."""
    stage_last_begin: tuple[float, ...]
    """Start of each stage's last backward pass."""
    in_flight: tuple[int, ...]
    """Largest number of micro-batches, over all chunks, whose activations each rank holds at once."""
    saved_bytes: tuple[float, ...]
    """Largest number of bytes of activations that each rank holds at once."""
    events: tuple[Event, ...] = field(default=())


def order(*, ranks: int, chunks: int, micro_batches: int, rank: int) -> list[tuple[Pass, int, int]]:
    """Order in which a rank runs its passes: (pass, chunk, micro-batch).

    Worked example with 2 ranks, 1 chunk, 3 micro-batches: rank 0 runs F0 F1 B0 F2 B1 B2, rank 1 runs F0 B0 F1 B1 F2 B2.
    """
    if chunks == 1:
        warmup = min(ranks - rank - 1, micro_batches)
        sequence = [(0, number) for number in range(micro_batches)]
        forward, backward = sequence, sequence
    else:
        forward = _interleaved(ranks, chunks, micro_batches)
        backward = [(chunks - 1 - chunk, number) for chunk, number in forward]
        warmup = min((ranks - rank - 1) * 2 + (chunks - 1) * ranks, len(forward))
    passes: list[tuple[Pass, int, int]] = [("forward", *f) for f in forward[:warmup]]
    for number, f in enumerate(forward[warmup:]):
        passes += [("forward", *f), ("backward", *backward[number])]
    passes += [("backward", *b) for b in backward[len(forward) - warmup :]]
    return passes


def least_saved(saved: Sequence[Sequence[float]], *, ranks: int, chunks: int) -> list[float]:
    """Bytes of activations that each rank holds at its first backward pass: a lower bound of `PipelineResult.saved_bytes`.

    Args:
        saved: bytes that a stage keeps for a micro-batch, [stage][micro_batch].
    """
    held = []
    for rank in range(ranks):
        total = 0.0
        for kind, chunk, number in _passes(ranks, chunks, _padded(len(saved[0]), ranks, chunks), rank):
            if kind == "backward":
                break
            total += saved[chunk * ranks + rank][number] if number < len(saved[0]) else 0.0
        held.append(total)
    return held


def _padded(micro_batches: int, ranks: int, chunks: int) -> int:
    """Number of micro-batches of a schedule: interleaved ones fill the last group of `ranks`."""
    return micro_batches if chunks == 1 else -(-micro_batches // ranks) * ranks


@lru_cache(maxsize=1024)
def _passes(ranks: int, chunks: int, micro_batches: int, rank: int) -> tuple[tuple[Pass, int, int], ...]:
    return tuple(order(ranks=ranks, chunks=chunks, micro_batches=micro_batches, rank=rank))


def _interleaved(ranks: int, chunks: int, micro_batches: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in groups of `ranks` micro-batches; a group passes through all chunks before the next one begins."""
    result = []
    for first in range(0, micro_batches, ranks):
        group = range(first, min(first + ranks, micro_batches))
        result += [(chunk, number) for chunk in range(chunks) for number in group]
    return result


def simulate(times: PipelineTimes, *, ranks: int, chunks: int, keep_events: bool = False) -> PipelineResult:
    """Simulate the passes of all ranks, each in its order.

    Interleaved schedules use groups of `ranks` micro-batches; a short last group is padded with micro-batches that take no time.
    """
    count = len(times.forward[0])
    if _padded(count, ranks, chunks) > count:
        times = _filled(times, _padded(count, ranks, chunks) - count)
    simulation = _Simulation(times, ranks, chunks, keep_events)
    waiting = list(range(ranks))
    while waiting:
        before = sum(simulation.position)
        waiting = [rank for rank in waiting if not simulation.advance(rank)]
        assert not waiting or sum(simulation.position) > before, f"the pipeline schedule deadlocks: ranks {waiting}"
    return simulation.result()


class _Simulation:
    """Progress of each rank and each stage."""

    def __init__(self, times: PipelineTimes, ranks: int, chunks: int, keep_events: bool) -> None:
        count, stages = len(times.forward[0]), ranks * chunks
        self.times, self.ranks, self.stages, self.keep_events = times, ranks, stages, keep_events
        self.orders = [_passes(ranks, chunks, count, rank) for rank in range(ranks)]
        self.position, self.clock, self.busy = [0] * ranks, [0.0] * ranks, [0.0] * ranks
        self.held, self.most_held = [0] * ranks, [0] * ranks
        self.kept, self.most_kept = [0.0] * ranks, [0.0] * ranks
        self.done_forward = [[-1.0] * count for _ in range(stages)]
        self.done_backward = [[-1.0] * count for _ in range(stages)]
        self.last_begin = [0.0] * stages
        self.ready = list(times.first_ready) or [0.0] * stages
        self.wait = 0.0 if times.send_overlaps else times.send
        self.events: list[Event] = []

    def advance(self, rank: int) -> bool:
        """Run a rank's passes until one has to wait for another rank. Return whether all passes are done.

        This is one loop without function calls because a search simulates thousands of pipelines.
        """
        times, ranks, stages, passes = self.times, self.ranks, self.stages, self.orders[rank]
        forward, backward, saved, lag, wait = times.forward, times.backward, times.saved, times.send, self.wait
        done_forward, done_backward, held, kept = self.done_forward, self.done_backward, self.held, self.kept
        now, position = self.clock[rank], self.position[rank]
        while position < len(passes):
            kind, chunk, number = passes[position]
            stage = chunk * ranks + rank
            if kind == "forward":
                before = done_forward[stage - 1][number] if stage else -lag
                if stage and before < 0:
                    break
                begin = max(now, before + lag, self.ready[stage])
                spent = forward[stage][number]
                done_forward[stage][number] = begin + spent
                now = begin + spent + (wait if stage < stages - 1 else 0.0)
                held[rank] += 1
                self.most_held[rank] = max(self.most_held[rank], held[rank])
                if saved:
                    kept[rank] += saved[stage][number]
                    self.most_kept[rank] = max(self.most_kept[rank], kept[rank])
            else:
                before = done_forward[stage][number]
                if stage < stages - 1:
                    before = done_backward[stage + 1][number] + lag
                    if done_backward[stage + 1][number] < 0:
                        break
                begin = max(now, before)
                spent = backward[stage][number]
                done_backward[stage][number] = begin + spent
                self.last_begin[stage] = begin
                now = begin + spent + (wait if stage else 0.0)
                held[rank] -= 1
                if saved:
                    kept[rank] -= saved[stage][number]
            self.busy[rank] += spent
            if self.keep_events:
                self.events.append(Event(rank, kind, stage, number, begin, begin + spent))
            position += 1
        self.clock[rank], self.position[rank] = now, position
        return position == len(passes)

    def result(self) -> PipelineResult:
        return PipelineResult(
            seconds=max(self.clock),
            rank_end=tuple(self.clock),
            rank_busy=tuple(self.busy),
            stage_last_backward=tuple(max(row) for row in self.done_backward),
            stage_last_begin=tuple(self.last_begin),
            in_flight=tuple(self.most_held),
            saved_bytes=tuple(self.most_kept),
            events=tuple(self.events),
        )


def _filled(times: PipelineTimes, number: int) -> PipelineTimes:
    """Append `number` empty micro-batches."""

    def fill(table: Sequence[Sequence[float]]) -> list[list[float]]:
        return [[*row, *([0.0] * number)] for row in table]

    return replace(times, forward=fill(times.forward), backward=fill(times.backward), saved=fill(times.saved))
