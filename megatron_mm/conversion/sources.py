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

from megatron_mm.config import DecoderConfig, EvaConfig, ModelConfig, VisionConfig
from megatron_mm.conversion.families import FAMILIES
from megatron_mm.conversion.hf_reader import HfReader
from megatron_mm.conversion.settings import (
    clip_settings,
    decoder_settings,
    infimm_settings,
    mm1_settings,
    mono_internvl_settings,
    open_clip_settings,
)
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.infimm.names import eva_table, infimm_table
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mm1.names import mm1_table
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig
from megatron_mm.families.mono_internvl.names import mono_internvl_table
from megatron_mm.hf.decoders import internlm2_table, llama_table
from megatron_mm.hf.mapping import Entry
from megatron_mm.hf.towers import clip_table, open_clip_table

logger = logging.getLogger(__name__)

Part = Literal["whole", "language", "vision"]


@dataclass(frozen=True)
class Naming:
    """What a table depends on besides the recipe's part."""

    prefix: str
    """Of their names."""
    tied: bool = False
    """Their output layer is the embedding table."""
    mlps: tuple[str, ...] = ("mlp",)
    """Our names of what their layers' feed-forward becomes: more than one where experts begin as copies of it."""


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
    table: Callable[[Any, Naming], list[Entry]]
    """Of the recipe's part."""
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    """config.json -> the fields of the recipe's part that must be equal."""
    model_types: tuple[str, ...] = ()
    """What config.json may call itself; empty where it says nothing of that."""
    config_file: str = "config.json"


@dataclass(frozen=True)
class Source:
    """An opened checkpoint and the table that reads it."""

    part: Part
    reader: HfReader
    format: str
    entries: list[Entry]
    unused: tuple[str, ...]


def open_source(path: Path, part: Part, model: ModelConfig, *, sequence_length: int) -> Source:
    """Open a checkpoint that a part of the model is read from.

    Args:
        sequence_length: tokens of a training sequence, for a warning where the source's own limit is less.

    Raises ValueError where its format is unknown or is one of another part, or its settings are not the recipe's.
    """
    reader = HfReader(path)
    name, prefix = _detect(reader, part)
    known = FORMATS[name]
    ours = model if part == "whole" else getattr(model, {"language": "decoder", "vision": "vision"}[part], None)
    if ours is None:
        raise ValueError(f"the recipe's family {model.family} has no image tower: leave out --{part}")
    if not isinstance(ours, known.config):
        raise ValueError(
            f"{path} is a checkpoint of format {name}, which {model.family} models cannot take as --{part}: choose another recipe"
        )
    document = _checked_document(reader, name)
    tied = part == "language" and not _has_head(reader, prefix)
    if document is None:
        logger.warning("%s has no %s beside it: only shapes are checked, not heads, norms or activations", path, known.config_file)
    else:
        _warn_of_limits(document, path, sequence_length=sequence_length)
        settings = known.settings(document)
        tied = bool(settings.pop("tied_embeddings", tied))
        _check_settings(
            settings, ours, where=f"{path}/{known.config_file}", group={"language": "decoder.", "vision": "vision."}.get(part, "")
        )
    if isinstance(ours, DecoderConfig) and ours.tied_embeddings and not tied:
        raise ValueError(f"{path} has an output layer of its own, but the recipe ties it: use --model.decoder.no-tied-embeddings")
    naming = Naming(prefix, tied, FAMILIES[model.family].language_mlps)
    return Source(part, reader, name, known.table(ours, naming), (*known.prefixes[prefix], *_unused_head(prefix, tied)))


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


def _warn_of_limits(document: Mapping[str, Any], path: Path, *, sequence_length: int) -> None:
    """Say where sequences are longer than what the language model was made for."""
    for name, meaning in (
        ("sliding_window", "its attention window is not applied"),
        ("max_position_embeddings", "it knows no more positions"),
    ):
        limit = document.get(name)
        if isinstance(limit, int) and "vocab_size" in document and sequence_length > limit:
            logger.warning("%s has %s %d, but sequences have %d tokens: %s", path, name, limit, sequence_length, meaning)


