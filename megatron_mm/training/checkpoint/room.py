"""Whether the disk has room for the checkpoints to come: a warning after the first of them is better than lost saves later."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_mm.config import CheckpointConfig
from megatron_mm.training.checkpoint.integrity import read_manifest
from megatron_mm.training.checkpoint.names import completed_checkpoints


def missing_room(run_dir: Path, *, config: CheckpointConfig, saves_left: int) -> str | None:
    """Return a warning if the disk lacks room for the checkpoints that will be there at once, judging by the newest one; otherwise None.

    A checkpoint is written before those that it supersedes are removed, so there are `config.keep` and one more.

    Args:
        saves_left: how many checkpoints the run will still write.
    """
    there = completed_checkpoints(run_dir)
    if not there or saves_left < 1:
        return None
    try:
        size = sum(length for length, _ in read_manifest(there[-1])["files"].values())
        free = shutil.disk_usage(run_dir).free
    except (OSError, ValueError):  # a damaged checkpoint is reported by the next start, which reads it
        return None
    more = min(saves_left, max(1, config.keep + 1 - len(there)))
    if free >= more * size:
        return None
    return (
        f"a checkpoint of this run takes {size / 1e9:.3g} GB, and {more} more will be written before an old one is removed "
        f"(checkpoint.keep {config.keep}), but the disk of {run_dir} has only {free / 1e9:.3g} GB free: free some space, or start again "
        "with a lower --checkpoint.keep, before saves fail"
    )
