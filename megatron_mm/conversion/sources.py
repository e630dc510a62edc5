"""Formats that weights are read from: `FORMATS` is all of them, detected by tensor names and checked against config.json.

A name alone does not make a model: Gemma's tensors are named like Llama's, and an image tower's names say nothing of its number of heads.
So where a configuration is beside the weights, its model type must be one that the format knows, and its settings must be the recipe's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_mm.config import DecoderConfig, MM1Config, ModelConfig, VisionConfig
from megatron_mm.conversion.decoders import internlm2_table, llama_table
from megatron_mm.conversion.hf_reader import HfReader
from megatron_mm.conversion.mapping import Entry
from megatron_mm.conversion.mm1 import mm1_table
from megatron_mm.conversion.towers import clip_table, open_clip_table

logger = logging.getLogger(__name__)

Part = Literal["whole", "language", "vision"]


@dataclass(frozen=True)
class Format:
    """How a kind of checkpoint names and describes what it holds."""

    part: Part
    """What of a model it is."""
    signature: str
    """A tensor that every checkpoint of the format has, without its prefix."""
    prefixes: dict[str, tuple[str, ...]]
    """What the names may begin with, and for each which other tensors may be there that are not read: regular expressions of whole
    names."""
    config: type
    """Of the recipe's part that it fits."""
    table: Callable[[Any, str, bool], list[Entry]]
    """(the recipe's part, prefix, output layer is tied) -> the table."""
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    """config.json -> the fields of the recipe's part that must be equal."""
    model_types: tuple[str, ...] = ()
    """What config.json may call itself; empty where a format has no config.json."""
    config_file: str = "config.json"


@dataclass(frozen=True)
class Source:
    """An opened checkpoint and the table that reads it."""

    part: Part
    reader: HfReader
    format: str
    entries: list[Entry]
    unused: tuple[str, ...]


def open_source(path: Path, part: Part, model: ModelConfig) -> Source:
    """Open a checkpoint that a part of the model is read from.

    Raises ValueError where its format is unknown or is one of another part, or its settings are not the recipe's.
    """
    reader = HfReader(path)
    name, prefix = _detect(reader, part)
    known = FORMATS[name]
    ours = model if part == "whole" else getattr(model, {"language": "decoder", "vision": "vision"}[part])
    if not isinstance(ours, known.config):
        raise ValueError(
            f"{path} is a checkpoint of format {name}, but the recipe's part is a {type(ours).__name__}: choose another recipe"
        )
    document = _checked_document(reader, name)
    tied = part == "language" and not _has_head(reader, prefix)
    if document is None:
        logger.warning("%s has no %s beside it: only shapes are checked, not heads, norms or activations", path, known.config_file)
    else:
        settings = known.settings(document)
        tied = bool(settings.pop("tied_embeddings", tied))
        _check_settings(
            settings, ours, where=f"{path}/{known.config_file}", group={"language": "decoder.", "vision": "vision."}.get(part, "")
        )
    if isinstance(ours, DecoderConfig) and ours.tied_embeddings and not tied:
        raise ValueError(f"{path} has an output layer of its own, but the recipe ties it: use --model.decoder.tied-embeddings False")
    return Source(part, reader, name, known.table(ours, prefix, tied), (*known.prefixes[prefix], *_unused_head(prefix, tied)))


def _detect(reader: HfReader, part: Part) -> tuple[str, str]:
    """Name and prefix of the format whose signature is there."""
    names = reader.names()
    found = [(name, prefix) for name, f in FORMATS.items() for prefix in f.prefixes if f"{prefix}{f.signature}" in names]
    fitting = [(name, prefix) for name, prefix in found if FORMATS[name].part == part]
    if fitting:
        return fitting[0]
    formats = ", ".join(name for name, f in FORMATS.items() if f.part == part)
    if found:
        other = FORMATS[found[0][0]].part
        raise ValueError(f"{reader.path} is a checkpoint of format {found[0][0]}, which is read with --{other}, not with --{part}")
    some = ", ".join(sorted(names)[:4])
    raise ValueError(f"{reader.path} is none of the formats that --{part} reads ({formats}); its first tensors are {some}")


def _checked_document(reader: HfReader, name: str) -> dict[str, Any] | None:
    """config.json, of a model type that the format knows. Raises ValueError for any other."""
    known = FORMATS[name]
    document = reader.config(known.config_file)
    if document is not None and known.model_types and document.get("model_type") not in known.model_types:
        raise ValueError(
            f"{reader.path} has tensors named like those of {name}, but its {known.config_file} says model_type "
            f"{document.get('model_type')!r}, which computes something else; known are {list(known.model_types)}"
        )
    return document


def _check_settings(theirs: dict[str, Any], ours: Any, *, where: str, group: str) -> None:
    differences = []
    for field, value in theirs.items():
        found: Any = ours
        for name in field.split("."):
            found = getattr(found, name)
        if found != value:
            option = f"--model.{group}{field}".replace("_", "-")
            differences.append(f"{field} is {value} there and {found} in the recipe ({option} {value})")
    if differences:
        raise ValueError(f"{where} describes another model: {'; '.join(differences)}")


