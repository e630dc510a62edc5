"""The files of an exported Mono-InternVL besides its weights: configuration, tokenizer, processor, and our own modeling code.

Weights have the released names and config.json the released fields, so the authors' code can read them as well: `authors_code/` contains
the files that refer to the authors' classes. Their code (OpenGVLab/Mono-InternVL-2B, transformers 4.37) is not part of the export.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mm.config import Experiment
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.mono_internvl.config import SPECIAL_TOKENS, MonoInternVLConfig
from megatron_mm.hf.chat_templates import chat_control_tokens, exported_template
from megatron_mm.hf.configs import copy_code, decoder_config, rotary_scaling, write_document
from megatron_mm.hf.field_tables import DECODER_FIELDS
from megatron_mm.hf.fields import ConfigField, nested, part_of, read_fields
from megatron_mm.hf.settings import decoder_values, explained_fields, under
from megatron_mm.hf.tokenizer import export_tokenizer, generation_config, open_run_tokenizer


def write_mono_internvl_files(
    model: MonoInternVLConfig, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None = None
) -> None:
    """Write configuration, tokenizer, processor and code: see `Family.write_files`."""
    rows, template = vocab_rows or model.decoder.vocab_size, experiment.data.chat_template
    ids = open_run_tokenizer(tokenizer, special=SPECIAL_TOKENS, rows=rows)
    config = mono_internvl_config(model, experiment, ids, dtype=dtype, vocab_rows=vocab_rows)
    write_document(out / "config.json", config)
    length = model.decoder.max_positions or experiment.data.sequence_length
    special = (*SPECIAL_TOKENS, *chat_control_tokens(template))
    processor = {
        "AutoImageProcessor": "processing_mono_internvl.MonoInternVLImageProcessor",
        "AutoProcessor": "processing_mono_internvl.MonoInternVLProcessor",
    }
    export_tokenizer(
        tokenizer,
        out,
        ids=ids,
        special=special,
        longest=length,
        chat_template=exported_template(template),  # the processor replaces <image> with the tokens of an image's tiles
        processor={"processor_class": "MonoInternVLProcessor", "auto_map": {"AutoProcessor": processor["AutoProcessor"]}},
    )
    stops = [ids.eos_id, *(ids.special_id(token) for token in reversed(chat_control_tokens(template)))]
    never = (ids.bos_id, *(ids.special_id(name) for name in SPECIAL_TOKENS[:3]))
    write_document(out / "generation_config.json", {**generation_config(ids, never=never, rows=rows), "eos_token_id": stops})
    write_document(out / "preprocessor_config.json", {**_image_config(model, experiment), "auto_map": processor})
    pieces = {"processor_class": "MonoInternVLProcessor", "auto_map": processor, "tokens_per_image": model.patches.num_tokens}
    write_document(out / "processor_config.json", pieces)
    copy_code(out, Path(__file__).with_name("hf_code"), _CODE, shared=_SHARED_CODE)
    _write_authors_files(model, out / "authors_code", config=config)


_CODE = ("configuration_mono_internvl.py", "modeling_mono_internvl.py", "processing_mono_internvl.py")
_SHARED_CODE = ("square_images.py", "image_prompts.py", "image_tokens.py")


def _image_config(model: MonoInternVLConfig, experiment: Experiment) -> dict[str, Any]:
    """Return preprocessor_config.json of our processor, which splits images into tiles."""
    return {
        "image_processor_type": "MonoInternVLImageProcessor",
        "size": {"height": model.patches.image_size, "width": model.patches.image_size},
        "image_mean": list(model.patches.mean),
        "image_std": list(model.patches.std),
        "to_rgb": experiment.data.to_rgb,
        "min_tiles": experiment.data.min_tiles,
        "max_tiles": experiment.data.max_tiles or 1,
    }


def _write_authors_files(model: MonoInternVLConfig, out: Path, *, config: dict[str, Any]) -> None:
    """Write the files that refer to the authors' classes, to replace our files of the same name."""
    out.mkdir()
    write_document(out / "config.json", {**config, "auto_map": _AUTHORS_CLASSES})
    side = {"height": model.patches.image_size, "width": model.patches.image_size}
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side,
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "crop_size": side,
        "image_mean": list(model.patches.mean),
        "image_std": list(model.patches.std),
    }
    write_document(out / "preprocessor_config.json", images)  # for a single tile: `load_image` in the released quickstart splits images


_AUTHORS_CLASSES = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}
AUTHORS_FILES = (
    "configuration_intern_vit.py",
    "configuration_internlm2.py",
    "configuration_internvl_chat.py",
    "conversation.py",
    "modeling_intern_patch.py",
    "modeling_internlm2_ve.py",
    "modeling_internvl_chat.py",
)
"""Files of OpenGVLab/Mono-InternVL-2B that its classes need."""


