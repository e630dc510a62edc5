"""A second copy of every checkpoint, in another directory or an object store, made in the background by the first process.

A copy has the same files under the same names. Every file is read back from the store, and its size and CRC-32 must match the manifest's.
`manifest.json` is written last, so a folder that contains one is a complete copy, as in a run directory. If copying a checkpoint fails, an
error is logged and training continues; the next checkpoint is copied as usual. A run that has no usable checkpoint of its own fetches the
newest copy when it starts.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from megatron_mm.platform.files import BLOCK_BYTES, checksum_of, sync_to_disk
from megatron_mm.training.checkpoint.fallback import DAMAGED, set_aside
from megatron_mm.training.checkpoint.integrity import read_manifest
from megatron_mm.training.checkpoint.names import MANIFEST, TENSORS, completed_checkpoints

logger = logging.getLogger(__name__)


class Copies:
    """Copies checkpoints one after another in a thread, on the first process only."""

    def __init__(self, target: str, *, superseded: Callable[[list[Path]], list[Path]]) -> None:
        """
        Args:
            target: a directory or URL.
            superseded: given checkpoints, oldest first, returns the ones that may be removed.

        Raises ValueError if the store cannot be opened.
        """
        try:
            self.store, self.root = fsspec.core.url_to_fs(target)
        except (ImportError, ValueError) as error:
            raise ValueError(f"checkpoint.copy_to {target} cannot be opened: {error}") from error
        self.target = target
        self.superseded = superseded
        self.busy: set[Path] = set()
        """Checkpoints that still have to be copied, so they must not be removed yet."""
        self._waiting: queue.Queue[Path] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="copies of checkpoints", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Path) -> None:
        """Queue a checkpoint for copying. It replaces an older one that is still waiting, which is then not copied."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.busy.discard(self._waiting.get_nowait())
        self.busy.add(checkpoint)
        self._waiting.put(checkpoint)

    def finish(self, *, seconds: float, beat: Callable[[], None]) -> None:
        """Wait until all queued checkpoints are copied, for at most `seconds`; call `beat` while waiting."""
        deadline = time.monotonic() + seconds
        while self.busy and time.monotonic() < deadline:
            beat()
            time.sleep(0.05)
        if self.busy:
            logger.error(
                "the copy of %s was not complete after %.0f s and is abandoned", ", ".join(p.name for p in self.busy.copy()), seconds
            )

    def complete(self) -> list[str]:
        """Return the names of the complete copies, oldest first."""
        if not self.store.exists(self.root):
            return []
        names = [path.rstrip("/").rpartition("/")[2] for path in self.store.ls(self.root, detail=False)]
        return sorted(name for name in names if name.startswith("step_") and self.store.exists(f"{self.root}/{name}/{MANIFEST}"))

    def fetch(self, name: str, folder: Path) -> Path:
        """Fetch a copy into the run's folder. Raises OSError or ValueError if it cannot be read or has changed since it was copied."""
        partial = folder / f".partial-{name}-{uuid.uuid4().hex[:8]}"
        (partial / TENSORS).mkdir(parents=True)
        try:
            self._get(f"{self.root}/{name}/{MANIFEST}", partial / MANIFEST)
            for file, (size, checksum) in _files(partial).items():
                self._get(f"{self.root}/{name}/{file}", partial / file)
                if (partial / file).stat().st_size != size or checksum_of(partial / file) != checksum:
                    raise ValueError(f"{self.target}/{name}/{file} differs from what was copied: restore it or remove {self.target}/{name}")
                sync_to_disk(partial / file)
            for own in completed_checkpoints(folder.parent):  # they are damaged, otherwise no copy would be fetched
                set_aside(own, prefix=DAMAGED)
            final = folder / name
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    # -------------------------------------------------------------------------------------------------------- in a thread

    def _work(self) -> None:
        while True:  # until the process ends: a daemon thread
            checkpoint = self._waiting.get()
            began = time.monotonic()
            try:
                size = self._copy(checkpoint)
                logger.info(
                    "checkpoint %s copied to %s: %.3g GB in %.1f s", checkpoint.name, self.target, size / 1e9, time.monotonic() - began
                )
                self._drop()
            except Exception as error:  # a store may raise any type; training continues
                logger.error("checkpoint %s was not copied to %s: %s: %s", checkpoint.name, self.target, type(error).__name__, error)
            finally:
                self.busy.discard(checkpoint)

    def _copy(self, checkpoint: Path) -> int:
        """Copy a checkpoint, and return the number of bytes copied."""
        to, total = f"{self.root}/{checkpoint.name}", 0
        if self.store.exists(to):
            self.store.rm(to, recursive=True)  # left by an earlier attempt
        self.store.makedirs(f"{to}/{TENSORS}", exist_ok=True)
        for file, (size, checksum) in _files(checkpoint).items():
            self.store.put_file(str(checkpoint / file), f"{to}/{file}")
            found = self._checksum(f"{to}/{file}")
            if found != (size, checksum):
                raise OSError(f"{file} was read back as {found[0]} bytes with CRC-32 {found[1]:08x}, expected {size} with {checksum:08x}")
            total += size
        self.store.put_file(str(checkpoint / MANIFEST), f"{to}/{MANIFEST}")
        return total

    def _drop(self) -> None:
        for old in self.superseded([Path(name) for name in self.complete()]):
            self.store.rm(f"{self.root}/{old.name}", recursive=True)

    def _checksum(self, path: str) -> tuple[int, int]:
        size = checksum = 0
        with self.store.open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
        return size, checksum

    def _get(self, path: str, to: Path) -> None:
        self.store.get_file(path, str(to))


def _files(checkpoint: Path) -> dict[str, Any]:
    """Return size and CRC-32 of every file in a checkpoint except the manifest, by relative path."""
    manifest = read_manifest(checkpoint)
    described = manifest.get("descriptions", {})
    return {**described, **{f"{TENSORS}/{name}": entry for name, entry in manifest["files"].items()}}
