"""Reads checkpoints of megatron-core 0.19 and later with an older megatron-core.

From 0.19 on, what is not a tensor (the optimizer's options) is an entry of a tensor file; before, it was a file of its own, `common.pt`.
0.19 reads both, older versions only the file: without this, a run could not go back to the engine that it came from.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import FileSystemReader

KEY = "common_state"
ENTRY = f"{KEY}/shard_0_1"
"""The entry that stores everything that is not a tensor."""


def install() -> None:
    """Make an older megatron-core read the entry where there is no file; does nothing for later ones, or when called again."""
    if hasattr(serialization, "_legacy_common_state_exists"):  # it reads both
        return
    holder: Any = getattr(common, "TorchCommonLoadStrategy", serialization)  # a strategy until 0.16, then a function
    if not hasattr(holder.load_common, "reads_entry"):
        holder.load_common = _file_or_entry(holder.load_common)


def _file_or_entry(read: Any) -> Any:
    @functools.wraps(read)
    def state(*args: Any, **kwargs: Any) -> Any:
        folder = Path(args[-1] if args else kwargs["checkpoint_dir"])
        info = None if (folder / common.COMMON_STATE_FNAME).is_file() else _entry(folder)
        return read(*args, **kwargs) if info is None else _read(folder / info.relative_path, info)

    state.reads_entry = True  # type: ignore[attr-defined]
    return state


def _entry(folder: Path) -> Any:
    """Where the entry is stored; None if there is none."""
    stored = FileSystemReader(folder).read_metadata().storage_data
    return next((info for index, info in stored.items() if index.fqn == ENTRY), None)


def _read(path: Path, info: Any) -> Any:
    with path.open("rb") as file:
        file.seek(info.offset)
        return torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)[0]


class LoadStrategy(TorchDistLoadShardedStrategy):
    """megatron-core's, for which the entry is not among the pieces that a caller must ask for."""

    def load_sharded_metadata(self, *args: Any, **kwargs: Any) -> Any:
        found = super().load_sharded_metadata(*args, **kwargs)
        return {name: piece for name, piece in found.items() if piece.key != KEY}
