"""Interpolates the learned positions of an image tower to another image size, when a run is started from existing weights.

Every process that has such a table reads the whole stored table and computes the same result, so the layout does not matter. The family's
table of names says which tensors are positions and how they are interpolated (`hf.mapping.Positions`: bicubic, as in transformers), so
`--init-from` gives the same result as `convert from-hf`.
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
    """Tables of positions that a checkpoint holds for another image size."""

    tables: dict[str, Positions]
    """By global name."""
    stored: dict[str, tuple[int, ...]]
    """Shapes in the checkpoint."""

    @classmethod
    def needed(cls, experiment: Experiment, checkpoint: Path) -> Interpolation:
        """What the experiment's model has for another number of patches than the checkpoint."""
        family = family_of(experiment.model)
        if not family.adapts:
            return cls({}, {})
        tables = {entry.ours: entry for entry in family.table(experiment.model) if isinstance(entry, Positions)}
        found = {name: tuple(tensor.global_shape) for name, tensor in stored_tensors(checkpoint).items() if name in tables}
        other = {name: shape for name, shape in found.items() if shape[0] != tables[name].num_rows}
        return cls({name: tables[name] for name in other}, other)

    def ask(self, state: dict[str, Any]) -> None:
        """Put tensors of the stored shapes in the places of those that are to be interpolated.

        Args:
            state: of this process, `model0`, `model1`, ..., as `model_state` gives it.
        """
        for entries in state.values():
            for name, entry in entries.items():
                if isinstance(entry, ShardedTensor) and entry.key in self.tables:
                    assert entry.data is not None and entry.local_shape == entry.global_shape, f"{entry.key} is cut over processes"
                    place = torch.empty(self.stored[entry.key], dtype=entry.data.dtype, device=entry.data.device)
                    entries[name] = ShardedTensor.from_rank_offsets(entry.key, place, replica_id=entry.replica_id)

    def answer(self, asked: dict[str, Any], loaded: dict[str, Any]) -> None:
        """Interpolate what was loaded, in place.

        Args:
            asked: what `ask` left.
            loaded: the same with tensors.
        """
        for chunk, entries in asked.items():
            for name, entry in entries.items():
                if isinstance(entry, ShardedTensor) and entry.key in self.tables:
                    loaded[chunk][name] = self.tables[entry.key].from_hf((loaded[chunk][name],))

    def say(self) -> None:
        """A line in the log for each table."""
        for name, table in self.tables.items():
            logger.info("%s", table.describe(self.stored[name][0]))


def stored_tensors(checkpoint: Path) -> dict[str, ShardedTensor]:
    """The tensors of a checkpoint by name, without their contents."""
    return dist_checkpointing.load_tensors_metadata(str(checkpoint / TENSORS))