# ------------------------------------------------------------------------------------------------------------------- decoders


def _has_head(reader: HfReader, prefix: str) -> bool:
    return any(f"{prefix.removesuffix('model.')}{head}" in reader.names() for head in ("lm_head.weight", "output.weight"))


def _unused_head(prefix: str, tied: bool) -> tuple[str, ...]:
    """A tied model may carry its table a second time as an output layer."""
    return (re.escape(prefix.removesuffix("model.")) + r"(lm_head|output)\.weight",) if tied else ()


def _llama(config: DecoderConfig, prefix: str, tied: bool) -> list[Entry]:
    head = f"{prefix}embed_tokens.weight" if tied else f"{prefix.removesuffix('model.')}lm_head.weight"
    return llama_table(config, body=prefix, head=head)


def _internlm2(config: DecoderConfig, prefix: str, tied: bool) -> list[Entry]:
    head = f"{prefix}tok_embeddings.weight" if tied else f"{prefix.removesuffix('model.')}output.weight"
    return internlm2_table(config, body=prefix, head=head)


def decoder_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of Llama's kind -> fields of a DecoderConfig. What is not given has Llama's defaults.

    Raises ValueError for a decoder that ours is not: biases, another activation, scaled rotary positions.
    """
    heads, width = document.get("num_attention_heads", 32), document.get("hidden_size", 4096)
    rotary = {**document, **(document.get("rope_parameters") or {})}
    scaling = document.get("rope_scaling") or document.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    wrong = {
        "hidden_act": document.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_bias": bool(document.get("attention_bias", False)),
        "mlp_bias": bool(document.get("mlp_bias", False)),
        "bias": bool(document.get("bias", False)) and document.get("model_type") == "internlm2",
        "rope_scaling": kind not in ("default", "dynamic"),  # dynamic changes nothing up to max_position_embeddings
    }
    found = {name: document.get(name) for name, is_wrong in wrong.items() if is_wrong}
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
    }


# --------------------------------------------------------------------------------------------------------------------- towers


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


# ------------------------------------------------------------------------------------------------------------------ our exports


def mm1_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an exported MM1 -> fields of an MM1Config, with dots."""
    connector = {f"connector.{name}": value for name, value in document["connector_config"].items()}
    vision = {f"vision.{name}": value for name, value in clip_settings(document["vision_config"]).items()}
    decoder = decoder_settings(document["text_config"])
    decoder["sparse_layers"] = tuple(document["text_config"].get("sparse_layers") or ())
    return {**vision, **connector, **{f"decoder.{name}": value for name, value in decoder.items()}}


_ROTARY = r".*\.rotary_emb\.inv_freq"
_CLIP_TEXT = (r"text_model\..*", r"logit_scale", r"(visual|text)_projection\.weight", r"vision_model\.embeddings\.position_ids")
_OPEN_CLIP_TEXT = (
    r"visual\.proj|text_projection|positional_embedding|attn_mask|logit_scale|logit_bias",
    r"(token_embedding|ln_final|transformer\.resblocks|text)\..*",
)

FORMATS: dict[str, Format] = {
    "mm1": Format(
        part="whole",
        signature="connector.output.weight",
        prefixes={"": ()},
        config=MM1Config,
        table=lambda config, prefix, tied: mm1_table(config),
        settings=mm1_settings,
        model_types=("mm1",),
    ),
    "llama": Format(
        part="language",
        signature="layers.0.self_attn.q_proj.weight",
        prefixes={"model.": (_ROTARY,), "": (_ROTARY,)},
        config=DecoderConfig,
        table=_llama,
        settings=decoder_settings,
        model_types=("llama", "mistral"),
    ),
    "internlm2": Format(
        part="language",
        signature="layers.0.attention.wqkv.weight",
        prefixes={"model.": (_ROTARY,), "": (_ROTARY,)},
        config=DecoderConfig,
        table=_internlm2,
        settings=decoder_settings,
        model_types=("internlm2",),
    ),
    "clip": Format(
        part="vision",
        signature="embeddings.patch_embedding.weight",
        prefixes={"vision_model.": _CLIP_TEXT, "": ("embeddings.position_ids",)},
        config=VisionConfig,
        table=lambda config, prefix, tied: clip_table(config, prefix=prefix),
        settings=clip_settings,
        model_types=("clip", "clip_vision_model"),
    ),
    "open_clip": Format(
        part="vision",
        signature="conv1.weight",
        prefixes={"visual.": _OPEN_CLIP_TEXT, "": ("proj",)},
        config=VisionConfig,
        table=lambda config, prefix, tied: open_clip_table(config, prefix=prefix),
        settings=open_clip_settings,
        config_file="open_clip_config.json",
    ),
}
"""What can be read; the first format of a part whose signature is there is taken."""
