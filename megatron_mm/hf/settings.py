"""What a configuration beside weights says, in the words of ours: config.json -> fields of a recipe's model that must be equal.

Fields of nested parts are written with dots: `decoder.num_layers`. What a file leaves out has the default of the code that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.hf.decoder_variants import DECODER_VARIANTS


def decoder_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of Llama's kind -> fields of a DecoderConfig. What is not given has Llama's defaults.

    Raises ValueError for a decoder that ours is not: biases, another activation, scaled rotary positions.
    """
    heads, width = document.get("num_attention_heads", 32), document.get("hidden_size", 4096)
    rotary = {**document, **(document.get("rope_parameters") or {})}
    scaling = document.get("rope_scaling") or document.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    variant = document.get("decoder_variant", "llama")
    explained = DECODER_VARIANTS[variant].settings if variant in DECODER_VARIANTS else {}
    wrong = {
        "hidden_act": document.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_bias": bool(document.get("attention_bias", False)),
        "mlp_bias": bool(document.get("mlp_bias", False)),
        "bias": bool(document.get("bias", False)) and document.get("model_type") == "internlm2",
        "rope_scaling": kind not in ("default", "dynamic"),  # dynamic changes nothing up to max_position_embeddings
    }
    found = {
        name: document.get(name)
        for name, is_wrong in wrong.items()
        if is_wrong and not (name in explained and document.get(name) == explained[name])
    }
    if found:
        raise ValueError(f"the language model's config.json has {found}, but our decoder has SiLU, no biases and plain rotary positions")
    return {
        "num_layers": document.get("num_hidden_layers", 32),
        "hidden_size": width,
        "ffn_hidden_size": document.get("intermediate_size", 11008),
        "num_attention_heads": heads,
        "num_query_groups": document.get("num_key_value_heads") or heads,
        "head_dim": document.get("head_dim") or width // heads,
        "rotary_base": float(rotary.get("rope_theta", 10000.0)),
        "norm_epsilon": document.get("rms_norm_eps", 1e-6),
        "tied_embeddings": document.get("tie_word_embeddings", False),
        "variant": variant,
    }


def clip_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a CLIP model or its tower -> fields of a VisionConfig. What is not given has CLIP's defaults."""
    vision = document.get("vision_config") or document.get("vision_config_dict") or document
    return {
        "num_layers": vision.get("num_hidden_layers", 12),
        "hidden_size": vision.get("hidden_size", 768),
        "ffn_hidden_size": vision.get("intermediate_size", 3072),
        "num_attention_heads": vision.get("num_attention_heads", 12),
        "patch_size": vision.get("patch_size", 32),
        "activation": vision.get("hidden_act", "quick_gelu"),
        "norm_epsilon": vision.get("layer_norm_eps", 1e-5),
    }


def open_clip_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip_config.json -> fields of a VisionConfig. What is not given has open_clip's defaults."""
    model = document.get("model_cfg", document)
    vision = model.get("vision_cfg", {})
    width = vision.get("width", 768)
    return {
        "num_layers": vision.get("layers", 12),
        "hidden_size": width,
        "ffn_hidden_size": int(width * vision.get("mlp_ratio", 4.0)),
        "num_attention_heads": width // vision.get("head_width", 64),
        "patch_size": vision.get("patch_size", 16),
        "activation": "quick_gelu" if model.get("quick_gelu", False) else "gelu",
        "norm_epsilon": vision.get("norm_kwargs", {}).get("eps", 1e-5),
    }


def under(part: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a part, by their dotted names in the model."""
    return {f"{part}.{name}": value for name, value in fields.items()}
