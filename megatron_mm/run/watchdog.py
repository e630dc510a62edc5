"""Detects a process that hangs or has died, reports the position of all processes, and ends them so that the launcher can restart them.

Every process has a thread that watches its `training.progress.Progress`. No process can continue for long without the others, so if one
hangs, all of them stall within the time of a step. In a healthy run, the threads do not communicate at all. A thread that has seen no
progress for `train.watchdog` seconds writes the position of its process and the Python stacks of all its threads:

    RUN_DIR/watchdog/START/rank-00002.json, rank-00002.stacks     START: name of this start, the same for all processes
    RUN_DIR/watchdog/START/report.txt                             which process hangs and the positions of all, written by one of them

Then it waits until all have written, or some time has passed (a stopped process writes nothing), and ends with `EXIT_HUNG`. If the run
makes progress in the meantime, nothing happens.

If a process dies, its neighbours' messages fail at once, and these processes end with `EXIT_LOST` and one report (`lost_contact`). Others
may still wait for these neighbours: their threads see the file `lost` and write their positions, so that only dead processes write none.
NCCL's messages may wait instead of failing: torchrun then sends SIGTERM, to which a run responds after its current step, and a process that
makes no progress for `ASKED_SECONDS` after that counts as having lost contact.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from megatron_mm.parallel.topology import Topology
from megatron_mm.platform import collectives
from megatron_mm.reporting.run_files import EVENTS
from megatron_mm.run.incident import Here, Standing, frames_of, frames_of_error, read_folder, report, spy_on, write
from megatron_mm.training.metrics import MetricsFile
from megatron_mm.training.progress import Progress

logger = logging.getLogger(__name__)

FOLDER = "watchdog"
"""Name of the folder in the run directory."""
EXIT_HUNG = 75
"""Exit code of a process that hung, or waited for one that did: a temporary failure, worth another try (EX_TEMPFAIL)."""
EXIT_LOST = 76
"""Exit code of a process that lost contact with another one."""
ASKED_SECONDS = 20.0
"""Seconds without progress after a SIGTERM until a process presumes the others dead."""
LOST_SECONDS = 6.0
"""Seconds that a process which lost contact waits for others to write their positions."""
LOST = "lost"
"""Empty file in the folder of a start: a process has lost contact."""
WAITING_SECONDS = 2.0
"""Seconds without progress after which a process looks for that file."""
KEPT = 5
"""Number of folders of earlier starts that are kept."""
_MESSAGE_FAILED = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "nccl",
    "gloo",
)
"""Parts of the lower-case text of an error that show that a message to another process failed."""


class LostContact(RuntimeError):
    """Another process does not answer. The text is for the log; it is empty on all processes but one."""


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error means that another process does not answer, and not that this one made a mistake."""
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
        type(error) is RuntimeError and any(words in str(error).lower() for words in _MESSAGE_FAILED)
    )


