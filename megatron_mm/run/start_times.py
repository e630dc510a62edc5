"""Measures how long a run takes from its launch to its first step, by part; the main process logs it after the first step."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from megatron_mm.training.trainer import Hook, StepRecord, Trainer

logger = logging.getLogger(__name__)


class StartTimes:
    """Seconds of each part of the start, in order. The first one, imports, counts from the launch of this process, unless the run restarts
    within the process."""

    def __init__(self, *, launched: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()
        if launched:
            self._add("imports", process_age())

    def lap(self, part: str) -> None:
        """Record the time since the last call as this part of the start."""
        now = time.monotonic()
        self._add(part, now - self._last)
        self._last = now

    def _add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def __str__(self) -> str:
        return f"{sum(self.seconds.values()):.1f} s from launch to first step: " + ", ".join(
            f"{part} {seconds:.1f}" for part, seconds in self.seconds.items()
        )


class LogStart(Hook):
    """Logs the parts of the start after the first step of this process."""

    def __init__(self, trainer: Trainer, times: StartTimes) -> None:
        super().__init__(trainer)
        self.times: StartTimes | None = times

    def after_step(self, record: StepRecord) -> None:
        if self.times is not None:
            self.times.lap("first step")
            self.times.seconds["first step"] -= record.data_seconds
            self.times.seconds["first batch"] = record.data_seconds
            if self.trainer.topology.is_main:
                logger.info("%s", self.times)
            self.times = None


def process_age() -> float:
    """Seconds since this process was launched, according to the operating system; 0 if it does not say."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError):
        return 0.0
