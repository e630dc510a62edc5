"""The image encoder, from pixels to the decoder's input: a tower and the modules after it, as one module."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm.parallel.replicated import mark_replicated, replicated_state

TOWER = "vision"
"""Name of the tower among an encoder's parts."""


class ImageEncoder(MegatronModule):
    """Pixels [n, 3, H, W] uint8 -> features [n, tokens, width]. A family's subclass adds `forward`.

    Its parts have the same names as in a checkpoint. They become submodules of a pipeline chunk (`Chunk`), unless every pipeline rank holds
    the encoder (`parallel.spread_encoder`): then the encoder is separate from the chunks, under the same names.
    """

    def __init__(self, config: TransformerConfig, *, tokens: int, width: int, dtype: torch.dtype, **parts: torch.nn.Module) -> None:
        """
        Args:
            config: the decoder's configuration, for the data-parallel wrapper.
            tokens: number of feature vectors per image.
            width: width of a feature vector.
            dtype: type of the features.
        """
        super().__init__(config=config)
        self.tokens, self.width, self.dtype = tokens, width, dtype
        for name, part in parts.items():
            mark_replicated(part)
            self.add_module(name, part)

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        return dict(self.named_children())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return every parameter under its global name, replicated on each process."""
        return encoder_state(self.parts, prefix=prefix)


def encoder_state(parts: dict[str, torch.nn.Module], *, prefix: str = "") -> ShardedStateDict:
    """Return the parameters of an encoder's parts for a checkpoint."""
    state: ShardedStateDict = {}
    for name, part in parts.items():
        state.update(replicated_state(part, prefix=f"{prefix}{name}."))
    return {name: entry for name, entry in state.items() if "._extra_state" not in name}
