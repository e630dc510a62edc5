"""Run the parts of a long check or benchmark, each in a process of its own, and pass on their results as soon as they are printed.

A part prints one JSON object per line. If a part is killed, breaks its GPU context or runs out of memory, the results it has printed are
kept, and the other parts continue. Used by `tools/gpu_check.py` and `benchmarks/gpu_bench.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]
NO_TIME = "no time left"
LAST_LINES = 30
"""Lines kept of a failed part's standard error."""


@dataclass(frozen=True)
class Part:
    """A process to run."""

    name: str
    arguments: list[str]
    """Arguments of the Python interpreter."""


def short_of_time(row: Row) -> bool:
    """Whether a part's last row says that it did not run, or was ended, because the time was up."""
    return row.get("ended", 0) is None or (row.get("ended", 0) != 0 and NO_TIME in row["why"])


def emit(row: Row) -> None:
    """Pass on a result; called by a part."""
    print(json.dumps(row), flush=True)


def wait_for_turn() -> None:
    """Wait until this part may run; called by a part after its imports, so that they overlap with the previous part's work."""
    sys.stdin.readline()


def run_parts(parts: list[Part], *, at_once: int, deadline: float, record: Path | None = None) -> Iterator[Row]:
    """Yield the parts' results as they arrive, each with its part's name; a part's last row is `ended`: its exit code and seconds.

    Args:
        at_once: number of parts that run at the same time; 1 if times are measured. One more is started and waits for its turn.
        deadline: `time.monotonic()` at which running parts are killed; parts not begun by then do not run.
        record: file to which every result is immediately appended as a line of JSON.
    """
    waiting, running, started = deque(parts), 0, deque[subprocess.Popen[str]]()
    results: queue.Queue[Row] = queue.Queue()
    with open(record, "a") if record is not None else open(os.devnull, "w") as written:
        while waiting or running:
            while waiting and running < at_once:
                part = waiting.popleft()
                process = started.popleft() if started else _start(part)
                threading.Thread(target=_run, args=(part, process, results, deadline), daemon=True).start()
                running += 1
            if waiting and not started:
                started.append(_start(waiting[0]))
            row = results.get()
            running -= "ended" in row
            written.write(json.dumps(row) + "\n")
            written.flush()
            yield row


def _start(part: Part) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *part.arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _run(part: Part, process: subprocess.Popen[str], results: queue.Queue[Row], deadline: float) -> None:
    began = time.monotonic()
    if began >= deadline:
        process.kill()
        process.wait()
        results.put({"part": part.name, "ended": None, "why": NO_TIME})
        return
    last: deque[str] = deque(maxlen=LAST_LINES)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with contextlib.suppress(BrokenPipeError):  # it has already failed; its standard error says why
        process.stdin.write("\n")
        process.stdin.flush()
    errors = threading.Thread(target=_keep, args=(process.stderr, last), daemon=True)
    errors.start()
    timer = threading.Timer(max(0.0, deadline - began), process.kill)
    timer.start()
    for line in process.stdout:
        if line.startswith("{"):
            results.put({"part": part.name, **json.loads(line), "at": round(time.monotonic() - began, 1)})
    code = process.wait()
    timer.cancel()
    errors.join(timeout=5)
    ended: Row = {"part": part.name, "ended": code, "seconds": round(time.monotonic() - began, 1)}
    if code:
        late = time.monotonic() >= deadline
        ended["why"] = f"killed: {NO_TIME}" if late else (next((line for line in reversed(last) if line.strip()), "no message")).strip()
        ended["stderr"] = list(last)
    results.put(ended)


def _keep(stream: IO[str], last: deque[str]) -> None:
    for line in stream:
        last.append(line.rstrip("\n"))
