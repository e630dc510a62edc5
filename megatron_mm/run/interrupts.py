"""Ctrl-C: the first press asks the run to stop after the step in progress, the second ends the process at once.

Signals of one kind do not queue, so a second Ctrl-C during a long step would be lost if only the training loop looked for signals. A thread
takes each one as it arrives.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable

from megatron_mm.run.watchdog import end_process

EXIT_INTERRUPTED = 130
"""The exit code that a shell reports for Ctrl-C."""
_BOUNCE_SECONDS = 0.3
"""Signals that follow the first one sooner are the same press."""
_FORWARD_SECONDS = 3.0
"""The same, where the sender is not known and may be the launcher, which forwards the signal of the press that it received, too."""


class Interrupts:
    """Takes SIGINT, which must be blocked in the thread that creates this."""

    def __init__(self, asked: Callable[[], None], *, launcher: int | None) -> None:
        """
        Args:
            asked: called at the first press.
            launcher: PID of the torchrun process that started this one; its signals are not presses of their own.
        """
        self._asked, self._launcher = asked, launcher
        self._first: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="Ctrl-C", daemon=True)
        self._thread.start()

    def unknown_sender(self) -> None:
        """A SIGINT was delivered to another thread and ran a handler, which is not told who sent it."""
        self._press(apart=_BOUNCE_SECONDS if self._launcher is None else _FORWARD_SECONDS)

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._stopped.is_set():
            found = signal.sigtimedwait({signal.SIGINT}, 0.2)
            if found is None:
                continue
            if found.si_pid == self._launcher:
                self._asked()
            else:
                self._press(apart=_BOUNCE_SECONDS)

    def _press(self, *, apart: float) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._asked()
        elif now - self._first > apart:
            print(
                "megatron-mm: interrupted twice: the same command resumes from the newest checkpoint, if there is one",
                file=sys.stderr,
                flush=True,
            )
            end_process(EXIT_INTERRUPTED)
