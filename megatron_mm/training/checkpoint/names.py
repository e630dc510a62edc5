"""The locations of a run's checkpoints, and the names of the files in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

TENSORS = "tensors"
"""Folder of a checkpoint that holds megatron-core's distributed checkpoint."""
MANIFEST = "manifest.json"
"""File of a checkpoint with size and CRC-32 of every file in `TENSORS`; written last, so a folder that has it is complete."""
STEP_FOLDERS = "step_" + 8 * "[0-9]"
"""Glob pattern for checkpoint folders. It does not match copies that a user keeps there, such as `step_00000500.old`."""
BEST = "best"
"""Link, next to the checkpoints, to the one with the lowest held-out loss, if `checkpoint.best` is set."""
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|generators\.")
"""Prefixes of tensors that are not weights. A model with experts has a second optimizer for them, hence `chained_`."""


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path refers to: the path itself, or the newest checkpoint in a run directory.

    Raises ValueError if there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    found = completed_checkpoints(path.parent if path.name == "checkpoints" else path)
    if not found:
        why = "" if path.exists() else ", because it does not exist"
        raise ValueError(
            f"{path} is neither a complete checkpoint nor a run directory with one{why}: specify RUN_DIR or RUN_DIR/checkpoints/step_..."
        )
    return found[-1]


def completed_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run_dir / "checkpoints").glob(f"{STEP_FOLDERS}/{MANIFEST}"))


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def point_to(link: Path, checkpoint: Path) -> None:
    """Atomically create or redirect a link to a checkpoint in the same folder."""
    aside = link.with_name(f".{link.name}-new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(checkpoint.name)
    aside.rename(link)


def superseded(checkpoints: Sequence[Path], *, keep: int, keep_every: int) -> list[Path]:
    """Return the checkpoints (given oldest first) that may be removed: neither among the newest `keep` nor of a multiple of `keep_every`.

    Example: of steps 2, 4, 6, 8 and 10, with keep 2 and keep_every 4, steps 2 and 6 may be removed.
    """
    return [path for path in checkpoints[:-keep] if not keep_every or step_of(path) % keep_every]


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run that the first process sees, or None. Called by all processes together."""
    complete = completed_checkpoints(run_dir)
    found = [str(complete[-1]) if complete else None]
    dist.broadcast_object_list(found, src=0)
    return None if found[0] is None else Path(found[0])


def belongs_to_model(name: str) -> bool:
    """Return whether a tensor in a checkpoint is a weight of the model, not state of an optimizer or generator."""
    return _NOT_WEIGHTS.match(name) is None
