"""Tables of language models: our decoder <-> Llama and Mistral, or InternLM2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_mm.config import DecoderConfig
from megatron_mm.hf.decoder_variants import variant_of
from megatron_mm.hf.mapping import QKV, Direct, Entry, GatedMLP, Vocabulary, stack


def llama_table(
    config: DecoderConfig,
    *,
    body: str = "model.",
    head: str = "lm_head.weight",
    inner: str = "",
    mlps: Sequence[str] = ("mlp",),
    vocab_rows: int | None = None,
) -> list[Entry]:
    """Table of a decoder in `LlamaForCausalLM` and `MistralForCausalLM`.

    Args:
        body: prefix of their names.
        head: name of their output layer; a tied one is not stored.
        inner: text between the name of a layer and the names of its parts.
        mlps: our names of a layer's MLPs; if there are several, each is read from the same MLP, and the table cannot be used for writing.
        vocab_rows: number of vocabulary rows that are written; None writes all.
    """
    rows = {"rows": config.vocab_size, "written_rows": vocab_rows or config.vocab_size}
    return [
        Vocabulary("language.embedding.word_embeddings.weight", f"{body}embed_tokens.weight", **rows),
        *[entry for layer in range(config.num_layers) for entry in _llama_layer(config, layer, f"{body}layers.{layer}{inner}", mlps)],
        Direct("language.decoder.final_layernorm.weight", f"{body}norm.weight"),
        *([] if config.tied_embeddings else [Vocabulary("language.output_layer.weight", head, **rows)]),
    ]


def _llama_layer(config: DecoderConfig, number: int, theirs: str, mlps: Sequence[str]) -> list[Entry]:
    layer = f"language.decoder.layers.{number}"
    q, k, v = (f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv")
    heads = {"num_heads": config.num_attention_heads, "num_groups": config.num_query_groups, "head_dim": config.head_dim}
    mlp = [entry for name in mlps for entry in _llama_mlp(f"{layer}.{name}", f"{theirs}.mlp")]
    return [
        Direct(f"{layer}.input_layernorm.weight", f"{theirs}.input_layernorm.weight"),
        QKV(f"{layer}.self_attention.linear_qkv.weight", q=q, k=k, v=v, **heads),
        Direct(f"{layer}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight"),
        Direct(f"{layer}.pre_mlp_layernorm.weight", f"{theirs}.post_attention_layernorm.weight"),
        *(_llama_experts(config, f"{layer}.mlp", f"{theirs}.mlp") if number in config.sparse_layers else mlp),
        *variant_of(config).entries(layer, theirs),
    ]


def _llama_mlp(ours: str, theirs: str) -> list[Entry]:
    return [
        GatedMLP(f"{ours}.linear_fc1.weight", gate=f"{theirs}.gate_proj.weight", up=f"{theirs}.up_proj.weight"),
        Direct(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight"),
    ]


def _llama_experts(config: DecoderConfig, ours: str, theirs: str) -> list[Entry]:
    """Entries for the experts of a layer: a stack on our side, one module per expert on theirs."""
    assert config.moe is not None
    expert = _llama_mlp(f"{ours}.experts.experts", f"{theirs}.experts.{{expert}}")
    return [
        Direct(f"{ours}.router.weight", f"{theirs}.gate.weight"),
        *stack(expert, placeholder="expert", count=config.moe.num_experts),
    ]


def internlm2_table(
    config: DecoderConfig,
    *,
    body: str = "model.",
    head: str = "output.weight",
    mlps: Mapping[str, str] | None = None,
    vocab_rows: int | None = None,
) -> list[Entry]:
    """Table of a decoder in `InternLM2ForCausalLM`.

    Its `wqkv` groups rows by key/value head as ours does: the group's queries, its key, its value.

    Args:
        mlps: our names of a layer's MLPs -> theirs; if several are read from the same one, the table cannot be used for writing.
    """
    rows = {"rows": config.vocab_size, "written_rows": vocab_rows or config.vocab_size}
    layers: list[Entry] = []
    for number in range(config.num_layers):
        layer, theirs = f"language.decoder.layers.{number}", f"{body}layers.{number}"
        layers += [
            Direct(f"{layer}.input_layernorm.weight", f"{theirs}.attention_norm.weight"),
            Direct(f"{layer}.self_attention.linear_qkv.weight", f"{theirs}.attention.wqkv.weight"),
            Direct(f"{layer}.self_attention.linear_proj.weight", f"{theirs}.attention.wo.weight"),
            Direct(f"{layer}.pre_mlp_layernorm.weight", f"{theirs}.ffn_norm.weight"),
        ]
        for name, their_name in (mlps or {"mlp": "feed_forward"}).items():
            fc1, fc2 = (f"{layer}.{name}.linear_{fc}.weight" for fc in ("fc1", "fc2"))
            w1, w2, w3 = (f"{theirs}.{their_name}.{w}.weight" for w in ("w1", "w2", "w3"))
            layers += [GatedMLP(fc1, gate=w1, up=w3), Direct(fc2, w2)]
        layers += variant_of(config).entries(layer, theirs)
    return [
        Vocabulary("language.embedding.word_embeddings.weight", f"{body}tok_embeddings.weight", **rows),
        *layers,
        Direct("language.decoder.final_layernorm.weight", f"{body}norm.weight"),
        *([] if config.tied_embeddings else [Vocabulary("language.output_layer.weight", head, **rows)]),
    ]
