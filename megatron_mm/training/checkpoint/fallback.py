"""Finds the checkpoint from which a run resumes: the newest undamaged one. A damaged checkpoint loses its steps, not the run.

A damaged checkpoint is renamed to `damaged-step_...`: no run loads or removes it. This happens only after an older checkpoint was found to
be undamaged. If no checkpoint can be read, the file system is the likelier cause, and nothing is renamed.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from megatron_mm.parallel.topology import Topology
from megatron_mm.platform.files import sync_to_disk
from megatron_mm.training.checkpoint.integrity import ADVICE, check_descriptions, verify
from megatron_mm.training.checkpoint.names import completed_checkpoints

logger = logging.getLogger(__name__)

DAMAGED = "damaged-"
"""Prefix for the name of a damaged checkpoint."""


def newest_whole_checkpoint(run_dir: Path, topology: Topology) -> Path | None:
    """Return the newest undamaged checkpoint of a run, or None if the run has no checkpoint. Called by all processes together.

    Newer, damaged checkpoints are set aside, and their files and problems are logged. Raises ValueError, on all processes, if all
    checkpoints are damaged.
    """
    names = [[path.name for path in completed_checkpoints(run_dir)]]
    dist.broadcast_object_list(names, src=0)  # from the first process, so that all check the same checkpoints
    candidates = [run_dir / "checkpoints" / name for name in reversed(names[0])]
    problems: list[str] = []
    for number, candidate in enumerate(candidates):
        try:
            verify(candidate, topology)
        except ValueError as error:
            problems.append(str(error))
            continue
        for damaged, problem in zip(candidates[:number], problems, strict=True) if topology.is_main else ():
            logger.error(
                "checkpoint %s is damaged and ignored: %s. The run resumes from %s and repeats the steps in between. The damaged folder "
                "is kept as %s%s: look at the disk, then delete it",
                damaged.name,
                problem.partition(ADVICE)[0],
                candidate.name,
                DAMAGED,
                damaged.name,
            )
        if topology.is_main and problems:
            for damaged in candidates[:number]:
                set_aside(damaged, prefix=DAMAGED)
        dist.barrier()
        return candidate
    if problems:
        raise ValueError(
            f"no checkpoint in {run_dir / 'checkpoints'} can be resumed from: {'; '.join(problems)}. If every file is affected, check "
            "the file system first; to start again, use another --run-dir"
        )
    return None


def newest_described_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint whose manifest and description files are undamaged, or None if there is none.

    Its tensors are not checked, so this needs no process group.
    """
    for candidate in reversed(completed_checkpoints(run_dir)):
        try:
            check_descriptions(candidate)
        except (ValueError, OSError) as error:
            logger.warning("trying the previous checkpoint: %s", str(error).partition(ADVICE)[0])
        else:
            return candidate
    return None


def set_aside(checkpoint: Path, *, prefix: str) -> None:
    """Rename a checkpoint so that no run loads or removes it."""
    to, number = checkpoint.with_name(prefix + checkpoint.name), 1
    while to.exists():
        number += 1
        to = checkpoint.with_name(f"{prefix}{checkpoint.name}-{number}")
    checkpoint.rename(to)
    sync_to_disk(checkpoint.parent)
