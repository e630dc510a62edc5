"""Results of checkpoint writers reach the training process through a pipe, and no helper process is needed."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_mm.platform import write_results
from megatron_mm.platform.write_results import WriteResult

FORK = multiprocessing.get_context("fork")
LARGE = {0: ["x" * 1000] * 1000}
"""More than a pipe holds."""


def test_a_large_result_arrives_after_its_writer_has_ended() -> None:
    result = WriteResult()
    writer = FORK.Process(target=result.put, args=(LARGE,))
    writer.start()
    writer.join(30)
    assert writer.exitcode == 0
    assert result.get_nowait() == LARGE


def test_a_result_of_this_process() -> None:
    result = WriteResult()
    result.put(LARGE)
    assert result.get_nowait() == LARGE


def test_a_writer_that_is_killed_leaves_no_result() -> None:
    result = WriteResult()
    writer = FORK.Process(target=time.sleep, args=(60,))
    writer.start()
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(30)
    with pytest.raises(queue.Empty):
        result.get_nowait()


def _train_and_die(writers: multiprocessing.queues.SimpleQueue[int | None]) -> None:
    result = WriteResult()
    writer = FORK.Process(target=_wait_and_put, args=(result, os.getpid()))
    writer.start()
    writers.put(writer.pid)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_and_put(result: WriteResult, parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.01)
    result.put(LARGE)


def test_a_writer_ends_after_the_training_process_was_killed() -> None:
    writers = FORK.SimpleQueue()
    FORK.Process(target=_train_and_die, args=(writers,)).start()
    pid, deadline = writers.get(), time.monotonic() + 30
    while _is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_megatron_core_gets_one_for_each_save() -> None:
    write_results.install()
    get = getattr(filesystem_async, "get_write_results_queue", None) or filesystem_async._get_write_results_queue
    first, second = get(), get()
    assert isinstance(first, WriteResult) and first is not second
