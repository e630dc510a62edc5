"""Mono-InternVL's table: our tensor names <-> those of released checkpoints.

vision_model      patch embedding
mlp1              projector
language_model    InternLM2, with feed_forward_ve beside feed_forward in every layer
"""

from __future__ import annotations

from megatron_mm.config import MonoInternVLConfig
from megatron_mm.conversion.mapping import Direct, Entry, GatedMLP, Vocabulary, Wrapped, expand

EXPERTS = {"text": "feed_forward", "visual": "feed_forward_ve"}


def mono_internvl_table(config: MonoInternVLConfig, *, vocab_rows: int | None = None) -> list[Entry]:
    """Every parameter of a Mono-InternVL.

    Args:
        vocab_rows: rows of the vocabulary that are written; None writes all.
    """
    rows, written = config.decoder.vocab_size, vocab_rows or config.decoder.vocab_size
    patches, body = "vision_model.embeddings.", "language_model.model."
    return [
        Wrapped("patches.class_embedding", f"{patches}class_embedding", axes=2),
        Wrapped("patches.position_embedding", f"{patches}position_embedding"),
        *_both("patches.projection", f"{patches}patch_embedding"),
        *_both("projector.norm", "mlp1.0"),
        *_both("projector.hidden", "mlp1.1"),
        *_both("projector.output", "mlp1.3"),
        Vocabulary("language.embedding.word_embeddings.weight", f"{body}tok_embeddings.weight", rows=rows, written_rows=written),
        *expand(_layer(body), placeholder="layer", count=config.decoder.num_layers),
        Direct("language.decoder.final_layernorm.weight", f"{body}norm.weight"),
        Vocabulary("language.output_layer.weight", "language_model.output.weight", rows=rows, written_rows=written),
    ]


def _layer(body: str) -> list[Entry]:
    """InternLM2's `wqkv` groups rows by key/value head as ours does: the group's queries, its key, its value."""
    ours, theirs = "language.decoder.layers.{layer}", f"{body}layers.{{layer}}"
    return [
        Direct(f"{ours}.input_layernorm.weight", f"{theirs}.attention_norm.weight"),
        Direct(f"{ours}.self_attention.linear_qkv.weight", f"{theirs}.attention.wqkv.weight"),
        Direct(f"{ours}.self_attention.linear_proj.weight", f"{theirs}.attention.wo.weight"),
        Direct(f"{ours}.pre_mlp_layernorm.weight", f"{theirs}.ffn_norm.weight"),
        *[entry for expert, name in EXPERTS.items() for entry in _expert(f"{ours}.mlp.{expert}", f"{theirs}.{name}")],
    ]


def _expert(ours: str, theirs: str) -> list[Entry]:
    return [
        GatedMLP(f"{ours}.linear_fc1.weight", gate=f"{theirs}.w1.weight", up=f"{theirs}.w3.weight"),
        Direct(f"{ours}.linear_fc2.weight", f"{theirs}.w2.weight"),
    ]


def _both(ours: str, theirs: str) -> list[Entry]:
    return [Direct(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]
