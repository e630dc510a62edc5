"""The decoder: megatron-core's GPTModel, configured as a Llama-style model (RMSNorm, SwiGLU, RoPE, GQA, no biases)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm.config import DecoderConfig, ParallelConfig
from megatron_mm.hf.decoder_variants import variant_of
from megatron_mm.models.context import ChunkContext
from megatron_mm.models.expert_overlap import tell_routers_of_padding
from megatron_mm.models.layers import decoder_layer_spec, norm_module
from megatron_mm.models.moe import Router
from megatron_mm.parallel.stages import layers_per_stage, pipeline_layout


def recompute_options(kind: str, modules: Sequence[str]) -> dict[str, Any]:
    """Translate `parallel.recompute` and `recompute_modules` to megatron-core's options."""
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": list(modules)},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return options[kind]


NO_INITIALIZATION: dict[str, Any] = {
    "init_method": lambda _: None,
    "output_layer_init_method": lambda _: None,
    "embedding_init_method": lambda _: None,
}
"""Options with which modules only allocate weights; `parallel.initial_weights` then sets them by global name.
(`perform_initialization=False` is no alternative: megatron-core then does not mark which weights are sharded and which are replicated, and
gradient norms count only one process's shards.)"""


def decoder_transformer_config(config: DecoderConfig, context: ChunkContext) -> TransformerConfig:
    """Translate the decoder's configuration to megatron-core's."""
    parallel = context.parallel
    on_te = context.backend == "te"
    interleaved = parallel.virtual > 1
    llama = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # -- precision and kernels
        params_dtype=context.dtype,
        pipeline_dtype=context.dtype,
        bf16=context.dtype is torch.bfloat16,
        fp8="hybrid" if context.precision == "fp8" else None,
        fp8_recipe=context.fp8_recipe,
        fp8_param=context.fp8_weights and context.precision == "fp8" and on_te,
        attention_softmax_in_fp32=True,
        apply_rope_fusion=on_te,
        bias_activation_fusion=on_te,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # `training.kernels.fuse_weight_gradients`
        cross_entropy_loss_fusion=context.kernels.cross_entropy,
        cross_entropy_fusion_impl="te" if context.kernels.cross_entropy else "native",
        use_cpu_initialization=not context.on_gpu,
        **NO_INITIALIZATION,
        # -- parallelism
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=on_te and parallel.overlap_tensor and parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if interleaved else None,
        pipeline_model_parallel_layout=pipeline_layout(parallel, num_layers=config.num_layers) if parallel.pipeline > 1 else None,
        expert_model_parallel_size=parallel.expert,
        overlap_p2p_comm=interleaved and context.on_gpu,
        # Batched messages between the same two processes are matched in the wrong order by gloo when stages interleave.
        batch_p2p_comm=context.on_gpu and not interleaved,
        # megatron-core would wait for the device after every batch of messages, because of an error of torch before 1.13 (its pull request
        # 82450). Waiting for each message is enough since, and does not stop the host.
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,
        **recompute_options(parallel.recompute, _recomputed(config, context)),
        **(_expert_options(config, context) if config.moe is not None else {}),
    )
    return variant_of(config).transformer_config(llama)


def _recomputed(config: DecoderConfig, context: ChunkContext) -> list[str]:
    """Return `recompute_modules` without modules that this decoder lacks; `training.options` has warned about these or refused them."""
    lacking = {*(("moe", "moe_act") if config.moe is None else ()), *(("moe_act",) if context.backend != "te" else ())}
    return [module for module in context.parallel.recompute_modules if module not in lacking]


def _expert_options(config: DecoderConfig, context: ChunkContext) -> dict[str, Any]:
    """Return megatron-core's options for sparse layers; the router's losses are our own (`models.moe`)."""
    moe, parallel = config.moe, context.parallel
    assert moe is not None
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(layer in config.sparse_layers) for layer in range(config.num_layers)],
        "moe_ffn_hidden_size": config.ffn_hidden_size,
        "moe_router_topk": moe.top_k,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": moe.load_balance_loss,
        "moe_z_loss_coeff": moe.z_loss,
        "moe_expert_capacity_factor": moe.capacity_factor,
        **_dispatch_options(parallel),
        "moe_grouped_gemm": context.backend == "te",
        "moe_permute_fusion": context.kernels.token_permutation,
        "moe_router_fusion": context.kernels.router,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "overlap_moe_expert_parallel_comm": parallel.overlaps_experts,
        "delay_wgrad_compute": parallel.delays_weight_gradients and context.backend == "te",
    }


def _dispatch_options(parallel: ParallelConfig) -> dict[str, Any]:
    """Translate `parallel.expert_dispatch` to megatron-core's options; its flex dispatcher does not support a group of one process."""
    if parallel.expert_dispatch == "alltoall" or parallel.expert * parallel.expert_tensor == 1:
        return {"moe_token_dispatcher_type": "alltoall"}
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": parallel.expert_dispatch}


def layers_of_chunk(config: DecoderConfig, context: ChunkContext) -> range:
    """Return the indices of a pipeline chunk's decoder layers in the whole model, from 0."""
    stages = layers_per_stage(context.parallel, num_layers=config.num_layers)
    first = sum(stages[: context.stage])
    return range(first, first + stages[context.stage])


