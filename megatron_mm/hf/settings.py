"""Translates the configuration of released weights: config.json -> fields of a recipe's model that must be equal.

Fields of nested parts are written with dots: `decoder.num_layers`. Fields missing in the file have the default of the code that reads it.
The tables in `hf.field_tables` define how each field is handled; this module handles what depends on several fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.hf.decoder_variants import DECODER_VARIANTS
from megatron_mm.hf.field_tables import CLIP_FIELDS, DECODER_FIELDS, EVA_FIELDS, OPEN_CLIP_FIELDS
from megatron_mm.hf.fields import ConfigField, number_in, part_of, read_fields


def decoder_settings(document: Mapping[str, Any], *, more: tuple[ConfigField, ...] = ()) -> dict[str, Any]:
    """A Llama-like config.json -> fields of a DecoderConfig. Missing fields have Llama's defaults.

    Args:
        more: additional fields of a family's decoders.

    Raises ValueError for a decoder that ours cannot compute: biases, another activation, scaled rotary positions.
    """
    fields = (*DECODER_FIELDS, *more)
    found = read_fields(document, fields, also=explained_fields(document))
    return {**found, **decoder_values(document)}


def explained_fields(decoder: Mapping[str, Any], *, part: str = "") -> dict[str, Any]:
    """Values by path that are allowed because the configuration's decoder variant sets them.

    Args:
        part: name of the part that describes the decoder, with a dot at the end.
    """
    variant = decoder.get("decoder_variant")
    settings = DECODER_VARIANTS[variant].settings if isinstance(variant, str) and variant in DECODER_VARIANTS else {}
    return {f"{part}{name}": value for name, value in settings.items()}


def decoder_values(document: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ours that depend on several fields of a checked decoder. Raises ValueError for unsupported rotary positions."""
    heads, width = document.get("num_attention_heads") or 32, document.get("hidden_size") or 4096
    parameters = document.get("rope_parameters") or {}
    scaling = document.get("rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    by_layer = [name for name, value in scaling.items() if isinstance(value, Mapping)]
    explained = "rope_scaling" in explained_fields(document)
    # dynamic scaling has no effect up to max_position_embeddings
    if not explained and (kind not in ("default", "dynamic") or by_layer or scaling.get("partial_rotary_factor", 1.0) != 1.0):
        given = {name: document[name] for name in ("rope_scaling", "rope_parameters") if document.get(name)}
        raise ValueError(f"the language model has {given}, but our decoder supports only plain and dynamic rotary positions")
    stated = (number_in(document, "rope_theta", where=""), number_in(parameters, "rope_theta", where="rope_parameters."))
    bases = {base for base in stated if base is not None}
    if len(bases) > 1:
        raise ValueError(
            f"the language model's configuration contradicts itself: rope_theta is {document['rope_theta']}, but in rope_parameters it is "
            f"{parameters['rope_theta']}: correct one of them"
        )
    found = {
        "num_query_groups": document.get("num_key_value_heads") or heads,
        "head_dim": document.get("head_dim") or width // heads,
        "rotary_base": bases.pop() if bases else 10000.0,
    }
    factor = number_in(scaling, "factor", where="rope_scaling.") if kind == "dynamic" else None
    return {**found, **({} if factor is None else {"rotary_scaling": factor})}


def clip_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a CLIP model or its tower -> fields of a VisionConfig. Missing fields have CLIP's defaults."""
    return read_fields(document.get("vision_config") or document.get("vision_config_dict") or document, CLIP_FIELDS)


def open_clip_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip_config.json -> fields of a VisionConfig. Missing fields have open_clip's defaults."""
    model = document.get("model_cfg") or document
    found = read_fields(model, OPEN_CLIP_FIELDS, file="open_clip_config.json")
    vision = model.get("vision_cfg") or {}
    width, norms = vision.get("width", 768), dict(vision.get("norm_kwargs") or {})
    epsilon = norms.pop("eps", 1e-5)
    if norms:
        raise ValueError(f"it describes a different model: vision_cfg.norm_kwargs has {norms} in addition to eps")
    return {
        **found,
        "ffn_hidden_size": int(width * vision.get("mlp_ratio", 4.0)),
        "num_attention_heads": width // vision.get("head_width", 64),
        "norm_epsilon": epsilon,
    }


def eva_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """EVA-CLIP's model configuration (such as `EVA02-CLIP-L-14-336.json`) -> fields of an EvaConfig."""
    visual = {**part_of(document, "vision_cfg"), "embed_dim": document.get("embed_dim")}
    return {**read_fields(visual, EVA_FIELDS, file="eva_config.json"), **eva_values(visual)}


def eva_values(visual: Mapping[str, Any], *, part: str = "") -> dict[str, Any]:
    """Fields of ours that depend on several fields of a checked tower. Raises ValueError for an unsupported block.

    Args:
        part: name of the part that describes the tower, with a dot at the end.
    """
    for name, other in (("subln", "naiveswiglu"), ("intp_freq", "rope")):
        if bool(visual.get(name, False)) != bool(visual.get(other, False)):
            raise ValueError(
                f"it describes a different model: {part}{name} differs from {part}{other}, but our EVA tower has both or neither"
            )
    width = visual.get("width", 768)
    return {
        "num_attention_heads": width // visual.get("head_width", 64),
        "ffn_hidden_size": int(width * visual.get("mlp_ratio", 4.0)),
        "rotary_grid": visual.get("pt_hw_seq_len", 16) if visual.get("rope", False) else None,
    }


def under(part: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a part under their dotted names in the model."""
    return {f"{part}.{name}": value for name, value in fields.items()}
