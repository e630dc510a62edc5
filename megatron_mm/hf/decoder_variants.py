"""Decoder variants: one object describes how a decoder differs from a Llama.

A variant is one file. It changes megatron-core's configuration (another activation) or the specs of the layers (norms elsewhere), and maps
the tensors and settings that it adds to Hugging Face's names. `DecoderConfig.variant` selects it. This module is below the models because
both the models and the names and configurations of exported decoders depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mm.config import DecoderConfig
from megatron_mm.hf.mapping import Entry

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig


def _same_config(config: TransformerConfig) -> TransformerConfig:
    return config


def _same_spec(spec: ModuleSpec, backend: str) -> ModuleSpec:
    return spec


def _no_entries(ours: str, theirs: str) -> list[Entry]:
    return []


@dataclass(frozen=True)
class ModelingCode:
    """Code for transformers that is exported together with a decoder."""

    files: tuple[Path, ...]
    """Python files that are copied into the export."""
    architecture: str
    """Name of the model class with an output layer, such as ThreeNormsForCausalLM."""
    auto_map: Mapping[str, str]
    """transformers' auto classes (AutoConfig and AutoModelForCausalLM) -> FILE.CLASS."""
    model_type: str
    """`model_type` of its configuration class."""


@dataclass(frozen=True)
class DecoderVariant:
    """How a decoder differs from a Llama; by default nothing differs."""

    transformer_config: Callable[[TransformerConfig], TransformerConfig] = _same_config
    """megatron-core's configuration of a Llama -> the variant's."""
    layer_spec: Callable[[ModuleSpec, str], ModuleSpec] = _same_spec
    """(the spec of a Llama's layer, layer backend) -> the variant's. New norms must be marked with `init_value`; new matrices are
    initialised with `DecoderConfig.init_std`."""
    entries: Callable[[str, str], list[Entry]] = _no_entries
    """(our prefix of a layer, theirs) -> name mappings of the layer's additional tensors."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Entries of config.json that describe it, such as {"hidden_act": "gelu"}."""
    llama_computes: bool | None = None
    """Whether transformers' Llama computes the same if config.json has `settings`. None means yes if layers are a Llama's and any change by
    `transformer_config` comes with `settings`, and no otherwise."""
    modeling: ModelingCode | None = None
    """Code that computes an exported decoder if transformers' Llama does not."""

    @property
    def is_llama(self) -> bool:
        """Whether transformers' Llama with `settings` computes the same."""
        if self.llama_computes is not None:
            return self.llama_computes
        same_layers = self.layer_spec is _same_spec and self.entries is _no_entries
        return same_layers and (self.transformer_config is _same_config or bool(self.settings))


DECODER_VARIANTS: dict[str, DecoderVariant] = {"llama": DecoderVariant()}
"""Every variant by name (`DecoderConfig.variant`)."""


def register_decoder_variant(name: str, variant: DecoderVariant) -> None:
    """Register a variant that is defined outside this package. Raises ValueError if its name is taken."""
    if DECODER_VARIANTS.setdefault(name, variant) is not variant:
        raise ValueError(f"a decoder variant {name!r} is already registered: choose another name")


def variant_of(config: DecoderConfig) -> DecoderVariant:
    """Return the variant of a decoder. Raises ValueError that lists all variants if the name is unknown."""
    if config.variant not in DECODER_VARIANTS:
        raise ValueError(
            f"decoder.variant is {config.variant!r}, but must be one of {sorted(DECODER_VARIANTS)}: to use "
            "your own, add its file to `extensions`"
        )
    return DECODER_VARIANTS[config.variant]


def check_exported_decoder(config: DecoderConfig, *, code: str) -> None:
    """Raise ValueError if a whole model's modeling code, whose decoder is a Llama, would not compute this decoder.

    Args:
        code: owner of the modeling code, such as "an exported MM1".
    """
    variant = variant_of(config)
    names = [entry.ours for layer in _layers(config) for entry in variant.entries(layer, layer)]
    if names:
        raise ValueError(
            f"the modeling code of {code} has no module for {len(names)} tensors of the decoder variant {config.variant!r} ({names[0]}, "
            "...): it would drop them and give wrong results. Export with --part language, with modeling code of your own"
        )
    if not variant.is_llama:
        raise ValueError(
            f"the modeling code of {code} computes a Llama, but the decoder variant {config.variant!r} is not one: "
            f"{_DECLARE}. Or export with --part language, with modeling code of your own"
        )


def check_decoder_alone(config: DecoderConfig) -> None:
    """Raise ValueError if a decoder exported alone would be loaded as a Llama but is not one."""
    variant = variant_of(config)
    if not variant.is_llama and variant.modeling is None and "architectures" not in variant.settings:
        raise ValueError(
            f"transformers' Llama cannot compute the decoder variant {config.variant!r}: set "
            "`DecoderVariant.modeling` to code that does, "
            f"or name another class of transformers in `settings` (model_type, architectures). Or {_DECLARE}"
        )


_DECLARE = "if config.json can express all differences, give `DecoderVariant.settings`, and llama_computes=True if the layers also differ"


def _layers(config: DecoderConfig) -> list[str]:
    return [f"language.decoder.layers.{number}" for number in range(config.num_layers)]
