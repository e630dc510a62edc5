"""Passes what a forked checkpoint writer wrote back to the training process, without a helper process.

What upstream lacks: megatron-core keeps a process of 270 MB (a `multiprocessing.Manager`) for one small message per save. That process
outlives a training process that is killed, ignores SIGTERM, and keeps the run's output open. A pipe that a thread reads replaces it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

_SECONDS = 30.0
"""Time that a result may take to arrive after its writer has ended."""


class WriteResult:
    """One result of one save: a writer that was forked after this was created calls `put`, and this process then calls `get_nowait`."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._reader, self._writer = multiprocessing.Pipe(duplex=False)
        self._found: list[Any] = []
        # A thread reads, because a result can be larger than a pipe holds, and the writer would wait. It does not refer to this object, so
        # that it ends with an object that nobody asks.
        self._thread = threading.Thread(target=_read, args=(self._reader, self._found), name="result of a checkpoint writer", daemon=True)
        self._thread.start()

    def put(self, result: Any) -> None:
        """Send the result. Raises BrokenPipeError if the process that waits for it has ended."""
        if os.getpid() != self._owner:
            self._reader.close()
        self._writer.send(result)

    def get_nowait(self) -> Any:
        """Return the result of a writer that has ended. Raises queue.Empty if it ended without one."""
        self._writer.close()  # so that the thread sees the end of the pipe if the writer sent nothing
        self._thread.join(_SECONDS)
        if not self._found:
            raise queue.Empty
        return self._found[0]


def _read(reader: Connection, found: list[Any]) -> None:
    with reader, contextlib.suppress(EOFError, OSError):
        found.append(reader.recv())


def install() -> None:
    """Let megatron-core use a `WriteResult` for each save; does nothing when called again."""
    for name in ("_get_write_results_queue", "get_write_results_queue"):  # 0.16, and 0.17 on
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, lambda mp_mode="spawn": WriteResult())
