"""Writes config.json of decoders and image towers in transformers' format; `hf.settings` reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from megatron_mm.config import DecoderConfig, VisionConfig
from megatron_mm.hf.decoder_variants import variant_of

Architecture = Literal["llama", "mistral", "internlm2"]


def decoder_config(decoder: DecoderConfig, *, sequence_length: int, vocab_rows: int | None = None) -> dict[str, Any]:
    """Fields of a `LlamaConfig` or `MistralConfig` that describe a dense decoder.

    Args:
        sequence_length: tokens per training sequence: the maximum of positions if the decoder has no `max_positions`.
        vocab_rows: number of vocabulary rows that are written; None writes all.
    """
    return {
        "vocab_size": vocab_rows or decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.ffn_hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_query_groups,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_epsilon,
        "rope_theta": decoder.rotary_base,  # before transformers 5
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rotary_base},
        "max_position_embeddings": decoder.max_positions or sequence_length,
        "tie_word_embeddings": decoder.tied_embeddings,
        # No pad_token_id: transformers would treat that row of the embedding table as a constant zero when it trains.
        "pad_token_id": None,
        **variant_of(decoder).settings,
        **({} if decoder.variant == "llama" else {"decoder_variant": decoder.variant}),
    }


def rotary_scaling(decoder: DecoderConfig) -> dict[str, Any]:
    """InternLM2's scaling of rotary positions, which acts beyond max_position_embeddings; empty if there is none."""
    return {} if decoder.rotary_scaling is None else {"rope_scaling": {"type": "dynamic", "factor": decoder.rotary_scaling}}


def tower_config(vision: VisionConfig) -> dict[str, Any]:
    """Fields of a `CLIPVisionConfig` that describe a tower."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_epsilon,
    }


def language_model_config(
    decoder: DecoderConfig, *, architecture: Architecture, dtype: str, sequence_length: int, vocab_rows: int | None
) -> dict[str, Any]:
    """config.json of a decoder alone. InternLM2's code is not part of transformers: the user adds its authors' files."""
    of_internlm2 = {
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": False,
    }
    names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "internlm2": "InternLM2ForCausalLM"}
    own = None if variant_of(decoder).is_llama else variant_of(decoder).modeling
    return {
        "architectures": [own.architecture if own else names[architecture]],
        **({"auto_map": dict(own.auto_map)} if own else of_internlm2 if architecture == "internlm2" else {}),
        "model_type": own.model_type if own else architecture,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        **decoder_config(decoder, sequence_length=sequence_length, vocab_rows=vocab_rows),
        # None: attention covers the whole document
        **({"sliding_window": decoder.attention_window} if architecture == "mistral" else {}),
        **(rotary_scaling(decoder) if architecture == "internlm2" else {}),
    }


def vision_model_config(vision: VisionConfig, *, dtype: str) -> dict[str, Any]:
    """config.json of an image tower alone."""
    return {"architectures": ["CLIPVisionModel"], "dtype": dtype, "torch_dtype": dtype, **tower_config(vision)}


def image_processor_config(vision: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json of an image tower alone. In a centre crop transformers rounds the offset down, but training rounds half to
    even, so a cropped image may be shifted by one pixel to the left or top.

    Raises ValueError for a tower with padded images, because CLIP's processor does not pad.
    """
    if vision.resize == "pad":
        raise ValueError("model.vision.resize is pad, but CLIPImageProcessor does not pad: export the whole model instead of --part vision")
    cropped = vision.resize == "crop"
    side = {"height": vision.image_size, "width": vision.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size} if cropped else side,
        "resample": 3,  # bicubic
        "do_center_crop": cropped,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
    }


def copy_code(out: Path, folder: Path, names: Iterable[str], *, shared: Iterable[str]) -> None:
    """Copy modeling code into an export.

    Args:
        out: directory of the export.
        folder: directory with the family's own code.
        names: files in `folder`.
        shared: files in `hf/code`, which families share.
    """
    for path in (*(folder / name for name in names), *(Path(__file__).with_name("code") / name for name in shared)):
        shutil.copyfile(path, out / path.name)


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file as transformers formats its own."""
    path.write_text(json.dumps(document, indent=2) + "\n")
