"""Run a function on several processes that form a process group, inside a test, with a hard time limit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_PRELOADED = ["torch", "torch.distributed.checkpoint", "megatron_mm.training.trainer", "megatron_mm.recipes"]
"""Imported once by the server that the processes are forked from."""


def run_processes(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*arguments)` on world_size processes with torchrun's environment; their results by rank.

    Raises AssertionError with the traceback of the first process that fails, or where one of them takes longer than `timeout`
    seconds. No process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    results = context.Queue()
    port = _free_port()
    processes = [context.Process(target=_child, args=(function, arguments, rank, world_size, port, results)) for rank in range(world_size)]
    for process in processes:
        process.start()
    try:
        return _collect(processes, results, deadline=time.monotonic() + timeout)
    finally:
        for process in processes:
            process.join(timeout=5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
            process.join()


def _collect(processes: list, results: Any, *, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(processes):
        try:
            rank, value, failure = results.get(timeout=0.5)
        except queue.Empty:
            dead = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode is not None and rank not in found}
            assert not dead or not results.empty(), f"processes ended without a result, exit codes by rank: {dead}"
            assert time.monotonic() < deadline, f"timed out; ranks without a result: {sorted(set(range(len(processes))) - set(found))}"
            continue
        if failure is not None:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank} of {len(processes)} failed:\n{failure}")
        found[rank] = value
    return [found[rank] for rank in range(len(processes))]


def _child(function: Callable[..., Any], arguments: tuple, rank: int, world_size: int, port: int, results: Any) -> None:
    import torch

    os.setpgrp()
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
    )
    try:
        value, failure = function(*arguments), None
    except BaseException:
        value, failure = None, traceback.format_exc()
    results.put((rank, value, failure))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
