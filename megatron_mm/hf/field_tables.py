"""How each field in the configurations of shared blocks (decoders and image towers) is handled.

Paths are relative to the block's own configuration; a family's table nests them (`fields.nested`). Our fields are those of `DecoderConfig`,
`VisionConfig` and `EvaConfig`. A test changes every field that is read or must have a certain value, and expects an error.
"""

from __future__ import annotations

from megatron_mm.hf.fields import ConfigField

TRAINING = "affects only training"
SAME = "does not change the result"
_COMPUTED = "computed from several fields"

EXPORTED_ALONE = frozenset({"max_positions", "attention_window", "rotary_scaling", "resize"})
"""Our fields that affect neither weights nor training. If a source has another value, this is a warning and not an error; exports are
written with the recipe's value."""

DECODER_FIELDS = (
    ConfigField("architectures", kind=list, note="determined from the tensors"),
    ConfigField("model_type", kind=str, note="llama, mistral or internlm2: all are equivalent"),
    ConfigField("vocab_size", kind=int, note="determined from the shape of the embedding table"),
    ConfigField("hidden_size", kind=int, read="hidden_size", default=4096),
    ConfigField("intermediate_size", kind=int, read="ffn_hidden_size", default=11008),
    ConfigField("num_hidden_layers", kind=int, read="num_layers", default=32),
    ConfigField("num_attention_heads", kind=int, read="num_attention_heads", default=32),
    ConfigField("num_key_value_heads", kind=int, note="`num_query_groups`; if missing, equal to the number of heads"),
    ConfigField("head_dim", kind=int, note="`head_dim`; if missing, hidden_size / num_attention_heads"),
    ConfigField("rms_norm_eps", kind=float, read="norm_epsilon", default=1e-6),
    ConfigField("hidden_act", kind=str, must_be=("silu", "swish"), default="silu"),
    ConfigField("attention_bias", kind=bool, must_be=(False,), default=False),
    ConfigField("mlp_bias", kind=bool, must_be=(False,), default=False),
    ConfigField("bias", kind=bool, must_be=(False,), default=False, note="InternLM2's"),
    ConfigField("rope_theta", kind=float, note="`rotary_base`"),
    ConfigField(
        "rope_scaling", kind=dict, note="none, or dynamic with a factor: `rotary_scaling`, which acts beyond max_position_embeddings"
    ),
    ConfigField("rope_parameters", kind=dict, note="rope_theta and rope_scaling since transformers 5"),
    ConfigField("partial_rotary_factor", kind=float, must_be=(1, 1.0), default=1.0),
    ConfigField("max_position_embeddings", kind=int, read="max_positions"),
    ConfigField("sliding_window", kind=int, read="attention_window", note="training attends to whole documents"),
    ConfigField("tie_word_embeddings", kind=bool, read="tied_embeddings", default=False),
    ConfigField("pretraining_tp", kind=int, note=SAME),
    ConfigField("attn_implementation", kind=str, note=SAME),
    ConfigField("attention_dropout", kind=float, note=TRAINING),
    ConfigField("decoder_variant", kind=str, read="variant", default="llama"),
)
"""Fields of Llama, Mistral and InternLM2."""

EXPERT_FIELDS = (
    ConfigField("num_local_experts", kind=int, read="moe.num_experts"),
    ConfigField("num_experts_per_tok", kind=int, read="moe.top_k"),
    ConfigField("sparse_layers", kind=list, read="sparse_layers", convert=tuple, default=()),
)
"""Additional fields of the sparse decoder of an exported MM1."""

CLIP_FIELDS = (
    ConfigField("architectures", kind=list, note="determined from the tensors"),
    ConfigField("model_type", kind=str, note="clip or clip_vision_model"),
    ConfigField("hidden_size", kind=int, read="hidden_size", default=768),
    ConfigField("intermediate_size", kind=int, read="ffn_hidden_size", default=3072),
    ConfigField("num_hidden_layers", kind=int, read="num_layers", default=12),
    ConfigField("num_attention_heads", kind=int, read="num_attention_heads", default=12),
    ConfigField("patch_size", kind=int, read="patch_size", default=32),
    ConfigField("image_size", kind=int, note="positions are interpolated to the recipe's grid"),
    ConfigField("num_channels", kind=int, must_be=(3,), default=3),
    ConfigField("hidden_act", kind=str, read="activation", default="quick_gelu"),
    ConfigField("layer_norm_eps", kind=float, read="norm_epsilon", default=1e-5),
    ConfigField("projection_dim", kind=int, note="CLIP's shared space, which no model here uses"),
    ConfigField("attention_dropout", kind=float, note=TRAINING),
    ConfigField("dropout", kind=float, note=TRAINING),
    ConfigField("initializer_factor", kind=float, note=TRAINING),
)
"""Fields of transformers' CLIP tower; in a whole CLIP, those of vision_config."""

