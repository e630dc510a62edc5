"""Run a function on several processes that form a process group, inside a test, with a hard time limit."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import queue
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PRELOADED = ["torch", "torch.distributed.checkpoint", "megatron_mm.training.trainer", "megatron_mm.families.recipes"]
"""Modules that the fork server imports once, before the processes are forked from it."""


_STACK_SECONDS = 1.0
"""Every process writes its stack to a file this long before the deadline."""


def run_processes(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 240.0) -> list[Any]:
    """Call `function(*arguments)` on world_size processes with torchrun's environment; return their results by rank.

    Raises AssertionError with the traceback of the first process that fails or, if a process takes longer than `timeout` seconds,
    with the stacks of the processes that hang. All processes, and those that they started, are killed before the call returns.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    results = context.Queue()
    port, deadline = _free_port(), time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        stacks = Path(folder)
        processes = [
            context.Process(target=_child, args=(function, arguments, rank, world_size, port, results, deadline, stacks))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            found = _collect(processes, results, deadline=deadline, stacks=stacks)
            for process in processes:
                process.join(timeout=5)
            return found
        finally:
            for process in processes:
                _kill(process)


def _kill(process: Any) -> None:
    """Kill a process and its children, whether or not it has already become the leader of its process group."""
    if process.pid is not None:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _collect(processes: list[Any], results: Any, *, deadline: float, stacks: Path) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(processes):
        try:
            rank, value, failure = results.get(timeout=0.5)
        except queue.Empty:
            dead = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode is not None and rank not in found}
            assert not dead or not results.empty(), f"processes ended without a result, exit codes by rank: {dead}"
            if time.monotonic() >= deadline:
                missing = sorted(set(range(len(processes))) - set(found))
                told = "\n".join(f"rank {rank}:\n{path.read_text()}" for rank in missing if (path := stacks / str(rank)).exists())
                raise AssertionError(f"timed out; ranks without a result: {missing}\n{told}") from None
            continue
        if failure is not None:
            raise AssertionError(f"rank {rank} of {len(processes)} failed:\n{failure}")
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in range(len(processes))]


def _child(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    results: Any,
    deadline: float,
    stacks: Path,
) -> None:
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
    with (stacks / str(rank)).open("w") as stack:
        faulthandler.dump_traceback_later(max(0.1, deadline - time.monotonic() - _STACK_SECONDS), file=stack)
        try:
            # Pickled here: the queue would send a tensor as a handle to shared memory that is gone when this process ends.
            value, failure = pickle.dumps(function(*arguments)), None
        except BaseException:
            value, failure = b"", traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
    results.put((rank, value, failure))


def _free_port() -> int:
    """Return a free port below the range of outgoing connections, so that none of these can take it before it is used.

    Each of several parallel test processes (pytest-xdist) has ports of its own.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.SystemRandom().sample(range(20000 + worker, 32000, workers), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
