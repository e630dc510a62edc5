"""Parts of a long check or benchmark, each a process of its own whose results are passed on as they come.

A part prints one JSON object a line. What it has printed stays when it is killed, breaks a GPU context or runs out of memory, and the
other parts go on. Used by `tools/gpu_check.py` and `benchmarks/gpu_bench.py`.
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
LAST_LINES = 30
"""Of what a part that failed wrote to its standard error."""


@dataclass(frozen=True)
class Part:
    """A process to run."""

    name: str
    arguments: list[str]
    """Of the Python interpreter."""


def emit(row: Row) -> None:
    """Called by a part: pass on a result."""
    print(json.dumps(row), flush=True)


def wait_for_turn() -> None:
    """Called by a part once it has imported what it needs, so that the imports of the next part overlap with this one's work."""
    sys.stdin.readline()


def run_parts(parts: list[Part], *, at_once: int, deadline: float, record: Path | None = None) -> Iterator[Row]:
    """Results of the parts as they come, each with its part's name; last of a part, `ended` with its exit code and seconds.

    Args:
        at_once: parts that run at the same time; 1 where times are measured. One more is started and waits for its turn.
        deadline: `time.monotonic()` at which what still runs is killed; what has not begun by then is not begun.
        record: file to which every result is appended as a line of JSON, at once.
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
        results.put({"part": part.name, "ended": None, "why": "no time left"})
        return
    last: deque[str] = deque(maxlen=LAST_LINES)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with contextlib.suppress(BrokenPipeError):  # it has failed already, and says why
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
        ended["why"] = "killed: no time left" if late else (next((line for line in reversed(last) if line.strip()), "no message")).strip()
        ended["stderr"] = list(last)
    results.put(ended)


def _keep(stream: IO[str], last: deque[str]) -> None:
    for line in stream:
        last.append(line.rstrip("\n"))
