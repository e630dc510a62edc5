"""A conversion as a list of small tasks: parallel, with bounded memory, resumable; its output is either complete or absent.

The output is written to a temporary directory next to its destination, such as `.NAME.partial`, which is renamed when it is complete. It is
divided into lanes: ranges of bytes of one file, which one thread at a time fills task by task. After each task, a line with its position,
length and CRC-32 is added to `progress.jsonl`. A conversion that is started again verifies the bytes that these lines describe. In each
lane it continues after the last task whose bytes are correct, and repeats everything else. If the lines belong to a different conversion
(other sources, options or sizes), the existing output is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from megatron_mm.conversion.files import tensor_bytes, write_at
from megatron_mm.platform.files import checksum_of, sync_to_disk
from megatron_mm.reporting.units import size

logger = logging.getLogger(__name__)

PROGRESS = "progress.jsonl"
_LOG_SECONDS = 5.0


@dataclass(frozen=True)
class Task:
    """Produces some tensors of the output."""

    name: str
    num_bytes: int
    """Bytes that it writes, not counting headers."""
    memory: int
    """Largest memory of the tensors that it holds at once, in bytes."""
    make: Callable[[], Sequence[torch.Tensor]]
    """Returns the tensors, in their order in the file."""


@dataclass(frozen=True)
class Lane:
    """A range of bytes of a file that begins at `start` and is filled by its tasks one after another."""

    file: str
    tasks: tuple[Task, ...]
    write: Callable[[Task, Cursor], None]
    start: int = 0
    header: bytes = b""
    """Written at the file's beginning."""
    file_size: int | None = None
    """Size of the whole file in bytes; None if it is not known in advance."""


@dataclass(frozen=True)
class Written:
    """Position and checksum of a task's bytes."""

    lane: int
    offset: int
    length: int
    checksum: int


@dataclass
class Cursor:
    """Writes to a file from an offset on and updates a CRC-32. torch.save accepts it as a file."""

    descriptor: int
    offset: int
    checksum: int = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self.checksum = write_at(self.descriptor, self.offset, view, self.checksum)
        self.offset += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""


def write_values(task: Task, cursor: Cursor) -> None:
    """Write only the tensors' bytes, as in a safetensors file."""
    for tensor in task.make():
        if tensor.numel():
            cursor.write(tensor_bytes(tensor.contiguous()))


def write_archives(task: Task, cursor: Cursor) -> None:
    """Write each tensor with torch.save, as in a distributed checkpoint."""
    for tensor in task.make():
        torch.save(tensor.contiguous(), cursor)  # type: ignore[arg-type]


class _Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


Sized = TypeVar("Sized", bound=_Sized)


def cut(items: Iterable[Sized], *, limit: int) -> list[list[Sized]]:
    """Divide items, in order, into groups of at most `limit` bytes; a larger item is a group of its own."""
    groups: list[list[Sized]] = [[]]
    used = 0
    for item in items:
        if groups[-1] and used + item.num_bytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(item)
        used += item.num_bytes
    return groups


