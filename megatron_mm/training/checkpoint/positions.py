"""Interpolates the learned positions of an image tower to another image size, when a run starts from existing weights.

Every process that has such a table reads the whole stored table and computes the same result, so the layout does not matter. The family's
table of names defines which tensors are positions and how they are interpolated (`hf.mapping.Positions`: bicubic, as in transformers), so
the result of `--init-from` equals that of `convert from-hf`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_mm.config import Experiment
from megatron_mm.families.registry import family_of
from megatron_mm.hf.mapping import Positions
from megatron_mm.training.checkpoint.names import TENSORS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interpolation:
    """Position tables that a checkpoint stores for another image size."""

    tables: dict[str, Positions]
    """Mapping entries, by global name."""
    stored: dict[str, tuple[int, ...]]
    """Shapes in the checkpoint, by global name."""

    @classmethod
    def needed(cls, experiment: Experiment, checkpoint: Path) -> Interpolation:
        """Return the position tables whose number of patches differs between the experiment's model and the checkpoint."""
        family = family_of(experiment.model)
        if not family.adapts:
            return cls({}, {})
        tables = {entry.ours: entry for entry in family.table(experiment.model) if isinstance(entry, Positions)}
        found = {name: tuple(tensor.global_shape) for name, tensor in stored_tensors(checkpoint).items() if name in tables}
        other = {name: shape for name, shape in found.items() if shape[0] != tables[name].num_rows}
        return cls({name: tables[name] for name in other}, other)

    def ask(self, state: dict[str, Any]) -> None:
        """In the state to be loaded, replace the tables that need interpolation with tensors of the stored shapes.

        Args:
            state: this process's state, `model0`, `model1`, ..., as returned by `model_state`.
        """
        for entries in state.values():
            for name, entry in entries.items():
                if isinstance(entry, ShardedTensor) and entry.key in self.tables:
                    assert entry.data is not None and entry.local_shape == entry.global_shape, f"{entry.key} is split across processes"
                    place = torch.empty(self.stored[entry.key], dtype=entry.data.dtype, device=entry.data.device)
                    entries[name] = ShardedTensor.from_rank_offsets(entry.key, place, replica_id=entry.replica_id)

    def answer(self, asked: dict[str, Any], loaded: dict[str, Any]) -> None:
        """Replace the loaded tables with their interpolations, in place.

        Args:
            asked: the state as `ask` left it.
            loaded: the same state after loading.
        """
        for chunk, entries in asked.items():
            for name, entry in entries.items():
                if isinstance(entry, ShardedTensor) and entry.key in self.tables:
                    loaded[chunk][name] = self.tables[entry.key].from_hf((loaded[chunk][name],))

    def say(self) -> None:
        """Log a line for each table."""
        for name, table in self.tables.items():
            logger.info("%s", table.describe(self.stored[name][0]))


def stored_tensors(checkpoint: Path) -> dict[str, ShardedTensor]:
    """Return the tensors of a checkpoint by name, without their contents."""
    return dist_checkpointing.load_tensors_metadata(str(checkpoint / TENSORS))