def build_decoder(
    config: DecoderConfig, context: ChunkContext, *, transformer_config: TransformerConfig, layer_specs: list[ModuleSpec] | None = None
) -> GPTModel:
    """Build one pipeline chunk of the decoder, with weights allocated and marked with their initial scale.

    Args:
        layer_specs: specs of this chunk's layers, if a family extends them; None for the default.
    """
    if layer_specs is None:
        own = layers_of_chunk(config, context)
        layer_specs = [decoder_layer_spec(context.backend, experts=layer in config.sparse_layers) for layer in own]
    layer_specs = [variant_of(config).layer_spec(spec, context.backend) for spec in layer_specs]
    layers = TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=norm_module(context.backend))
    decoder = GPTModel(
        transformer_config,
        transformer_layer_spec=layers,
        vocab_size=config.vocab_size,
        max_sequence_length=context.sequence_length,
        pre_process=context.pre_process,
        post_process=context.post_process,
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        vp_stage=context.virtual_stage,
    )
    if config.padding_rows and context.post_process:
        decoder.output_layer.register_forward_hook(partial(_without_padding, config.num_tokens, context.tensor_rank))
    for module in decoder.modules():
        if isinstance(module, Router):
            module.max_load = context.parallel.max_expert_load
    if context.parallel.overlaps_experts:
        tell_routers_of_padding(decoder)
    output_std = config.init_std / math.sqrt(2 * config.num_layers)
    for name, parameter in decoder.named_parameters():
        if name.endswith(("norm.weight", "layer_norm_weight")):
            parameter.init_value = 1.0
        elif parameter.ndim > 1 and not hasattr(parameter, "init_value"):
            # Transformer Engine numbers the weights of grouped experts: linear_fc2.weight0, linear_fc2.weight1, ...
            residual = name.rstrip("0123456789").endswith(_RESIDUAL_OUTPUTS)
            parameter.init_std = output_std if residual else config.init_std
        if ".experts." in name:
            # megatron-core sets this only if expert > 1. But under tensor parallelism each process's experts see its own tokens, and
            # their gradients must be summed over the experts' data-parallel group. It also gives checkpoints the same form in all layouts.
            parameter.allreduce = False
    return decoder


def _without_padding(
    num_tokens: int, tensor_rank: int, layer: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, torch.Tensor | None]
) -> None:
    """Forward hook of the output layer: make the logits of padding rows so small that they take no probability, and get no gradient.

    They are overwritten behind autograd's back, which is right: the layer's backward pass does not read its output, and the gradient of a
    probability that is exactly 0 is 0.
    """
    logits_x1v = output[0].detach()
    width = logits_x1v.shape[-1]
    first = max(0, num_tokens - tensor_rank * width)
    logits_x1v[..., first:].fill_(torch.finfo(logits_x1v.dtype).min)  # not -inf: a process's rows may all be padding


_RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "linear_fc2.weight")
"""Weights that write to the residual stream: their initial scale is smaller, so that its variance does not grow with depth (GPT-2)."""


def check_decoder_layout(config: DecoderConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Check, before anything starts, that the decoder and the number of processes allow a layout.

    Raises ValueError with both numbers and the fix if not.
    """
    parallel.data_parallel_size(world_size)
    variant_of(config)
    _check_experts(config, parallel)
    layers_per_stage(parallel, num_layers=config.num_layers)
    counts = {
        "attention heads": config.num_attention_heads,
        "key/value heads": config.num_query_groups,
        "vocabulary rows": config.vocab_size,
        "feed-forward width": config.ffn_hidden_size,
    }
    for name, count in counts.items():
        if count % parallel.tensor and name == "vocabulary rows" and all(c % parallel.tensor == 0 for c in counts.values() if c != count):
            rows = -(-count // 128) * 128
            raise ValueError(
                f"parallel.tensor {parallel.tensor} does not divide the decoder's {count} vocabulary rows: add rows that belong to no "
                f"token, --model.decoder.vocab-size {rows} --model.decoder.padding-rows {rows - config.num_tokens}"
            )
        if count % parallel.tensor:
            allowed = [d for d in (1, 2, 4, 8, 16, 32) if all(c % d == 0 for c in counts.values())]
            raise ValueError(f"parallel.tensor {parallel.tensor} does not divide the decoder's {count} {name}: use one of {allowed}")


def _check_experts(config: DecoderConfig, parallel: ParallelConfig) -> None:
    if config.moe is None:
        for name, degree in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor)):
            if degree > 1:
                raise ValueError(f"parallel.{name} is {degree}, but the model has no experts: use a recipe with experts, or {name} 1")
        return
    if not config.sparse_layers:
        raise ValueError(
            f"moe.every_n_layers {config.moe.every_n_layers} makes none of the {config.num_layers} layers sparse: use a smaller number"
        )
    if config.moe.num_experts % parallel.expert:
        allowed = [degree for degree in range(1, config.moe.num_experts + 1) if config.moe.num_experts % degree == 0]
        raise ValueError(f"parallel.expert {parallel.expert} does not divide the {config.moe.num_experts} experts: use one of {allowed}")
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        raise ValueError("with parallel.tensor > 1, experts need sequence parallelism: remove --parallel.sequence False")
