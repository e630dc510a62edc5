"""Tables of image towers: our CLIP tower <-> transformers' `CLIPVisionModel` or open_clip; our EVA tower <-> EVA-CLIP."""

from __future__ import annotations

from megatron_mm.config import EvaConfig, VisionConfig
from megatron_mm.hf.mapping import QKV, Direct, Entry, Positions, StackedQKV, Wrapped, both, expand

_LAYER = "vision.transformer.layers.{layer}"


def clip_table(config: VisionConfig, *, prefix: str = "vision_model.") -> list[Entry]:
    """Table of a CLIP tower in transformers.

    Args:
        prefix: prefix of their names; transformers 5 writes a tower alone without one.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    layer, theirs = _LAYER, f"{prefix}encoder.layers.{{layer}}"

    def qkv(kind: str) -> QKV:
        names = {x: f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv"}
        return QKV(f"{layer}.self_attention.linear_qkv.{kind}", **names, num_heads=heads, num_groups=heads, head_dim=width // heads)

    return expand(
        [
            Direct("vision.class_embedding", f"{prefix}embeddings.class_embedding"),
            Direct("vision.patch_embedding.weight", f"{prefix}embeddings.patch_embedding.weight"),
            Positions("vision.position_embedding", f"{prefix}embeddings.position_embedding.weight", num_patches=config.num_patches),
            *both("vision.pre_norm", f"{prefix}pre_layrnorm"),  # sic
            *both(f"{layer}.input_layernorm", f"{theirs}.layer_norm1"),
            qkv("weight"),
            qkv("bias"),
            *both(f"{layer}.self_attention.linear_proj", f"{theirs}.self_attn.out_proj"),
            *both(f"{layer}.pre_mlp_layernorm", f"{theirs}.layer_norm2"),
            *both(f"{layer}.mlp.linear_fc1", f"{theirs}.mlp.fc1"),
            *both(f"{layer}.mlp.linear_fc2", f"{theirs}.mlp.fc2"),
            *both("vision.post_norm", f"{prefix}post_layernorm"),
        ],
        placeholder="layer",
        count=config.num_layers,
    )


def open_clip_table(config: VisionConfig, *, prefix: str = "visual.") -> list[Entry]:
    """Table of a CLIP tower in open_clip, which has queries, keys and values in one matrix, all queries first."""
    heads, width = config.num_attention_heads, config.hidden_size
    layer, theirs = _LAYER, f"{prefix}transformer.resblocks.{{layer}}"
    attention = f"{layer}.self_attention"
    shape = {"num_heads": heads, "head_dim": width // heads}
    return expand(
        [
            Direct("vision.class_embedding", f"{prefix}class_embedding"),
            Direct("vision.patch_embedding.weight", f"{prefix}conv1.weight"),
            Positions("vision.position_embedding", f"{prefix}positional_embedding", num_patches=config.num_patches),
            *both("vision.pre_norm", f"{prefix}ln_pre"),
            *both(f"{layer}.input_layernorm", f"{theirs}.ln_1"),
            StackedQKV(f"{attention}.linear_qkv.weight", f"{theirs}.attn.in_proj_weight", **shape),
            StackedQKV(f"{attention}.linear_qkv.bias", f"{theirs}.attn.in_proj_bias", **shape),
            *both(f"{attention}.linear_proj", f"{theirs}.attn.out_proj"),
            *both(f"{layer}.pre_mlp_layernorm", f"{theirs}.ln_2"),
            *both(f"{layer}.mlp.linear_fc1", f"{theirs}.mlp.c_fc"),
            *both(f"{layer}.mlp.linear_fc2", f"{theirs}.mlp.c_proj"),
            *both("vision.post_norm", f"{prefix}ln_post"),
        ],
        placeholder="layer",
        count=config.num_layers,
    )


def eva_table(config: EvaConfig, *, prefix: str = "") -> list[Entry]:
    """Table of a tower in EVA-CLIP: like EVA02-L with SwiGLU, or like EVA01-g and EVA02-bigE without.

    Args:
        prefix: prefix of their names.
    """
    ours, theirs = "vision.layers.{layer}", f"{prefix}blocks.{{layer}}"
    names = {x: f"{theirs}.attn.{x}_proj.weight" for x in "qkv"}
    eva02 = [
        # Ours are the rows of the three projections one after another: a QKV with a single head as wide as the tower.
        QKV(
            f"{ours}.attention.qkv.weight",
            q=names["q"],
            k=names["k"],
            v=names["v"],
            num_heads=1,
            num_groups=1,
            head_dim=config.hidden_size,
        ),
        *both(f"{ours}.attention.inner_norm", f"{theirs}.attn.inner_attn_ln"),
        *both(f"{ours}.mlp.gate", f"{theirs}.mlp.w1"),
        *both(f"{ours}.mlp.up", f"{theirs}.mlp.w2"),
        *both(f"{ours}.mlp.inner_norm", f"{theirs}.mlp.ffn_ln"),
        *both(f"{ours}.mlp.down", f"{theirs}.mlp.w3"),
    ]
    eva01 = [
        Direct(f"{ours}.attention.qkv.weight", f"{theirs}.attn.qkv.weight"),
        *both(f"{ours}.mlp.up", f"{theirs}.mlp.fc1"),
        *both(f"{ours}.mlp.down", f"{theirs}.mlp.fc2"),
    ]
    layer = [
        *both(f"{ours}.attention_norm", f"{theirs}.norm1"),
        Direct(f"{ours}.attention.q_bias", f"{theirs}.attn.q_bias"),
        Direct(f"{ours}.attention.v_bias", f"{theirs}.attn.v_bias"),
        *both(f"{ours}.attention.output", f"{theirs}.attn.proj"),
        *both(f"{ours}.mlp_norm", f"{theirs}.norm2"),
        *(eva02 if config.swiglu else eva01),
    ]
    return [
        Wrapped("vision.class_embedding", f"{prefix}cls_token", axes=2),
        Positions("vision.position_embedding", f"{prefix}pos_embed", num_patches=config.grid_size**2, axes=1),
        *both("vision.patch_embedding", f"{prefix}patch_embed.proj"),
        *expand(layer, placeholder="layer", count=config.num_layers),
        *both("vision.norm", f"{prefix}norm"),
        *both("vision.head", f"{prefix}head"),
    ]
