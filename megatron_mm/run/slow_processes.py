"""Finds the process that the others wait for, from the time by phase of all processes."""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_mm.data.load.loader import StepBatch
from megatron_mm.platform import message_times
from megatron_mm.platform.device import send
from megatron_mm.reporting.monitor import Monitor
from megatron_mm.reporting.run_files import PHASES as PHASES_FILE
from megatron_mm.run.step_measures import memory_gb
from megatron_mm.training.phases import OWN_WORK, PASSES, PHASES
from megatron_mm.training.trainer import Hook, StepRecord, Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slow:
    """The process that exceeds its peers the most, and the phase in which it does so."""

    rank: int
    phase: str
    seconds: float
    """Average excess in that phase, seconds per step of the window."""


@dataclass(frozen=True)
class _Window:
    """Steps between two comparisons."""

    slow: Slow
    steps: int
    step_seconds: float
    """Average duration of a step."""


_RANK_BITS, _PHASE_BITS = 20, 3
_COLUMNS = (*PHASES, *(f"own {phase}" for phase in PASSES), "processes")
"""Values that are summed over the processes of a stage."""


def pack(*, micros: int, rank: int, phase: int) -> int:
    """Pack excess, rank and phase into one integer, so that the maximum over processes is the greatest excess. 40 bits of microseconds are
    twelve days."""
    return (max(0, min(micros, (1 << 40) - 1)) << (_RANK_BITS + _PHASE_BITS)) | (phase << _RANK_BITS) | rank


def unpack(packed: int) -> Slow:
    """The inverse of `pack`."""
    rank, phase = packed & ((1 << _RANK_BITS) - 1), (packed >> _RANK_BITS) & ((1 << _PHASE_BITS) - 1)
    return Slow(rank=rank, phase=OWN_WORK[phase], seconds=(packed >> (_RANK_BITS + _PHASE_BITS)) / 1e6)