OPEN_CLIP_FIELDS = (
    ConfigField("embed_dim", kind=int, note="CLIP's shared space, which no model here uses"),
    ConfigField("quick_gelu", kind=bool, read="activation", convert=lambda quick: "quick_gelu" if quick else "gelu", default=False),
    ConfigField("vision_cfg.width", kind=int, read="hidden_size", default=768),
    ConfigField("vision_cfg.layers", kind=int, read="num_layers", default=12),
    ConfigField("vision_cfg.head_width", kind=int, note="with width, gives the number of heads"),
    ConfigField("vision_cfg.mlp_ratio", kind=float, note="with width, gives the width of the MLP"),
    ConfigField("vision_cfg.patch_size", kind=int, read="patch_size", default=16),
    ConfigField("vision_cfg.image_size", kind=int, note="positions are interpolated to the recipe's grid"),
    ConfigField("vision_cfg.norm_kwargs", kind=dict, note="`norm_epsilon` is its eps; no other entries are supported"),
    ConfigField("vision_cfg.act_kwargs", must_be=(None, {})),
    ConfigField("vision_cfg.ls_init_value", must_be=(None, 0, 0.0), note="layer-scale"),
    ConfigField("vision_cfg.attentional_pool", must_be=(None, False), default=False),
    ConfigField("vision_cfg.no_ln_pre", kind=bool, must_be=(False,), default=False),
    ConfigField("vision_cfg.pos_embed_type", kind=str, must_be=("learnable",), default="learnable"),
    ConfigField("vision_cfg.final_ln_after_pool", kind=bool, must_be=(False,), default=False),
    ConfigField("vision_cfg.pool_type", kind=str, note="how CLIP pools to one vector per image; the patches are used here"),
    ConfigField("vision_cfg.output_tokens", kind=bool, note="patches are always used here"),
    ConfigField("vision_cfg.timm_model_name", must_be=(None,), note="another kind of tower"),
    ConfigField("vision_cfg.patch_dropout", kind=float, note=TRAINING),
    ConfigField("text_cfg.*", note="the text tower is not read"),
    ConfigField("custom_text", note="the text tower is not read"),
    ConfigField("init_logit_scale", note="belongs to CLIP's loss"),
    ConfigField("init_logit_bias", note="belongs to CLIP's loss"),
    ConfigField("nonscalar_logit_scale", note="belongs to CLIP's loss"),
)
"""Fields of open_clip's model_cfg. `hf.preprocessing` handles preprocess_cfg, which is next to it."""

EVA_FIELDS = (
    ConfigField("image_size", kind=int, read="image_size", default=224),
    ConfigField("patch_size", kind=int, read="patch_size", default=16),
    ConfigField("width", kind=int, read="hidden_size", default=768),
    ConfigField("layers", kind=int, read="num_layers", default=12),
    ConfigField("head_width", kind=int, note="with width, gives the number of heads"),
    ConfigField("mlp_ratio", kind=float, note="with width, gives the width of the MLP"),
    ConfigField("embed_dim", kind=int, read="output_size"),
    ConfigField("naiveswiglu", kind=bool, read="swiglu", default=False),
    ConfigField("subln", kind=bool, note="must equal naiveswiglu: EVA-02's block has both"),
    ConfigField("postnorm", kind=bool, read="block", convert=lambda post: "post_norm" if post else "pre_norm", default=False),
    ConfigField("rope", kind=bool, note="with pt_hw_seq_len the grid of rotary positions"),
    ConfigField("pt_hw_seq_len", kind=int, note="the grid of rotary positions"),
    ConfigField("intp_freq", kind=bool, note="must equal rope: positions are scaled to the grid of pre-training"),
    ConfigField("global_average_pool", kind=bool, must_be=(False,), default=False),
    ConfigField("ls_init_value", must_be=(None, 0, 0.0), note="layer-scale"),
    ConfigField("qkv_bias", kind=bool, must_be=(True,), default=True),
    ConfigField("timm_model_name", must_be=(None,), note="another kind of tower"),
    ConfigField("patch_dropout", kind=float, note=TRAINING),
    ConfigField("drop_path_rate", kind=float, note=TRAINING),
    ConfigField("eva_model_name", kind=str, note="a name"),
    ConfigField("xattn", kind=bool, note=SAME),
    ConfigField("fusedLN", kind=bool, note=SAME),
)
"""Fields of EVA-CLIP's vision_cfg and InfiMM's `visual`."""
