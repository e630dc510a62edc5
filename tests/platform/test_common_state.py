"""A checkpoint of megatron-core 0.19, whose optimizer options are an entry of a tensor file, is read by every supported version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from megatron_mm.platform import common_state

OPTIONS = {"optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "step": 3}]}, "none": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    state = {"weight": torch.ones(3), common_state.ENTRY: [OPTIONS]}
    distributed_checkpoint.save(state, checkpoint_id=str(tmp_path), planner=planner, no_dist=True)
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return tmp_path


def test_options_are_read_from_the_entry(folder: Path) -> None:
    common_state.install()
    common_state.install()
    assert dist_checkpointing.load_common_state_dict(str(folder)) == OPTIONS


def test_options_are_read_from_the_file_where_there_is_one(folder: Path) -> None:
    common_state.install()
    torch.save({"step": 4}, folder / "common.pt")
    assert dist_checkpointing.load_common_state_dict(str(folder)) == {"step": 4}


def test_the_entry_is_no_piece_that_a_run_must_load(folder: Path) -> None:
    pieces = common_state.LoadStrategy().load_sharded_metadata(folder).values()
    assert [piece.key for piece in pieces if hasattr(piece, "key")] == ["weight"]
