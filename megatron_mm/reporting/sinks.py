"""Places that a run's metrics go to besides its own files, none of which can end or slow it.

Everything for them waits in one queue that a thread of its own works off. A place that fails is switched off with one warning; a place that
hangs fills the queue, and what does not fit is left out and counted. metrics.jsonl has everything all the same.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mm.evaluation.captions import CaptionSample

logger = logging.getLogger(__name__)

_QUEUE = 1000
"""Calls that wait at most."""
_CLOSE_SECONDS = 60.0
"""How long the end of a run waits for the queue."""


class Sink:
    """One such place. Its methods run in the thread of `Sinks`; whatever they raise switches it off."""

    name: str
    """As warnings call it."""

    def __init__(self) -> None:
        self.is_on = True

    def attempt(self, what: str, call: Callable[[], Any]) -> None:
        """Call something of the place, unless it failed before."""
        if not self.is_on:
            return
        try:
            call()
        except Exception as error:  # whatever a library raises, training continues
            self.is_on = False
            logger.warning(
                "%s failed to %s (%s: %s) and is switched off; metrics.jsonl is still written", self.name, what, type(error).__name__, error
            )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of a step."""

    def event(self, step: int, kind: str, text: str, is_alert: bool) -> None:
        """Something happened: a resume, an alert."""

    def captions(self, step: int, samples: Sequence[CaptionSample]) -> None:
        """Images with true and generated captions."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """A picture file."""

    def finish(self, exit_code: int) -> None:
        """The run has ended."""


class Sinks:
    """All of a run's places behind one queue."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)
        self.left_out = 0
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)
        if self.sinks:
            self._thread.start()

    def tell(self, method: str, *arguments: Any) -> None:
        """Have a method of every place called soon; returns at once."""
        if not self.sinks:
            return
        try:
            self._queue.put_nowait((method, arguments))
        except queue.Full:
            self.left_out += 1
            if self.left_out == 1:
                names = ", ".join(sink.name for sink in self.sinks)
                logger.warning("%s are behind by %d messages: what follows is left out there, and in metrics.jsonl alone", names, _QUEUE)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            method, arguments = item
            for sink in self.sinks:
                sink.attempt(method, partial(getattr(sink, method), *arguments))

    def close(self, *, exit_code: int) -> None:
        """Work the queue off and end all places; gives up on one that hangs."""
        if not self.sinks:
            return
        self.tell("finish", exit_code)
        try:
            self._queue.put(None, timeout=_CLOSE_SECONDS)
        except queue.Full:
            pass
        else:
            self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            names = ", ".join(sink.name for sink in self.sinks if sink.is_on)
            logger.warning("%s did not take the last metrics within %.0f s: metrics.jsonl has them", names, _CLOSE_SECONDS)
        if self.left_out:
            logger.warning("%d messages to %s were left out", self.left_out, ", ".join(sink.name for sink in self.sinks))
