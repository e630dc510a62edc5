"""All pickled values in a checkpoint are checked before they are unpickled, wherever they are stored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from megatron_mm.training.safe_pickle import check_pickles


class _Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def save(folder: Path, **others: Any) -> Path:
    """Save tensors and, in the same file, pickles, as torch's distributed checkpoint does."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    state = {"weight": torch.ones(3), **others}
    distributed_checkpoint.save(state, checkpoint_id=str(folder), planner=planner, no_dist=True)
    return folder


COMMON = "common_state/shard_0_1"
"""Name under which megatron-core 0.19 stores values that are not tensors."""


def test_the_common_state_beside_tensors_is_looked_at(tmp_path: Path) -> None:
    plain = {"step": 3, "param_groups": [{"lr": 1.0, "betas": (0.9, 0.95)}], "none": None}
    check_pickles(save(tmp_path / "plain", **{COMMON: [plain]}))
    with pytest.raises(ValueError, match=r"__0_0\.distcp names posix\.system\. Loading it would run that"):
        check_pickles(save(tmp_path / "runs", **{COMMON: [_Runs()]}))
    lost = save(tmp_path / "lost", **{COMMON: [plain]})
    (lost / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"__0_0\.distcp is missing"):
        check_pickles(lost)


def test_no_other_pickle_may_lie_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"says that other/shard_0_1 is a pickle, not a tensor"):
        check_pickles(save(tmp_path / "other", **{"other/shard_0_1": [{}]}))