def card_notes() -> list[str]:
    """Return lines for the export's README.md on prompts and on use with the authors' code."""
    files = ", ".join(f"`{name}`" for name in AUTHORS_FILES)
    return [
        "",
        "A prompt writes each image as `<image>`; the processor cuts the image into tiles and writes their tokens in its place.",
        "",
        "For the quickstart of OpenGVLab/Mono-InternVL-2B (`model.chat`), with its authors' code: copy this directory, add these files of",
        f"that model to the copy ({files}), then copy all of `authors_code/` over the files of the same names.",
        "It needs transformers==4.37.2.",
    ]


def mono_internvl_config(
    model: MonoInternVLConfig, experiment: Experiment, ids: Tokenizer, *, dtype: str, vocab_rows: int | None
) -> dict[str, Any]:
    """Return config.json of an exported Mono-InternVL."""
    decoder, patches = model.decoder, model.patches
    length = experiment.data.sequence_length
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_mono_internvl.MonoInternVLConfig",
            "AutoModel": "modeling_mono_internvl.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_mono_internvl.InternVLChatModel",
            "AutoModelForImageTextToText": "modeling_mono_internvl.InternVLChatModel",
        },
        "model_type": "internvl_chat",
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        "image_token_id": ids.special_id("<IMG_CONTEXT>"),
        "bos_token_id": ids.bos_id,
        "eos_token_id": ids.eos_id,
        "downsample_ratio": 1 / patches.unshuffle,
        "dynamic_image_size": True,
        "force_image_size": patches.image_size,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "use_thumbnail": True,
        "pad2square": False,
        "min_dynamic_patch": experiment.data.min_tiles,
        "max_dynamic_patch": experiment.data.max_tiles or 1,
        "llm_config": {
            "architectures": ["InternLM2VEForCausalLM"],
            "model_type": "internlm2",
            "bias": False,
            **decoder_config(decoder, sequence_length=length, vocab_rows=vocab_rows),
            **rotary_scaling(decoder),
            "bos_token_id": ids.bos_id,
            "eos_token_id": ids.eos_id,
            "pad_token_id": ids.eos_id,  # as released
        },
        "vision_config": {
            "architectures": ["InternVisionPatchModel"],
            "model_type": "intern_vit_patch",
            "hidden_size": patches.hidden_size,
            "image_size": patches.position_grid * patches.patch_size,
            "patch_size": patches.patch_size,
        },
    }


def _squares(downsample_ratio: float) -> int:
    """Return the number of patches along a square's side."""
    return round(1 / downsample_ratio)


_CALLER = "the caller cuts the tiles"
CONFIG_FIELDS = (
    ConfigField("image_token_id", kind=int, note="determined from the tokenizer"),
    ConfigField("architectures", must_be=(["InternVLChatModel"],), default=["InternVLChatModel"]),
    ConfigField("model_type", must_be=("internvl_chat",), default="internvl_chat"),
    ConfigField("force_image_size", kind=int, read="patches.image_size"),
    ConfigField("downsample_ratio", kind=float, read="patches.unshuffle", convert=_squares, default=0.5),
    ConfigField("ps_version", must_be=("v2",), default="v1", note="v1 would transpose each tile"),
    ConfigField("select_layer", must_be=(-1,), default=-4, note="the patches are used directly"),
    ConfigField("pad2square", must_be=(False,), default=False, note="tiles are stretched"),
    ConfigField("use_thumbnail", must_be=(True,), default=False, note="if there are several tiles, the last is the whole image"),
    ConfigField("use_backbone_lora", must_be=(0,), default=0),
    ConfigField("use_llm_lora", must_be=(0,), default=0),
    ConfigField("template", must_be=("internlm2-chat",), default="internlm2-chat", note="how `chat` writes conversations"),
    ConfigField("dynamic_image_size", note=_CALLER),
    ConfigField("min_dynamic_patch", note=_CALLER),
    ConfigField("max_dynamic_patch", note=_CALLER),
    ConfigField("llm_config.architectures", must_be=(["InternLM2VEForCausalLM"],), note="one with visual experts"),
    *nested("llm_config", (field for field in DECODER_FIELDS if field.path != "architectures"), ours="decoder"),
    ConfigField("vision_config.architectures", note="follows from model_type"),
    ConfigField("vision_config.model_type", must_be=("intern_vit_patch",), note="only patches, no tower"),
    ConfigField("vision_config.hidden_size", kind=int, read="patches.hidden_size"),
    ConfigField("vision_config.patch_size", kind=int, read="patches.patch_size"),
    ConfigField("vision_config.image_size", kind=int, note="with patch_size, gives the grid of positions"),
    ConfigField("vision_config.*", note="tower layers, which a patch embedding does not have"),
)
"""How each field of a released config.json is read."""


def mono_internvl_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """Convert config.json of a released Mono-InternVL to fields of a MonoInternVLConfig. Raises ValueError if our model does not support a
    setting."""
    vision, language = part_of(document, "vision_config"), part_of(document, "llm_config")
    document = {"force_image_size": vision["image_size"], **document}
    found = read_fields(document, CONFIG_FIELDS, also=explained_fields(language, part="llm_config."))
    grid = vision["image_size"] // vision["patch_size"]
    return {**found, "patches.position_grid": grid, **under("decoder", decoder_values(language))}
