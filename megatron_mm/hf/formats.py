"""Formats of weights that can be read: how each kind of checkpoint names and describes its contents.

`FORMATS` has the formats of shared blocks; a family adds those of its whole models (`Family.formats`). A format is detected from tensor
names and checked against config.json, because names are not enough: Gemma's tensors have the same names as Llama's, and the names in an
image tower do not reveal its number of heads. If there is a configuration next to the weights, its model type must be one that the format
knows, and its settings must match the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from megatron_mm.config import DecoderConfig, EvaConfig, VisionConfig
from megatron_mm.hf.decoders import internlm2_table, llama_table
from megatron_mm.hf.mapping import Entry
from megatron_mm.hf.settings import clip_settings, decoder_settings, eva_settings, open_clip_settings
from megatron_mm.hf.towers import clip_table, eva_table, open_clip_table

Part = Literal["whole", "language", "vision"]
Config = TypeVar("Config")


@dataclass(frozen=True)
class Naming:
    """How a checkpoint names its tensors, besides its format."""

    prefix: str
    """Prefix of their names."""
    tied: bool = False
    """Whether their output layer is the embedding table."""
    mlps: tuple[str, ...] = ("mlp",)
    """Our names of the MLPs that are read from a layer's MLP; several if experts begin as copies of it."""


@dataclass(frozen=True)
class Format(Generic[Config]):
    """How a kind of checkpoint names and describes its contents."""

    part: Part
    """Part of a model that it contains."""
    signature: str
    """Name, without its prefix, of a tensor that every checkpoint of the format has."""
    prefixes: dict[str, tuple[str, ...]]
    """Possible prefixes of names -> tensors that may be present and are not read, as regular expressions of whole names."""
    config: type[Config]
    """Configuration type of the recipe's part that it fits."""
    table: Callable[[Config, Naming], list[Entry]]
    """Makes the table of names for the recipe's part."""
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    """config.json -> the fields of the recipe's part that must be equal."""
    model_types: tuple[str, ...] = ()
    """Values of `model_type` in config.json that belong to the format; empty if the file has none."""
    config_file: str = "config.json"


AnyFormat: TypeAlias = Format[Any]
"""A format for any type of configuration."""


def _llama(config: DecoderConfig, naming: Naming) -> list[Entry]:
    body = naming.prefix
    head = f"{body}embed_tokens.weight" if naming.tied else f"{body.removesuffix('model.')}lm_head.weight"
    return llama_table(config, body=body, head=head, mlps=naming.mlps)


def _internlm2(config: DecoderConfig, naming: Naming) -> list[Entry]:
    body = naming.prefix
    head = f"{body}tok_embeddings.weight" if naming.tied else f"{body.removesuffix('model.')}output.weight"
    return internlm2_table(config, body=body, head=head, mlps=dict.fromkeys(naming.mlps, "feed_forward"))


EVA_ROTARY = r".*\.?rope\.freqs_(cos|sin)"
ROTARY = r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
"""Buffers that earlier versions of transformers saved, although they follow from config.json."""
_CLIP_TEXT = (r"text_model\..*", r"logit_scale", r"(visual|text)_projection\.weight", r"vision_model\.embeddings\.position_ids")
_OPEN_CLIP_TEXT = (
    r"visual\.proj|text_projection|positional_embedding|attn_mask|logit_scale|logit_bias",
    r"(token_embedding|ln_final|transformer\.resblocks|text)\..*",
)


def register_format(name: str, known: AnyFormat) -> None:
    """Register a format of decoders or image towers that is defined outside this package. Raises ValueError if its name is taken."""
    if FORMATS.setdefault(name, known) is not known:
        raise ValueError(f"a format {name!r} is already registered: choose another name")


FORMATS: dict[str, AnyFormat] = {
    "llama": Format(
        part="language",
        signature="layers.0.self_attn.q_proj.weight",
        prefixes={"model.": (ROTARY,), "": (ROTARY,)},
        config=DecoderConfig,
        table=_llama,
        settings=decoder_settings,
        model_types=("llama", "mistral"),
    ),
    "internlm2": Format(
        part="language",
        signature="layers.0.attention.wqkv.weight",
        prefixes={"model.": (ROTARY,), "": (ROTARY,)},
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
        prefixes={"visual.": (EVA_ROTARY, r"logit_scale|text\..*"), "": (EVA_ROTARY,)},
        config=EvaConfig,
        table=lambda config, naming: eva_table(config, prefix=naming.prefix),
        settings=eva_settings,
        config_file="eva_config.json",
    ),
}
"""Formats of decoders and image towers that can be read; the first format whose signature is found is used."""