class SlowProcesses(Hook):
    """Finds the process that the others wait for, and the phase in which it is slow; the means of all processes are written to
    `phases.jsonl`.

    Every `detail_interval` steps, the mean seconds of each phase of each pipeline stage are part of the step's one message. Each process
    then computes by how much it exceeds its peers, and one more message of two integers finds the greatest excess of all. So no message
    grows with the number of processes.

    Peers are the processes of the same pipeline stage, because stages hold different parts of the model. Processes that share layers
    (tensor and expert parallelism) wait for the slowest one in every layer, so their passes all take the same time. For them, messages
    inside layers are timed in the last step of a window, and the time of the passes outside these messages is compared. A process without
    peers is compared with its own earlier windows. A process that is alone in the run is not compared, because no other waits for it.

    Any process is the slowest in some window: another program ran, or a batch was long. A process is reported if it was the slowest in
    `WINDOWS` consecutive windows that took `LEAST_SECONDS` together, in each of them by more than `monitor.slow_process` of a step.
    """

    EARLIER = 3
    """Number of earlier windows that a process without peers needs before it is compared with them."""
    WINDOWS = 3
    LEAST_SECONDS = 60.0

    def __init__(self, trainer: Trainer, monitor: Monitor) -> None:
        super().__init__(trainer)
        config, topology = trainer.experiment.monitor, trainer.topology
        self.monitor = monitor
        self.interval, self.limit = config.detail_interval, config.slow_process
        self.stages = topology.pipeline_size
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._steps, self._seconds = 0, 0.0
        self._earlier: dict[str, deque[float]] = {phase: deque(maxlen=20) for phase in OWN_WORK}
        self._shares_layers = topology.tensor_size > 1 or trainer.experiment.parallel.expert > 1
        self._timing: contextlib.ExitStack | None = None
        """Open while messages inside layers are timed, which is during one step."""
        self._own = dict.fromkeys(PASSES, 0.0)
        """Seconds of the passes in the step with timed messages, without these messages."""
        self._asked: tuple[torch.Tensor, dict[str, Any]] | None = None
        """The message under way, and the line to be written when it arrives."""
        self._streak: list[_Window] = []
        """The newest consecutive windows in which the same process was the slowest, by more than the limit."""
        self._said: int | None = None
        """Rank of the current streak, if that was reported."""

    def tell(self, batch: StepBatch) -> tuple[float, ...]:
        if not self._due(self.trainer.state.step + 1):
            return ()
        table = np.zeros((self.stages, len(_COLUMNS)))
        means = (self._sums[phase] / self._steps for phase in PHASES)
        table[self.trainer.topology.pipeline_rank] = [*means, *self._own.values(), 1.0]
        return tuple(table.flatten().tolist())

    def _due(self, step: int) -> bool:
        return self.interval > 0 and step % self.interval == 0 and self._steps > 0

    def after_step(self, record: StepRecord) -> None:
        self._take_answer(record.step)
        self._take_waits(record)
        if record.told[self]:
            self._ask(record)
            self._sums, self._steps, self._seconds = dict.fromkeys(PHASES, 0.0), 0, 0.0
        for phase in PHASES:
            self._sums[phase] += record.phases.get(phase, 0.0)
        self._steps += 1
        self._seconds += record.seconds
        if self._shares_layers and self.interval > 0 and (record.step + 2) % self.interval == 0:
            self._timing = contextlib.ExitStack()
            self._timing.enter_context(message_times.timed(self.trainer.clock.wait_timer()))

    def _take_waits(self, record: StepRecord) -> None:
        if self._timing is not None:
            self._timing.close()
            self._timing = None
            waits = self.trainer.clock.take_waits()
            self._own = {name: record.phases[name] - waits[name] for name in PASSES}

    def _ask(self, record: StepRecord) -> None:
        """Compare this process with its peers and send its excess. The result is read after the next step."""
        table = np.array(record.told[self]).reshape(self.stages, len(_COLUMNS))
        sums = dict(zip(_COLUMNS, table[self.trainer.topology.pipeline_rank].tolist(), strict=True))
        excess = {phase: self._excess(phase, sums) for phase in OWN_WORK}
        phase = max(OWN_WORK, key=excess.__getitem__)
        rank = self.trainer.topology.rank
        packed = pack(micros=int(1e6 * excess[phase]), rank=rank, phase=OWN_WORK.index(phase))
        memory = (int(memory_gb(self.trainer.topology.device) * 1e6) << _RANK_BITS) | rank
        message = send(torch.tensor([packed, memory], dtype=torch.int64), self.trainer.topology.device)
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        stages = [
            {name: round(float(row[n] / max(1.0, row[-1])), 6) for n, name in enumerate(PHASES)}  # means over processes
            for row in table
        ]
        line = {"step": record.step, "steps": self._steps, "seconds": self._seconds / self._steps, "stages": stages}
        self._asked = (message, line)

    def _excess(self, phase: str, sums: dict[str, float]) -> float:
        """Seconds per step by which this process exceeds its peers in a phase; 0 if there is nothing to compare with.

        Args:
            sums: sums over the processes of its stage.
        """
        if self.trainer.topology.world_size == 1:
            return 0.0
        own, whole = self._sums[phase] / self._steps, sums[phase]
        if self._shares_layers and phase in PASSES:
            own, whole = self._own[phase], sums[f"own {phase}"]
        peers = round(sums["processes"]) - 1
        if peers > 0:
            return own - (whole - own) / peers
        earlier = self._earlier[phase]
        usual = statistics.median(earlier) if len(earlier) >= self.EARLIER else own
        earlier.append(own)
        return own - usual

    def _take_answer(self, step: int) -> None:
        if self._asked is None:
            return
        (message, line), self._asked = self._asked, None
        packed, memory = message.tolist()  # arrived with the step's message, or before it
        slow, fullest = unpack(packed), memory & ((1 << _RANK_BITS) - 1)
        most = (memory >> _RANK_BITS) / 1e6
        told = {"rank": slow.rank, "phase": slow.phase, "seconds": round(slow.seconds, 6)}
        is_slow = self._is_slow(_Window(slow, steps=line["steps"], step_seconds=line["seconds"]))
        details = {name: line[name] for name in ("steps", "seconds", "stages")}
        details |= {"slow": told if is_slow else None, "greatest": told, "memory_gb": most, "memory_rank": fullest}
        self.monitor.log_details(PHASES_FILE, line["step"], details)
        self.monitor.log_values(
            line["step"],
            {
                "slow/seconds": slow.seconds,
                "slow/part_of_step": slow.seconds / line["seconds"],
                "slow/rank": slow.rank,
                "slow/phase": OWN_WORK.index(slow.phase),
                "memory/most_gb": most,
                "memory/most_rank": fullest,
            },
        )
        if is_slow and self._said != slow.rank and self.trainer.topology.is_main:
            self._report(line["step"] - 1)
        self._said = slow.rank if is_slow else None

    def _is_slow(self, window: _Window) -> bool:
        """Whether the slowest process of a window has been the slowest for long enough, and by enough."""
        if self._streak and self._streak[-1].slow.rank != window.slow.rank:
            self._streak = []
        self._streak = [*self._streak[-1000:], window] if window.slow.seconds > self.limit * window.step_seconds else []
        seconds = sum(each.steps * each.step_seconds for each in self._streak)
        return len(self._streak) >= self.WINDOWS and seconds >= self.LEAST_SECONDS

    def _report(self, step: int) -> None:
        steps = sum(window.steps for window in self._streak)
        excess = sum(window.steps * window.slow.seconds for window in self._streak) / steps
        whole = sum(window.steps * window.step_seconds for window in self._streak) / steps
        newest = self._streak[-1].slow
        logger.warning(
            "rank %d is slow in %s: in steps %d to %d it took %.3g s a step longer there than %s (%.0f%% of a step)",
            newest.rank,
            newest.phase,
            step - steps + 1,
            step,
            excess,
            "its peers" if self.trainer.topology.world_size > self.stages else "before",
            100 * excess / whole,
            extra={"kind": "slow"},
        )

    def after_training(self) -> None:
        self._take_answer(self.trainer.state.step)

    def close(self, *, failed: bool) -> None:
        if self._timing is not None:
            self._timing.close()
