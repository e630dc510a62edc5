"""A hook that makes one process of a run fail in a given way at a given step; used with `--extra-hooks` and this file's path.

The environment determines the fault: FAULT is "KIND RANK STEP"; FAULT_ONCE is a file that is created before failing, so that a restart
does not fail again. With FAULT_STOP the first process sends itself SIGTERM after that step, whether or not the fault has occurred.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mm.data.load.loader import Loader, StepBatch
from megatron_mm.training.trainer import Hook, StepRecord, Trainer

SMALL_FILE_BYTES = 4096
"""Largest file on the simulated full disk, in bytes."""


class Faulty(Hook):
    """KIND is one of

    none                  no fault
    kill, stop            SIGKILL, SIGSTOP
    hang                  the main thread sleeps
    collective            the process enters a collective that no other process joins
    loader                the loader returns no more batches
    term                  SIGTERM: stop with a checkpoint
    pause                 no fault: all processes wait until the file FAULT_ONCE.go exists
    full_disk             files cannot grow beyond a few kilobytes, for four steps
    killed_while_saving   SIGKILL after the first step at whose end a save is in progress
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        kind, rank, step = os.environ["FAULT"].split()
        self.kind, self.step = kind, int(step)
        self.once = Path(os.environ["FAULT_ONCE"])
        self.armed = (kind == "pause" or trainer.topology.rank == int(rank)) and not self.once.exists()
        self.stop = int(os.environ.get("FAULT_STOP") or 0)

    def after_step(self, record: StepRecord) -> None:
        if record.step == self.stop and self.trainer.topology.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
        if not self.armed:
            return
        if self.kind == "full_disk" and record.step == self.step + 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if self.kind == "killed_while_saving" and record.step >= self.step and self._saving():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if record.step == self.step:
            self._fail()

    def _saving(self) -> bool:
        return any((self.trainer.run_dir / "checkpoints").glob(".partial-*"))

    def _fail(self) -> None:
        if self.kind in ("none", "killed_while_saving"):
            return
        self.once.touch()
        if self.kind in ("kill", "stop", "term"):
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[self.kind])
        elif self.kind == "hang":
            time.sleep(1000)
        elif self.kind == "pause":
            while not self.once.with_suffix(".go").exists():
                self.trainer.progress.beat()
                time.sleep(0.1)
        elif self.kind == "collective":
            dist.barrier()
        elif self.kind == "loader":
            Loader.__next__ = _never  # type: ignore[method-assign]
        elif self.kind == "full_disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, resource.RLIM_INFINITY))


def _never(loader: Any) -> StepBatch:
    time.sleep(1000)
    raise AssertionError
