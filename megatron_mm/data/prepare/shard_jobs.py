"""Reads shards in several processes, each shard once, and reports progress.

Workers write row files themselves and return only their headers, so memory does not grow with the number of shards. If a worker or its
parent is killed, its row files are complete or absent.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing import connection
from pathlib import Path

from megatron_mm.data.prepare.mirror import Mirror
from megatron_mm.data.prepare.row_files import RowHeader, write_row_file
from megatron_mm.data.prepare.samples import Reading, read_shard
from megatron_mm.data.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class ShardJob:
    """A shard to read."""

    source: Path
    shard: Path
    rows: Path
    """Path of the shard's row file."""
    tokenizer: Path
    reading: Reading
    recipe: str
    mirror: Mirror | None = None
    """Stand-in file for the shard, if this is in an object store; otherwise None."""


def run_jobs(jobs: Sequence[ShardJob], *, workers: int) -> Iterator[tuple[ShardJob, RowHeader]]:
    """Read shards and write their row files. Yields each job with its header when it is done, in any order.

    Raises ValueError if a worker is killed, for example by a lack of memory. Finished row files are kept.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, _read(job)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_end_with_parent) as pool:
        left, running = iter(jobs), dict[Future[RowHeader], ShardJob]()
        try:
            while True:
                for job in itertools.islice(left, 2 * workers - len(running)):
                    running[pool.submit(_read, job)] = job
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        except BrokenProcessPool:
            raise ValueError(
                f"a process that indexed {jobs[0].source} was killed: use fewer than {workers} --workers. Finished shards are kept"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(job: ShardJob) -> RowHeader:
    with job.mirror.filled(job.shard) if job.mirror is not None else nullcontext():
        before = job.shard.stat()
        rows = read_shard(job.shard, number=0, reading=job.reading, tokenizer=_tokenizer(job.tokenizer))
        if job.mirror is not None:
            rows.losses.named = [job.mirror.shown(line) for line in rows.losses.named]
        return write_row_file(job.rows, job.shard, rows, recipe=job.recipe, before=before)


@cache
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.open(path)


def _end_with_parent() -> None:
    """Make a worker end as soon as its parent has ended, for whatever reason. Ctrl-C is handled by the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Progress:
    """Logs every few seconds how many shards are done, the speed, and the remaining time."""

    def __init__(self, total: int, *, of: str) -> None:
        self._total, self._of = total, of
        self._began = self._said = time.monotonic()
        self._shards = self._samples = 0

    def add(self, header: RowHeader) -> None:
        """Count a finished shard."""
        self._shards += 1
        self._samples += header.samples
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES or self._shards == self._total:
            self._said, seconds = now, max(now - self._began, 1e-9)
            left = seconds / self._shards * (self._total - self._shards)
            logger.info(
                "%s: %d of %d shards, %d samples, %.0f samples/s, %s left",
                self._of, self._shards, self._total, self._samples, self._samples / seconds, timedelta(seconds=round(left)),
            )  # fmt: skip


def choose_shards(text: str, count: int) -> range:
    """Return the numbers of the shards that `--shards` selects out of `count`.

    "A-B" selects A to B, both included and counted from 0; those that do not exist are left out. "I/N" selects the I-th of N equal parts,
    counted from 0. Raises ValueError if the text is neither, or if A is greater than B.

    >>> choose_shards("10-19", 100), choose_shards("1/4", 100), choose_shards("95-199", 100)
    (range(10, 20), range(25, 50), range(95, 100))
    """
    if found := re.fullmatch(r"(\d+)-(\d+)", text):
        first, last = map(int, found.groups())
        if first > last:
            raise ValueError(f"--shards {text}: the first number is greater than the last: did you mean {last}-{first}?")
        return range(min(first, count), min(last + 1, count))
    if found := re.fullmatch(r"(\d+)/([1-9]\d*)", text):
        part, parts = map(int, found.groups())
        if part >= parts:
            raise ValueError(f"--shards {text}: parts are counted from 0, so the last one is {parts - 1}/{parts}")
        return range(part * count // parts, (part + 1) * count // parts)
    raise ValueError(f"--shards {text} is neither A-B (from 0, both included) nor I/N (the I-th of N parts, from 0)")


def check_choice(text: str, counts: dict[str, int]) -> None:
    """Raise ValueError if `--shards` is malformed, or if "A-B" selects no shard of any source.

    Args:
        counts: number of shards of each source, by name.
    """
    if not any([choose_shards(text, count) for count in counts.values()]) and "-" in text:
        have = ", ".join(f"{name} has {count}" for name, count in sorted(counts.items(), key=lambda entry: -entry[1])[:5])
        raise ValueError(f"--shards {text} names no shard of any source: shards are counted from 0, and {have}")
