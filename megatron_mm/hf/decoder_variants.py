"""Decoder variants: what a decoder does differently from a Llama, in one object.

A variant is one file: it changes megatron-core's configuration (another activation), or the specs of the layers (norms elsewhere), and says
how what it adds is called in Hugging Face's files. `DecoderConfig.variant` names it. It stands here, below the models, because names and
configurations of exported decoders depend on it as the models do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_mm.config import DecoderConfig
from megatron_mm.hf.mapping import Entry

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class DecoderVariant:
    """What differs; each part is a Llama's unless it is given."""

    transformer_config: Callable[[TransformerConfig], TransformerConfig] = lambda config: config
    """megatron-core's configuration of a Llama -> the variant's."""
    layer_spec: Callable[[ModuleSpec, str], ModuleSpec] = lambda spec, backend: spec
    """(the spec of a Llama's layer, layer backend) -> the variant's. New norms must be marked with `init_value`, new matrices get
    `DecoderConfig.init_std`."""
    entries: Callable[[str, str], list[Entry]] = lambda ours, theirs: []
    """(our prefix of a layer, theirs) -> how its additional tensors are called."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says of it, such as {"hidden_act": "gelu"}."""


DECODER_VARIANTS: dict[str, DecoderVariant] = {"llama": DecoderVariant()}
"""Every variant (`DecoderConfig.variant`)."""


def register_decoder_variant(name: str, variant: DecoderVariant) -> None:
    """Make a variant known from outside of this package. Raises ValueError where its name is taken."""
    if DECODER_VARIANTS.setdefault(name, variant) is not variant:
        raise ValueError(f"a decoder variant {name!r} is known already: give yours another name")


def variant_of(config: DecoderConfig) -> DecoderVariant:
    """The variant of a decoder. Raises ValueError that lists all where there is none of that name."""
    if config.variant not in DECODER_VARIANTS:
        raise ValueError(
            f"decoder.variant is {config.variant!r}, but must be one of {sorted(DECODER_VARIANTS)}: name its file in `extensions`"
        )
    return DECODER_VARIANTS[config.variant]


def refuse_additional_tensors(config: DecoderConfig, *, code: str) -> None:
    """Raise ValueError, with names, where the variant gives a layer tensors for which exported modeling code has no module.

    Args:
        code: whose modeling code it is, such as "an exported MM1".
    """
    layers = (f"language.decoder.layers.{number}" for number in range(config.num_layers))
    names = [entry.ours for layer in layers for entry in variant_of(config).entries(layer, layer)]
    if names:
        raise ValueError(
            f"the modeling code of {code} has no module for {len(names)} tensors of the decoder variant {config.variant!r} ({names[0]}, "
            "...): it would drop them and compute something else. Export with --part language, for modeling code of your own"
        )
