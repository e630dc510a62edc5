"""Rolls a run back to a checkpoint, and skips the data that followed it.

A hook raises `RollBack` on all processes alike. `run.start` then sets aside the checkpoints since the trouble began, writes a line to
`RUN_DIR/roll_backs.jsonl`, and starts again from the checkpoint before it, in the same processes. The global batches that the plan had from
that checkpoint to the step of the trouble are left out: the line holds the plan's cursor after them. Whenever a run resumes from that
checkpoint, then or later, it takes the cursor from the line, so a run that went back and a resume of it see the same data.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mm.config import TrainConfig
from megatron_mm.parallel.topology import Topology
from megatron_mm.reporting.run_files import json_objects
from megatron_mm.training.checkpoint import TrainState, completed_checkpoints
from megatron_mm.training.checkpoint.fallback import set_aside
from megatron_mm.training.metrics import ends_torn

logger = logging.getLogger(__name__)

FILE = "roll_backs.jsonl"
"""File in the run directory with one line for each roll-back."""
SET_ASIDE = "rolled-back-"
"""Prefix of the names of checkpoints that were set aside."""


class RollBack(Exception):
    """Raised on all processes alike, when no save is under way, to make the run go back to a checkpoint."""

    def __init__(self, reason: str, *, before_step: int, state: TrainState) -> None:
        super().__init__(reason)
        self.reason = reason
        self.before_step = before_step
        """The first step to undo: the checkpoint must be from an earlier step."""
        self.state = state
        """State of the run when this was raised."""


@dataclass(frozen=True)
class Line:
    """One roll-back, as recorded in `roll_backs.jsonl`."""

    time: str
    reason: str
    from_step: int
    """The last completed step."""
    to_step: int
    """Step of the checkpoint from which the run continues."""
    plan: dict[str, Any]
    """The plan's cursor after the data of from_step."""


def read(run_dir: Path) -> list[Line]:
    """Roll-backs of a run so far, oldest first."""
    found = []
    for number, values in enumerate(json_objects(run_dir / FILE), start=1):
        try:
            found.append(Line(**(values or {})))
        except TypeError:  # cut off by a full disk or a crash
            logger.warning("line %d of %s is damaged and ignored", number, run_dir / FILE)
    return found


def go_back(run_dir: Path, roll_back: RollBack, *, train: TrainConfig) -> None:
    """Set checkpoints aside and write the line; the next load resumes from the newest checkpoint before `before_step`. Called by all
    processes together.

    Raises RuntimeError, on all of them, if there is no such checkpoint, or if the run has already gone back `train.max_roll_backs` times.
    """
    reason, state, before_step = roll_back.reason, roll_back.state, roll_back.before_step
    checkpoints = {int(path.name.removeprefix("step_")): path for path in completed_checkpoints(run_dir)}
    earlier = [step for step in checkpoints if step < before_step]
    lines = read(run_dir)
    dist.barrier()  # all have read the folder before anything changes
    if len(lines) >= train.max_roll_backs:
        raise RuntimeError(
            f"{reason}. The run has gone back {len(lines)} times already ({run_dir / FILE}), and train.max_roll_backs is "
            f"{train.max_roll_backs}: find the cause, or raise it"
        )
    if not earlier:
        raise RuntimeError(f"{reason}. There is no checkpoint from before step {before_step} to go back to")
    to = max(earlier)
    assert state.plan is not None
    line = Line(time=datetime.now(UTC).isoformat(timespec="seconds"), reason=reason, from_step=state.step, to_step=to, plan=state.plan)
    if dist.get_rank() == 0:
        logger.warning(
            "%s: going back to the checkpoint of step %d; the data of steps %d to %d is left out from now on",
            reason,
            to,
            to + 1,
            state.step,
        )
        for step in sorted(step for step in checkpoints if step > to):
            set_aside(checkpoints[step], prefix=SET_ASIDE)
        with (run_dir / FILE).open("a") as file:
            file.write("\n" * ends_torn(run_dir / FILE) + json.dumps(asdict(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    dist.barrier()


def leave_out(state: TrainState, run_dir: Path, *, topology: Topology) -> TrainState:
    """The state of a checkpoint; if the run has gone back to it, with the plan's cursor after the data that is left out. Called by all
    processes together."""
    found: list[Any] = [[line.plan for line in read(run_dir) if line.to_step == state.step][-1:] if topology.is_main else None]
    dist.broadcast_object_list(found, src=0)
    if found[0]:
        state.plan = found[0][0]
        if topology.is_main:
            logger.info("the data that followed step %d is left out (reason in %s)", state.step, run_dir / FILE)
    return state
