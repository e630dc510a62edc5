"""Destinations of a run's metrics besides its own files. None of them can end or slow down the run.

Each has a queue, and a thread that starts it and sends the messages in the queue. A destination that fails is switched off with one
warning. If one hangs, its queue fills up, and further messages are dropped and counted. metrics.jsonl has everything in any case.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mm.evaluation.captions import CaptionSample

logger = logging.getLogger(__name__)

_QUEUE = 1000
"""Maximum number of calls that wait for a destination."""
_CLOSE_SECONDS = 60.0
"""Seconds that the end of a run waits for all destinations."""


class Sink:
    """A destination. Its methods run in a thread of its own; any exception from them switches it off."""

    name: str
    """Name in warnings."""

    def __init__(self) -> None:
        self.is_on = True

    def attempt(self, what: str, call: Callable[[], Any]) -> None:
        """Call a function of the destination, unless one failed before."""
        if not self.is_on:
            return
        try:
            call()
        except Exception as error:  # whatever a library raises, training continues
            if not self.is_on:
                return  # already switched off, with a warning
            self.is_on = False
            logger.warning(
                "%s failed to %s (%s: %s) and is switched off; metrics.jsonl is still written", self.name, what, type(error).__name__, error
            )

    def start(self) -> None:
        """Called before all other methods."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of a step."""

    def event(self, step: int, kind: str, text: str, is_alert: bool) -> None:
        """An event, such as a resume or an alert."""

    def captions(self, step: int, samples: Sequence[CaptionSample]) -> None:
        """Images with true and generated captions."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """A picture file."""

    def finish(self, exit_code: int) -> None:
        """The run has ended."""


class _Worker:
    """A destination, its queue, and the thread that processes the queue."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.left_out = 0
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._work, name=f"monitor: {sink.name}", daemon=True)
        self._thread.start()

    def tell(self, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            self._queue.put_nowait((method, arguments))
        except queue.Full:
            self.left_out += 1
            if self.left_out == 1:
                logger.warning(
                    "%s is behind by %d messages: further metrics are not sent to it and are only in metrics.jsonl", self.sink.name, _QUEUE
                )

    def _work(self) -> None:
        self.sink.attempt("start", self.sink.start)
        while (item := self._queue.get()) is not None:
            method, arguments = item
            self.sink.attempt(method, partial(getattr(self.sink, method), *arguments))

    def end(self, deadline: float) -> None:
        """Wait until the queue has been processed, or until the deadline."""
        try:
            self._queue.put(None, timeout=max(0.01, deadline - time.monotonic()))
        except queue.Full:
            pass
        else:
            self._thread.join(max(0.01, deadline - time.monotonic()))
        if self._thread.is_alive() and self.sink.is_on:
            self.sink.is_on = False
            logger.warning("%s did not accept the last metrics within %.0f s: they are in metrics.jsonl", self.sink.name, _CLOSE_SECONDS)
        if self.left_out:
            logger.warning("%d messages were not sent to %s", self.left_out, self.sink.name)


class Sinks:
    """All destinations of a run."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)
        self._workers = [_Worker(sink) for sink in self.sinks]

    @property
    def left_out(self) -> int:
        """Number of messages that were dropped because a queue was full."""
        return sum(worker.left_out for worker in self._workers)

    def tell(self, method: str, *arguments: Any) -> None:
        """Queue a call of this method of every destination; returns at once."""
        for worker in self._workers:
            worker.tell(method, arguments)

    def close(self, *, exit_code: int) -> None:
        """Process the queues and end all destinations; gives up on those that hang."""
        self.tell("finish", exit_code)
        deadline = time.monotonic() + _CLOSE_SECONDS
        for worker in self._workers:
            worker.end(deadline)
