"""The current position of this process in a run, for a thread that watches it (`run.watchdog`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Progress:
    """The step and phase that this process is in, and since when. A mark costs two assignments and a clock read.

    The clock is monotonic, so changes of the machine's time do not matter.
    """

    def __init__(self) -> None:
        self.step = 0
        """Current step, counted from 1; 0 before the first."""
        self.phase = "start"
        self.marked = time.monotonic()
        """Time of the last sign of progress."""
        self.patience = 0.0
        """Seconds that the watchdog must allow without a mark, even if its own limit is lower."""

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Mark the beginning of a phase."""
        if step is not None:
            self.step = step
        self.phase = phase
        self.marked = time.monotonic()

    def beat(self) -> None:
        """Mark progress within the current phase."""
        self.marked = time.monotonic()

    @contextlib.contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Allow the enclosed code to take this long without a mark."""
        before, self.patience = self.patience, max(seconds, self.patience)
        self.beat()
        try:
            yield
        finally:
            self.patience = before
            self.beat()
