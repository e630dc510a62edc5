"""Exchange of tokens between experts beside the products of another micro-batch (`parallel.overlap_experts`).

megatron-core cuts each layer into attention, dispatch, experts and combine, and goes through the layers with the forward pass of one
micro-batch and the backward pass of the one before together: tokens of the one travel while products of the other run. What it runs are not
the layers but those parts of them, and these give a router no mask of padding. It comes with the micro-batch's layout instead: attention of
a layer and its router run one after another in one part, so the mask that attention has seen is the router's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_mm.config import ParallelConfig
from megatron_mm.models.moe import Router


def overlaps_experts(parallel: ParallelConfig) -> bool:
    """Whether there is an exchange to overlap."""
    return parallel.overlap_experts and parallel.expert > 1


def tell_routers_of_padding(decoder: GPTModel) -> None:
    """Let each router of a chunk know the padding of the micro-batch that its layer's attention has seen last."""
    for layer in decoder.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            assert isinstance(layer.mlp.router, Router)
            layer.self_attention.register_forward_pre_hook(partial(_remember, layer.mlp.router), with_kwargs=True)


def _remember(router: Router, attention: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    layout: PackedSeqParams | None = options.get("packed_seq_params")
    router.padding = getattr(layout, "padding", None)
