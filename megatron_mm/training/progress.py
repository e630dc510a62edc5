"""The current position of this process in a run, for a thread that watches it (`run.watchdog`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Progress:
    """The step and phase that this process is in, and since when. A mark costs two assignments and a look at the clock.

    The clock is monotonic: what somebody sets the machine's time to changes nothing.
    """

    def __init__(self) -> None:
        self.step = 0
        """In hand, counted from 1; 0 before the first."""
        self.phase = "start"
        self.marked = time.monotonic()
        """When the process last gave a sign of progress."""
        self.patience = 0.0
        """Seconds that the phase in hand may take at least, however impatient the watchdog is."""

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """A phase begins."""
        if step is not None:
            self.step = step
        self.phase = phase
        self.marked = time.monotonic()

    def beat(self) -> None:
        """The phase in hand goes on."""
        self.marked = time.monotonic()

    @contextlib.contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """What is done inside may take so long without a mark."""
        before, self.patience = self.patience, max(seconds, self.patience)
        self.beat()
        try:
            yield
        finally:
            self.patience = before
            self.beat()
