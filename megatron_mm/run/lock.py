"""The lock on a run directory: only one run at a time may use it.

`RUN_DIR/running.lock` is made by the first process of a run before it writes anything else, with an exclusive create, and removed when the
run ends, however it ends, unless the process is killed. It names its holder. A thread of the holder touches it every `BEAT_SECONDS`; the
file system's own clock counts, so nodes may disagree about the time. flock is not used: shared file systems often keep it to one node.

A lock that was left behind is taken over. A lock counts as left behind if its holder is gone:

    holder ...                                             is gone when
    in an earlier attempt of the same Slurm job            at once: Slurm ends a job before it requeues it
    in an earlier start of the same torchrun               at once: torchrun ends its processes before it starts them again
    on the same machine (host, boot, process namespace)    no process has its number and start time, or it is a zombie
    anywhere else                                          the last beat is older than `STALE_SECONDS`

For a holder elsewhere, the new run has to watch the file. If it sees another beat, it refuses to start. If the last beat is old and no beat
follows during two beats' time by its own clock (a file system's clock may have jumped), it takes over. It also takes over after
`STALE_SECONDS` without a beat by its own clock, whatever the age of the last beat, whose time may be in the future.

A run whose lock was taken over (because its node stalled for minutes) ends before it writes a checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from megatron_mm.reporting.run_files import LOCK_FILE

logger = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
"""Seconds between two touches of the lock."""
STALE_SECONDS = 240.0
"""Seconds after the last touch until a holder elsewhere is presumed dead."""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _process_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Start time of a process on this machine, in clock ticks since boot; None if there is no such process, or it is a zombie."""
    fields = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; its fields are the lock's content."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: str | None = field(default_factory=lambda: _start_of(os.getpid()))
    """Start time of the process, in clock ticks since boot: another process may get the same number later."""
    machine: str = field(default_factory=lambda: f"{_first_line('/proc/sys/kernel/random/boot_id')} {_process_namespace()}")
    """Boot and process namespace, within which process numbers are comparable."""
    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))
    attempt: str = field(default_factory=lambda: os.environ.get("SLURM_RESTART_COUNT", "0"))
    """Number of times that Slurm has requeued the job."""
    launch: str = field(default_factory=lambda: os.environ.get("TORCHELASTIC_RUN_ID", "none"))
    """torchrun's run id, which stays the same when it restarts the processes; "none" if it has none."""
    restart: int = field(default_factory=lambda: int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    """Number of times that torchrun has restarted the processes. Two torchruns may have been given the same id."""
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Unique to each run."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}{f', Slurm job {self.job}' if self.job else ''}, since {self.since}"

    def is_gone(self, *, asker: Holder) -> bool | None:
        """Whether the holder has ended, as far as the asker can tell; None if it cannot tell."""
        if self.job is not None and self.job == asker.job and self.attempt != asker.attempt:
            return True
        if self.launch != "none" and (self.launch, self.job) == (asker.launch, asker.job) and self.restart < asker.restart:
            return True
        if (self.host, self.machine) == (asker.host, asker.machine):
            return self.started is None or _start_of(self.pid) != self.started
        return None


class RunLock:
    """Holds a run directory, from `acquire` to `release`; only the first process of a run has one."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK_FILE
        self.me = Holder()
        self.taken_by: str | None = None
        """The current holder, if the lock was taken over from this run."""
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def acquire(self) -> None:
        """Acquire the lock. Creates the run directory, accessible only to its owner, if there is none. Raises ValueError, naming the
        holder, if another run uses the directory."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        said, seen, since = False, None, time.monotonic()
        while not self._create():
            found = _read(self.path)
            if found is None:
                continue  # released just now
            holder, beat, age = found
            token = holder.token if holder else ""
            gone = holder.is_gone(asker=self.me) if holder else None
            waited = time.monotonic() - since
            if gone or (gone is None and waited > (2 * BEAT_SECONDS if age > STALE_SECONDS else STALE_SECONDS)):
                logger.warning("taking over %s, which %s left behind (last beat %.0f s ago)", self.path, holder or "nobody", age)
                self._remove_stale(token)
                seen, since = None, time.monotonic()
                continue
            if gone is False or (seen is not None and seen != (token, beat)):
                raise ValueError(
                    f"run directory {self.path.parent} is in use by {holder or 'a run that has just started'} (last beat {age:.0f} s ago): "
                    "wait for it or end it, or use another --run-dir"
                )
            seen = (token, beat)
            if not said:
                wait = min(max(STALE_SECONDS - age, 2 * BEAT_SECONDS), STALE_SECONDS)
                logger.warning("%s is held by %s: waiting up to %.0f s for a sign of life", self.path, holder or "an unknown process", wait)
                said = True
            time.sleep(min(1.0, BEAT_SECONDS / 4))
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock, if it is still this run's."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if _token(self.path) == self.me.token:
                self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(asdict(self.me), indent=1) + "\n")
                file.flush()
                os.fsync(descriptor)
        except OSError as error:  # a lock that names no holder would delay the next start
            self.path.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        return True

    def _remove_stale(self, token: str) -> None:
        """Remove a stale lock. It is renamed first, so that only one of two runs that take over at once succeeds. The slower one may catch
        the faster one's new lock instead, and then puts it back."""
        aside = self.path.with_name(f".{LOCK_FILE}-{uuid.uuid4().hex[:8]}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if _token(aside) != token:
            os.link(aside, self.path)
        aside.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                holder = _holder(self.path.read_bytes())
                if holder is not None and holder.token != self.me.token:
                    self.taken_by = str(holder)
                    return
                os.utime(self.path)
            except FileNotFoundError:
                self.taken_by = "nobody (the file was removed)"
                return
            except OSError as error:
                logger.warning("%s cannot be touched: %s", self.path, error)


def gone_since(run_dir: Path) -> float | None:
    """When the processes of a run gave their last sign of life, in seconds since 1970, if they are gone; None while they are there, or
    cannot be told to be gone yet, or before a run has written anything. Only reads, so anybody may ask.

    A process that is no longer on this machine counts as gone four beats after its last one, because torchrun or Slurm may be starting the
    run again. A run that left no lock has ended; it counts as gone `STALE_SECONDS` after it wrote its last file.
    """
    try:
        content, beat = (run_dir / LOCK_FILE).read_bytes(), (run_dir / LOCK_FILE).stat().st_mtime
    except FileNotFoundError:
        written = [path.stat().st_mtime for path in run_dir.glob("*") if path.suffix in (".json", ".jsonl")]
        newest = max(written, default=math.inf)
        return newest if time.time() - newest > STALE_SECONDS else None
    holder = _holder(content)
    here = holder.is_gone(asker=Holder(job=None, launch="none")) if holder is not None else None
    patience = 4 * BEAT_SECONDS if here else STALE_SECONDS
    return beat if here is not False and time.time() - beat > patience else None


def held_since(run_dir: Path) -> float | None:
    """When the process that holds a run directory started, in seconds since 1970; None if none holds it."""
    try:
        holder = _holder((run_dir / LOCK_FILE).read_bytes())
        return None if holder is None else datetime.fromisoformat(holder.since).timestamp()
    except (FileNotFoundError, ValueError):
        return None


def _holder(content: bytes) -> Holder | None:
    try:
        values = json.loads(content)
        return Holder(**{"restart": 0, **values}) if isinstance(values, Mapping) else None
    except (ValueError, TypeError):
        return None


def _token(path: Path) -> str | None:
    """Token of a lock's holder: "" if the lock names no holder, None if there is no lock."""
    try:
        holder = _holder(path.read_bytes())
    except FileNotFoundError:
        return None
    return holder.token if holder else ""


def _read(path: Path) -> tuple[Holder | None, float, float] | None:
    """A lock's holder (None if not yet written), its last beat, and the seconds since then by the file system's clock; None if there is no
    lock."""
    probe = path.with_name(f".{LOCK_FILE}-{uuid.uuid4().hex[:8]}")
    try:
        content, beat = path.read_bytes(), path.stat().st_mtime
        probe.touch()
        return _holder(content), beat, probe.stat().st_mtime - beat
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)