class Watchdog:
    """Watches from `__enter__` to `__exit__`; created by all processes together after process groups are initialised."""

    def __init__(self, run_dir: Path, progress: Progress, topology: Topology, *, seconds: float) -> None:
        """
        Args:
            seconds: time without progress until a process counts as hung; 0 detects only processes that end.
        """
        name = [f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"]
        dist.broadcast_object_list(name, src=0)
        self.folder = run_dir / FOLDER / name[0]
        self.progress, self.topology, self.seconds = progress, topology, seconds
        self.patience = min(max(10.0, seconds / 4), 120.0)
        """Seconds that a process which has written its position waits for the others."""
        self._me = Here(topology.rank, socket.gethostname(), os.getpid())
        self._stopped = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        self._signals: tuple[int, int] | None = None
        if topology.is_main:
            _forget_old(run_dir / FOLDER)
            self.folder.mkdir(parents=True)
        dist.barrier()
        write(self._me, self.folder / f"{self._name}.here")

    def __enter__(self) -> Watchdog:
        if not self.seconds:
            return self
        collectives.install()
        if threading.current_thread() is threading.main_thread():
            self._signals = os.pipe2(os.O_NONBLOCK)  # a signal handler runs in the main thread, which may hang; this pipe does not need it
            signal.set_wakeup_fd(self._signals[1], warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        if self._signals is not None:
            signal.set_wakeup_fd(-1)
            for descriptor in self._signals:
                os.close(descriptor)
        if self.topology.is_main and not (self.folder / "report.txt").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty
                self.folder.parent.rmdir()

    # ------------------------------------------------------------------------------------------------------- in a thread

    def _look(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
        asked_at: float | None = None
        while not self._stopped.wait(min(2.0, self.seconds / 10)):
            since, now = self.progress.marked, time.monotonic()
            if asked_at is None and self._asked_to_end():
                asked_at = now
            if asked_at is not None and now - max(since, asked_at) > max(ASKED_SECONDS, self.progress.patience):
                self._tell("no answer after a signal to end")
                self._end(EXIT_LOST)
            if now - since > WAITING_SECONDS and (self.folder / LOST).exists() and not (self.folder / f"{self._name}.json").exists():
                self._write("")  # this process waits for one that has noticed the loss, and may notice it only when that one ends
            if now - since <= max(self.seconds, self.progress.patience):
                continue
            self._write("")
            if self._gather(self.patience, while_marked=since) is not None:
                self._end(EXIT_HUNG)
            logger.warning("step %d: progress again after %.0f s without any", self.progress.step, time.monotonic() - since)
            for suffix in ("json", "stacks"):
                (self.folder / f"{self._name}.{suffix}").unlink(missing_ok=True)

    def _asked_to_end(self) -> bool:
        if signal.SIGTERM in signal.sigpending():
            return True
        with contextlib.suppress(BlockingIOError):
            return self._signals is not None and signal.SIGTERM in os.read(self._signals[0], 4096)
        return False

    # --------------------------------------------------------------------------------------------------------- reporting

    @property
    def _name(self) -> str:
        return f"rank-{self.topology.rank:05d}"

    def lost_contact(self, error: BaseException) -> LostContact:
        """The exception to raise when a message to another process failed."""
        self._stopped.set()
        return LostContact(self._tell(str(error).strip().split("\n")[0], frames_of_error(error)))

    def _tell(self, problem: str, frames: list[str] | None = None) -> str:
        self._write(problem, frames)
        with contextlib.suppress(OSError):
            (self.folder / LOST).touch()
        return self._gather(LOST_SECONDS) or ""

    def _write(self, problem: str, frames: list[str] | None = None) -> None:
        """Write the position of this process, and its stacks. `frames` are given where an error has already left the position."""
        progress = self.progress
        standing = Standing(
            **vars(self._me),
            step=progress.step,
            phase=progress.phase,
            seconds=round(time.monotonic() - progress.marked, 1),
            since=time.time() - (time.monotonic() - progress.marked),
            last_collective=str(collectives.LAST),
            frames=frames or frames_of(self._main),
            problem=problem,
        )
        try:
            with (self.folder / f"{self._name}.stacks").open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
            write(standing, self.folder / f"{self._name}.json")
        except OSError as error:
            logger.error("the watchdog cannot write to %s (%s): %s", self.folder, error, standing)

    def _gather(self, seconds: float, *, while_marked: float | None = None) -> str | None:
        """Wait until all have written, or for `seconds`; one process then reports. Returns the report if this process made it, "" if
        another did, and None if the run made progress in the meantime."""
        path, deadline, said = self.folder / "report.txt", time.monotonic() + seconds, ""
        while not path.exists():
            if while_marked is not None and self.progress.marked != while_marked:
                return None
            if self.topology.is_main and len(list(self.folder.glob("rank-*.json"))) == self.topology.world_size:
                said = self._report(path)
            elif time.monotonic() > deadline + (0 if self.topology.is_main else 1):
                said = self._report(path)
                break
            time.sleep(0.1)
        time.sleep(0.5)  # the launcher ends all processes when the first one ends: let each see the report before
        return said

    def _report(self, path: Path) -> str:
        """Print and store what is known of all processes; only the first process to get here does so."""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return ""
        except OSError:  # nothing can be written, but the report can still be printed
            descriptor = os.open(os.devnull, os.O_WRONLY)
        standings, silent = read_folder(self.folder)
        text = report(standings, silent, folder=self.folder)
        with contextlib.suppress(OSError), os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
        with contextlib.suppress(OSError):  # the monitor of the main process may have ended, or never learn of it
            event = {"step": self.progress.step, "time": time.time(), "kind": "failed", "text": text.split("\n")[0]}
            MetricsFile(self.folder.parent.parent / EVENTS, resume_step=None).write(event)
        with contextlib.suppress(OSError, ValueError):  # the log may be on the disk that is full, or its reader gone
            print(f"megatron-mm: error: {text}", file=sys.stderr, flush=True)
        if not any(standing.problem for standing in standings):
            spy_on(silent, self.folder)
        return text

    @staticmethod
    def _end(code: int) -> NoReturn:
        end_process(code)


def end_process(code: int) -> NoReturn:
    """End this process without clean-up, which would wait for processes that never answer."""
    for child in multiprocessing.active_children():  # writers of a checkpoint that nobody will complete
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _forget_old(folder: Path) -> None:
    """Delete all folders but the newest few that have a report: the other runs ended well, or were killed outright."""
    earlier = sorted(folder.glob("*/")) if folder.is_dir() else []
    told = [path for path in earlier if (path / "report.txt").exists()]
    for path in set(earlier) - set(told[-KEPT:]):
        shutil.rmtree(path, ignore_errors=True)
