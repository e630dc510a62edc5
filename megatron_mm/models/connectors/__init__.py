"""Connectors: the patch features of an image -> the tokens that it takes in the decoder's sequence (MM1, section 3.2).

MM1 found that the number of tokens and the image size matter more than the kind of connector. All three kinds that it compares are
implemented; the final models use the C-Abstractor of Honeybee (arXiv 2312.06742). Connectors are plain torch modules, and every process has
all of them. Weights are allocated and marked with their initial scale, 1 / sqrt(fan-in) for matrices and convolutions. The features leave
the tower with a final LayerNorm; with this scale they keep about unit scale and enter the decoder at 0.2 to 1.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_mm.config import ConnectorConfig, VisionConfig
from megatron_mm.flops import FlopCount
from megatron_mm.models.connectors.attention import ATTENTION
from megatron_mm.models.connectors.average import AVERAGE
from megatron_mm.models.connectors.base import ACTIVATIONS, Connector
from megatron_mm.models.connectors.c_abstractor import C_ABSTRACTOR

CONNECTORS: dict[str, Connector] = {"average": AVERAGE, "attention": ATTENTION, "c_abstractor": C_ABSTRACTOR}
"""Every kind of connector (`ConnectorConfig.kind`)."""


def register_connector(kind: str, connector: Connector) -> None:
    """Register a connector defined outside this package. Raises ValueError if its name is taken."""
    if CONNECTORS.setdefault(kind, connector) is not connector:
        raise ValueError(f"a connector {kind!r} is already registered: choose another name")


def connector_of(config: ConnectorConfig) -> Connector:
    """Return the connector for a config. Raises ValueError if its kind does not exist, or if the config is not of that kind's class."""
    if config.kind not in CONNECTORS:
        raise ValueError(
            f"connector.kind is {config.kind!r}, but must be one of {sorted(CONNECTORS)}: to use your own, add its file to `extensions`"
        )
    connector = CONNECTORS[config.kind]
    if not isinstance(config, connector.config):
        raise ValueError(
            f"connector.kind {config.kind!r} is configured by {connector.config.__name__}, but model.connector is a "
            f"{type(config).__name__}: set connector={connector.config.__name__}(...) in a recipe, FILE.py:FUNCTION"
        )
    return connector


def build_connector(config: ConnectorConfig, *, vision: VisionConfig, output_size: int, dtype: torch.dtype) -> nn.Module:
    """Build a connector module: features [n, p, v] -> tokens [n, k, h]; n may be 0.

    Args:
        vision: the tower whose features it takes.
        output_size: width of the decoder.
        dtype: type of the parameters.
    """
    return connector_of(config).build(config, vision, output_size, dtype)


def connector_flops(config: ConnectorConfig, vision: VisionConfig, *, output_size: int) -> float:
    """Return the FLOPs of training the connector on one image."""
    count = FlopCount()
    count_connector(count, config, vision=vision, output_size=output_size, num_images=1)
    return count.flops


def count_connector(count: FlopCount, config: ConnectorConfig, *, vision: VisionConfig, output_size: int, num_images: int) -> None:
    """Count the FLOPs of the connector on some images.

    Args:
        vision: the tower whose features it takes.
        output_size: width of the decoder.
    """
    for name, forward in connector_of(config).forward_flops(config, vision, output_size).items():
        if name == ACTIVATIONS:
            count.activations(num_images * forward)
        else:
            count.weight(f"connector.{name}", num_images * forward)
