"""Sends tokens between experts while another micro-batch computes (`parallel.overlap_experts`).

megatron-core splits each layer into attention, dispatch, experts and combine, and runs the forward pass of one micro-batch and the backward
pass of the previous one through the layers together. The tokens of one micro-batch travel while the other computes. megatron-core calls
these parts of a layer instead of the layer, and passes no padding mask to the router. Here the mask travels with the micro-batch's layout
instead. The attention of a layer and its router run directly after each other in the same part, so the router uses the mask that attention
was given.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_mm.models.moe import Router


def tell_routers_of_padding(decoder: GPTModel) -> None:
    """Give each router of a chunk the padding mask of the micro-batch that the attention of its layer processed last."""
    for layer in decoder.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            assert isinstance(layer.mlp.router, Router)
            layer.self_attention.register_forward_pre_hook(partial(_remember, layer.mlp.router), with_kwargs=True)


def _remember(router: Router, attention: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    layout: PackedSeqParams | None = options.get("packed_seq_params")
    router.padding = getattr(layout, "padding", None)