def _check_settings(theirs: dict[str, Any], ours: Any, *, where: str, group: str) -> None:
    differences = []
    for field, value in theirs.items():
        found: Any = ours
        for name in field.split("."):
            found = getattr(found, name)
        if found != value:
            differences.append(f"{field} is {value} there and {found} in the recipe ({_option(f'{group}{field}', value)})")
    if differences:
        raise ValueError(f"{where} describes another model: {'; '.join(differences)}")


def _option(field: str, value: Any) -> str:
    """The words on the command line that give a field of the model a value."""
    *parts, name = field.replace("_", "-").split(".")
    if isinstance(value, bool):
        return f"--model.{'.'.join([*parts, name if value else f'no-{name}'])}"
    return f"--model.{'.'.join([*parts, name])} {value}"


def _has_head(reader: HfReader, prefix: str) -> bool:
    return any(f"{prefix.removesuffix('model.')}{head}" in reader.names() for head in ("lm_head.weight", "output.weight"))


def _unused_head(prefix: str, tied: bool) -> tuple[str, ...]:
    """A tied model may carry its table a second time as an output layer."""
    return (re.escape(prefix.removesuffix("model.")) + r"(lm_head|output)\.weight",) if tied else ()


def _llama(config: DecoderConfig, naming: Naming) -> list[Entry]:
    body = naming.prefix
    head = f"{body}embed_tokens.weight" if naming.tied else f"{body.removesuffix('model.')}lm_head.weight"
    return llama_table(config, body=body, head=head, mlps=naming.mlps)


def _internlm2(config: DecoderConfig, naming: Naming) -> list[Entry]:
    body = naming.prefix
    head = f"{body}tok_embeddings.weight" if naming.tied else f"{body.removesuffix('model.')}output.weight"
    return internlm2_table(config, body=body, head=head, mlps=dict.fromkeys(naming.mlps, "feed_forward"))


_EVA_ROTARY = r".*\.?rope\.freqs_(cos|sin)"
_INFIMM_COPIES = (_EVA_ROTARY, r".*\.rotary_emb\.inv_freq", r"model\.lang_encoder\.(old_decoder_blocks|gated_cross_attn_layers)\..*")
"""The authors' modules hold layers a second time under other names."""
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
        table=lambda config, naming: mm1_table(config),
        settings=mm1_settings,
        model_types=("mm1",),
    ),
    "infimm": Format(
        part="whole",
        signature="model.perceiver.latents",
        prefixes={"": _INFIMM_COPIES},
        config=InfiMMConfig,
        table=lambda config, naming: infimm_table(config),
        settings=infimm_settings,
        model_types=("infimm", "infimm-zephyr"),
    ),
    "mono_internvl": Format(
        part="whole",
        signature="language_model.model.layers.0.feed_forward_ve.w1.weight",
        prefixes={"": (_ROTARY,)},
        config=MonoInternVLConfig,
        table=lambda config, naming: mono_internvl_table(config),
        settings=mono_internvl_settings,
        model_types=("internvl_chat",),
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
        table=lambda config, naming: clip_table(config, prefix=naming.prefix),
        settings=clip_settings,
        model_types=("clip", "clip_vision_model"),
    ),
    "open_clip": Format(
        part="vision",
        signature="conv1.weight",
        prefixes={"visual.": _OPEN_CLIP_TEXT, "": ("proj",)},
        config=VisionConfig,
        table=lambda config, naming: open_clip_table(config, prefix=naming.prefix),
        settings=open_clip_settings,
        config_file="open_clip_config.json",
    ),
    "eva_clip": Format(
        part="vision",
        signature="blocks.0.attn.q_bias",
        prefixes={"visual.": (_EVA_ROTARY, r"logit_scale|text\..*"), "": (_EVA_ROTARY,)},
        config=EvaConfig,
        table=lambda config, naming: eva_table(config, prefix=naming.prefix),
        settings=lambda document: {},
        config_file="eva_config.json",
    ),
}
"""What can be read; the first format of a part whose signature is there is taken."""
