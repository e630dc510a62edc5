"""MM1's table: our tensor names <-> those of the Hugging Face code in `megatron_mm.hf`."""

from __future__ import annotations

import torch

from megatron_mm.config import DecoderConfig, MM1Config, VisionConfig
from megatron_mm.conversion.mapping import QKV, Direct, Entry, GatedMLP, expand, stack
from megatron_mm.models.connectors import build_connector


def mm1_table(config: MM1Config) -> list[Entry]:
    """Every parameter of an MM1."""
    return [*clip_table(config.vision), *_connector_table(config), *_decoder_table(config.decoder)]


def clip_table(config: VisionConfig, *, theirs: str = "vision.") -> list[Entry]:
    """The image tower and transformers' CLIP vision model.

    Args:
        theirs: prefix of their names; `vision_model.` for a CLIP checkpoint of the Hugging Face hub.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    layer, hf_layer = "vision.transformer.layers.{layer}", f"{theirs}encoder.layers.{{layer}}"

    def both(ours: str, hf: str) -> list[Entry]:
        return [Direct(f"{ours}.{kind}", f"{hf}.{kind}") for kind in ("weight", "bias")]

    def qkv(kind: str) -> QKV:
        names = {x: f"{hf_layer}.self_attn.{x}_proj.{kind}" for x in "qkv"}
        ours = f"{layer}.self_attention.linear_qkv.{kind}"
        return QKV(ours, **names, num_heads=heads, num_groups=heads, head_dim=width // heads)

    return expand(
        [
            Direct("vision.class_embedding", f"{theirs}embeddings.class_embedding"),
            Direct("vision.patch_embedding.weight", f"{theirs}embeddings.patch_embedding.weight"),
            Direct("vision.position_embedding", f"{theirs}embeddings.position_embedding.weight"),
            *both("vision.pre_norm", f"{theirs}pre_layrnorm"),  # sic
            *both(f"{layer}.input_layernorm", f"{hf_layer}.layer_norm1"),
            qkv("weight"),
            qkv("bias"),
            *both(f"{layer}.self_attention.linear_proj", f"{hf_layer}.self_attn.out_proj"),
            *both(f"{layer}.pre_mlp_layernorm", f"{hf_layer}.layer_norm2"),
            *both(f"{layer}.mlp.linear_fc1", f"{hf_layer}.mlp.fc1"),
            *both(f"{layer}.mlp.linear_fc2", f"{hf_layer}.mlp.fc2"),
            *both("vision.post_norm", f"{theirs}post_layernorm"),
        ],
        placeholder="layer",
        count=config.num_layers,
    )


def _connector_table(config: MM1Config) -> list[Entry]:
    """Connectors have the same names on both sides."""
    with torch.device("meta"):
        connector = build_connector(config.connector, vision=config.vision, output_size=config.decoder.hidden_size, dtype=torch.float32)
    return [Direct(f"connector.{name}", f"connector.{name}") for name, _ in connector.named_parameters()]


def _decoder_table(config: DecoderConfig) -> list[Entry]:
    layers = [entry for layer in range(config.num_layers) for entry in _layer_table(config, layer)]
    return [
        Direct("language.embedding.word_embeddings.weight", "language_model.embed_tokens.weight"),
        *layers,
        Direct("language.decoder.final_layernorm.weight", "language_model.norm.weight"),
        *([] if config.tied_embeddings else [Direct("language.output_layer.weight", "lm_head.weight")]),
    ]


def _layer_table(config: DecoderConfig, number: int) -> list[Entry]:
    layer, hf_layer = f"language.decoder.layers.{number}", f"language_model.layers.{number}"
    attention = {x: f"{hf_layer}.self_attn.{x}_proj.weight" for x in "qkv"}
    return [
        Direct(f"{layer}.input_layernorm.weight", f"{hf_layer}.input_layernorm.weight"),
        QKV(
            f"{layer}.self_attention.linear_qkv.weight",
            **attention,
            num_heads=config.num_attention_heads,
            num_groups=config.num_query_groups,
            head_dim=config.head_dim,
        ),
        Direct(f"{layer}.self_attention.linear_proj.weight", f"{hf_layer}.self_attn.o_proj.weight"),
        Direct(f"{layer}.pre_mlp_layernorm.weight", f"{hf_layer}.post_attention_layernorm.weight"),
        *(_experts_table(config, layer, hf_layer) if number in config.sparse_layers else _mlp_table(f"{layer}.mlp", f"{hf_layer}.mlp")),
    ]


def _mlp_table(ours: str, theirs: str) -> list[Entry]:
    return [
        GatedMLP(f"{ours}.linear_fc1.weight", gate=f"{theirs}.gate_proj.weight", up=f"{theirs}.up_proj.weight"),
        Direct(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight"),
    ]


def _experts_table(config: DecoderConfig, layer: str, hf_layer: str) -> list[Entry]:
    """Ours are stacks of all experts, theirs a module for each."""
    assert config.moe is not None
    expert = _mlp_table(f"{layer}.mlp.experts.experts", f"{hf_layer}.mlp.experts.{{expert}}")
    return [
        Direct(f"{layer}.mlp.router.weight", f"{hf_layer}.mlp.gate.weight"),
        *stack(expert, placeholder="expert", count=config.moe.num_experts),
    ]
