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
"""What the folders of checkpoints match. A copy that somebody keeps beside them, such as `step_00000500.old`, is none of the run's."""
BEST = "best"
"""Beside the checkpoints: a link to the one with the lowest held-out loss, where `checkpoint.best` asks for it."""
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|generators\.")
"""How the names of a checkpoint's other tensors begin. A model with experts has an optimizer for them beside the other."""


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run directory.

    Raises ValueError if there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    found = completed_checkpoints(path.parent if path.name == "checkpoints" else path)
    if not found:
        raise ValueError(
            f"{path} is neither a complete checkpoint nor a run directory with one: give RUN_DIR or RUN_DIR/checkpoints/step_..."
        )
    return found[-1]


def completed_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run_dir / "checkpoints").glob(f"{STEP_FOLDERS}/{MANIFEST}"))


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was made after, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def point_to(link: Path, checkpoint: Path) -> None:
    """Make, or turn, a link to a checkpoint beside it, at once."""
    aside = link.with_name(f".{link.name}-new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(checkpoint.name)
    aside.rename(link)


def superseded(checkpoints: Sequence[Path], *, keep: int, keep_every: int) -> list[Path]:
    """Of a run's checkpoints, oldest first, those that need not stay: not among the newest `keep`, nor of a multiple of `keep_every`.

    Steps 2, 4, 6, 8 and 10 with keep 2 and keep_every 4: 2 and 6 may go.
    """
    return [path for path in checkpoints[:-keep] if not keep_every or step_of(path) % keep_every]


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, as the first process sees it; called by all processes together."""
    complete = completed_checkpoints(run_dir)
    found = [str(complete[-1]) if complete else None]
    dist.broadcast_object_list(found, src=0)
    return None if found[0] is None else Path(found[0])


def belongs_to_model(name: str) -> bool:
    """Whether a checkpoint's tensor is the model's, and not the optimizer's or a generator's."""
    return _NOT_WEIGHTS.match(name) is None
