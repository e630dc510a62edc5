"""The interface of a connector. To add one, write a file and add a line to the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from megatron_mm.config import ConnectorConfig, VisionConfig
from megatron_mm.hf.mapping import Direct, Entry

ACTIVATIONS = ""
"""Key of products of activations in `Connector.forward_flops`."""


@dataclass(frozen=True)
class Connector:
    """A kind of connector."""

    build: Callable[[ConnectorConfig, VisionConfig, int, torch.dtype], nn.Module]
    """(config, tower, decoder width, type of the parameters) -> a module that turns features [n, p, v] into tokens [n, k, h]; n may be 0.
    Its weights are allocated and marked with `init_std` or `init_value` (`models.plain` does both)."""
    forward_flops: Callable[[ConnectorConfig, VisionConfig, int], Mapping[str, float]]
    """(config, tower, decoder width) -> FLOPs of the forward pass on one image by weight name, in the order of the forward pass."""
    config: type[ConnectorConfig] = ConnectorConfig
    """The class of its configurations: a subclass if it has fields of its own."""
    entry: Callable[[str, VisionConfig], Entry] = lambda name, vision: Direct(name, name)
    """(a parameter's global name, tower) -> its mapping to an exported MM1; by default unchanged, under the same name."""
