"""Reads objects of a distributed checkpoint without running code that they refer to.

What upstream lacks: torch's planner unpickles every entry of a checkpoint that is not a tensor, whatever it refers to
(`weights_only=False`). megatron-core 0.19 stores the optimizer's options in such an entry, so anyone who can change it could run code in
the process that loads it. The options are plain values, which `weights_only=True` can read. (megatron-core 0.16 stores them in a separate
file, which it loads in this way itself.)
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem


def install() -> None:
    """Make torch's planner read only plain values; calling it again changes nothing."""
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]


def _load_bytes(self: Any, read_item: ReadItem, value: io.BytesIO) -> None:
    found, name = torch.load(value, weights_only=True), read_item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], found)
    else:
        self.state_dict[name] = found
