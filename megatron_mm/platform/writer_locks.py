"""Checkpoint writers that need no shared memory.

What upstream lacks: megatron-core 0.16 writes a checkpoint's files in processes that share two queues, whose locks are in /dev/shm. If that
is full (because of another job on the node, or because a container has too little), no checkpoint could be written, however much space the
disk has. In that case, the same function writes with threads instead of these processes, which is slower but complete. (megatron-core 0.19
has no such queues.)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.dummy
from collections.abc import Iterator
from types import SimpleNamespace

from megatron.core.dist_checkpointing.strategies import filesystem_async


def problem() -> str:
    """Why this process cannot make a lock that processes share; empty if it can."""
    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def threads_where_there_are_no_locks() -> Iterator[None]:
    """Make megatron-core's writer use threads, inside the context, if this process cannot make such a lock. Logs nothing: the caller may be
    a fork."""
    before = filesystem_async.mp
    if problem():
        filesystem_async.mp = SimpleNamespace(get_context=lambda method=None: multiprocessing.dummy)
    try:
        yield
    finally:
        filesystem_async.mp = before