@contextmanager
def partial_directory(path: Path, *, fingerprint: dict[str, Any]) -> Iterator[Path]:
    """Lock the directory that a conversion writes to. The output of an interrupted conversion with the same fingerprint is kept.

    Raises ValueError if another conversion is writing there.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another conversion is writing to {path}: wait for it or stop it") from None
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
        if _first_line(path / PROGRESS) != {"conversion": digest}:
            leftover = [entry for entry in path.iterdir() if entry.name != ".lock"]
            if leftover:
                logger.info("removing %s, left over from a conversion with other files or options", path)
            for entry in leftover:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            (path / PROGRESS).write_text(json.dumps({"conversion": digest}) + "\n")
        try:
            yield path
        except BaseException:
            if (path / PROGRESS).read_text().count("\n") == 1:  # nothing to resume from
                shutil.rmtree(path)
            else:
                logger.info("the tensors written so far are kept in %s: start the same command again to resume", path)
            raise


def finish(partial: Path, final: Path) -> None:
    """Sync a complete conversion to disk and rename it to its final name."""
    for name in (PROGRESS, ".lock"):
        (partial / name).unlink()
    for folder, _, files in os.walk(partial):
        for name in files:
            sync_to_disk(Path(folder) / name)
        sync_to_disk(Path(folder))
    partial.rename(final)
    sync_to_disk(final.parent)


def run_lanes(lanes: Sequence[Lane], partial: Path, *, threads: int, memory: int) -> list[Written]:
    """Run all tasks that are not done yet; return the positions of all tasks' bytes, in the order of the lanes and their tasks.

    Args:
        threads: number of threads that work at once.
        memory: largest memory of the tensors of all threads, in bytes, unless a single task needs more.

    Raises ValueError, before anything is written, if the disk does not have enough free space.
    """
    journal = _Journal(partial / PROGRESS)
    known = journal.read()
    _check_room(partial, lanes, known)
    for lane in lanes:
        _prepare_file(partial / lane.file, lane)
    progress = _Progress(total=sum(task.num_bytes for lane in lanes for task in lane.tasks))
    work = _Work(partial, journal, progress, _Budget(memory))
    with ThreadPoolExecutor(threads, thread_name_prefix="convert") as pool:
        futures = [pool.submit(work.fill, index, lane, known[index]) for index, lane in enumerate(lanes)]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:  # also on an interruption: running tasks finish, and no other begins
            work.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    progress.finish()
    return [written for future in futures for written in future.result()]


@dataclass
class _Work:
    partial: Path
    journal: _Journal
    progress: _Progress
    budget: _Budget
    stop: threading.Event = field(default_factory=threading.Event)

    def fill(self, index: int, lane: Lane, known: list[Written]) -> list[Written]:
        """Fill a lane, after the tasks whose bytes are known to be written and are still correct. If it fails, all other lanes stop."""
        try:
            return self._fill(index, lane, known)
        except BaseException:
            self.stop.set()
            raise

    def _fill(self, index: int, lane: Lane, known: list[Written]) -> list[Written]:
        path = self.partial / lane.file
        done = list(_still_right(path, lane, known))
        for task in lane.tasks[: len(done)]:
            self.progress.skip(task.num_bytes)
        offset = done[-1].offset + done[-1].length if done else lane.start
        with path.open("r+b", buffering=0) as file:
            for task in lane.tasks[len(done) :]:
                if self.stop.is_set():
                    break
                cursor = Cursor(file.fileno(), offset)
                with self.budget.hold(task.memory):
                    lane.write(task, cursor)
                written = Written(index, offset, cursor.offset - offset, cursor.checksum)
                self.journal.add(written)
                done.append(written)
                offset = cursor.offset
                self.progress.add(task.num_bytes)
            if lane.file_size is None:
                file.truncate(offset)  # an interrupted write may have left more
        return done


def _still_right(path: Path, lane: Lane, known: list[Written]) -> Iterator[Written]:
    """Yield the written tasks of a lane, up to the first whose bytes are no longer correct."""
    offset = lane.start
    for written in known[: len(lane.tasks)]:
        if written.offset != offset or checksum_of(path, offset=offset, length=written.length) != written.checksum:
            logger.warning("%s is incomplete from byte %d; the rest is written again", path, offset)
            return
        yield written
        offset += written.length


def _check_room(partial: Path, lanes: Sequence[Lane], known: dict[int, list[Written]]) -> None:
    there = sum(written.length for done in known.values() for written in done)
    needed = sum(task.num_bytes for lane in lanes for task in lane.tasks) - there
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise ValueError(f"{partial.parent} has {size(free)} of free space, but {size(needed)} will be written: free some space")


def _prepare_file(path: Path, lane: Lane) -> None:
    """Create a lane's file; an existing one keeps its contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        if lane.header:
            write_at(file.fileno(), 0, lane.header)
        if lane.file_size is not None and os.fstat(file.fileno()).st_size != lane.file_size:
            file.truncate(lane.file_size)


class _Journal:
    """`progress.jsonl`: one line for each task that has been written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()

    def read(self) -> dict[int, list[Written]]:
        """Return the written tasks by lane, in the order of their bytes. Reading ends at a line that an interruption has cut off."""
        found: dict[int, list[Written]] = defaultdict(list)
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break
            kept.append(line)
            if "lane" in entry:
                written = Written(**entry)
                rest = [earlier for earlier in found[written.lane] if earlier.offset < written.offset]
                found[written.lane] = [*rest, written]  # a task that was written again replaces its earlier line and all after it
        self.path.write_text("\n".join(kept) + "\n")
        return found

    def add(self, written: Written) -> None:
        with self.lock, self.path.open("a") as file:
            file.write(json.dumps(asdict(written)) + "\n")


class _Budget:
    """Lets tasks run while their total memory stays within a bound; a task that needs more than the bound runs alone."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        amount = min(amount, self.size)
        with self.changed:
            self.changed.wait_for(lambda: self.used + amount <= self.size)
            self.used += amount
        try:
            yield
        finally:
            with self.changed:
                self.used -= amount
                self.changed.notify_all()


class _Progress:
    """Logs the progress of a conversion and an estimate of the time left."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.skipped = total, 0, 0
        self.started = self.told = time.monotonic()
        self.lock = threading.Lock()

    def skip(self, num_bytes: int) -> None:
        """Count bytes that an earlier, interrupted conversion has written."""
        with self.lock:
            self.skipped += num_bytes
            self.done += num_bytes

    def add(self, num_bytes: int) -> None:
        with self.lock:
            self.done += num_bytes
            now = time.monotonic()
            if now - self.told >= _LOG_SECONDS:
                self.told = now
                rate = (self.done - self.skipped) / (now - self.started)
                left = (self.total - self.done) / rate
                logger.info("%s of %s, %s/s, about %.0f s left", size(self.done), size(self.total), size(rate), left)

    def finish(self) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        kept = f"; {size(self.skipped)} were already written" if self.skipped else ""
        written = self.done - self.skipped
        logger.info("wrote %s in %.2g s (%s/s)%s", size(written), seconds, size(written / seconds), kept)


def _first_line(path: Path) -> Any:
    if not path.is_file():
        return None
    with path.open() as file:
        try:
            return json.loads(file.readline())
        except json.JSONDecodeError:
            return None
