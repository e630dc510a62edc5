"""The files of an exported InfiMM besides its weights: configuration, tokenizer, processor, and our own modeling code.

Weights have the released names and config.json the released fields, so the authors' code can also read them if its constants fit the model
(`authors.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_mm.config import EvaConfig, Experiment
from megatron_mm.config.towers import EVA02_L_14_336
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.infimm.authors import AUTHORS_FILES, AUTHORS_PACKAGES, fits_authors_code, write_authors_files
from megatron_mm.families.infimm.config import END_OF_CHUNK, IMAGE, InfiMMConfig
from megatron_mm.hf.chat_templates import chat_control_tokens, exported_template
from megatron_mm.hf.configs import Architecture, copy_code, language_model_config, write_document
from megatron_mm.hf.field_tables import DECODER_FIELDS, EVA_FIELDS, SAME, TRAINING
from megatron_mm.hf.fields import ConfigField, nested, part_of, read_fields
from megatron_mm.hf.settings import decoder_values, eva_values, explained_fields, under
from megatron_mm.hf.tokenizer import export_tokenizer, generation_config, open_run_tokenizer


def write_infimm_files(
    model: InfiMMConfig, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None, language_is_frozen: bool
) -> None:
    """Write configuration, tokenizer, processor and code: see `Family.write_files`. The configuration records whether the language model
    was frozen in the last stage."""
    rows, template = vocab_rows or model.decoder.vocab_size, experiment.data.chat_template
    ids = open_run_tokenizer(tokenizer, special=(END_OF_CHUNK, IMAGE), rows=rows)
    length = experiment.data.sequence_length
    config = infimm_config(model, ids, sequence_length=length, language_is_frozen=language_is_frozen, dtype=dtype, vocab_rows=vocab_rows)
    write_document(out / "config.json", config)
    processor = {"AutoImageProcessor": "processing_infimm.InfiMMImageProcessor", "AutoProcessor": "processing_infimm.InfiMMProcessor"}
    export_tokenizer(
        tokenizer,
        out,
        ids=ids,
        special=(END_OF_CHUNK, IMAGE, *chat_control_tokens(template)),
        longest=model.decoder.max_positions or length,
        # The authors' processor has the tokenizer add <s> to the text of the template.
        chat_template=exported_template(template, image=END_OF_CHUNK + IMAGE, begins_with_bos=False),
        processor={"processor_class": "InfiMMProcessor", "auto_map": {"AutoProcessor": processor["AutoProcessor"]}},
    )
    never = (ids.bos_id, *(ids.special_id(name) for name in (END_OF_CHUNK, IMAGE)))
    write_document(out / "generation_config.json", generation_config(ids, never=never, rows=rows))
    write_document(out / "preprocessor_config.json", {**_images(model, to_rgb=experiment.data.to_rgb), "auto_map": processor})
    write_document(out / "processor_config.json", {"processor_class": "InfiMMProcessor", "auto_map": processor})
    copy_code(out, Path(__file__).with_name("hf_code"), _CODE, shared=_SHARED_CODE)
    if fits_authors_code(model):
        written = json.loads((out / "tokenizer_config.json").read_text())
        write_authors_files(model, out / "authors_code", config=config, ids=ids, tokenizer_config=written)


_CODE = ("configuration_infimm.py", "modeling_infimm.py", "processing_infimm.py")
_SHARED_CODE = ("square_images.py", "image_prompts.py")


def card_notes(model: InfiMMConfig) -> list[str]:
    """Return lines for the export's README.md on prompts and on use with the authors' code."""
    lines = ["", "A prompt writes each image as `<image>`; the processor replaces it with `<|endofchunk|><image>`."]
    if not fits_authors_code(model):
        return [
            *lines,
            "The authors' own classes do not support this model: they expect a Mistral, 64 latents, 8 heads of width 64, and images "
            "cropped to 336 px.",
        ]
    files, packages = (", ".join(f"`{name}`" for name in names) for names in (AUTHORS_FILES, AUTHORS_PACKAGES))
    return [
        *lines,
        "",
        "For the quickstart of Infi-MM/infimm-zephyr, with its authors' code: copy this directory, add these files of that model to",
        f"the copy ({files}), then copy all of `authors_code/` over the files of the same names. It needs {packages}.",
    ]


def _images(model: InfiMMConfig, *, to_rgb: str) -> dict[str, Any]:
    vision = model.vision
    return {
        "image_processor_type": "InfiMMImageProcessor",
        "size": {"height": vision.image_size, "width": vision.image_size},
        "image_size": vision.image_size,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "resize": vision.resize,
        "to_rgb": to_rgb,
        "resize_first": True,
    }


def infimm_config(
    model: InfiMMConfig, ids: Tokenizer, *, sequence_length: int, language_is_frozen: bool, dtype: str, vocab_rows: int | None
) -> dict[str, Any]:
    """Return config.json of an exported InfiMM, which refers to our own modeling code."""
    decoder, mistral = model.decoder, model.decoder.num_query_groups < model.decoder.num_attention_heads
    kind: Architecture = "mistral" if mistral else "llama"
    language = language_model_config(decoder, architecture=kind, dtype=dtype, sequence_length=sequence_length, vocab_rows=vocab_rows)
    return {
        "architectures": ["InfiMMForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_infimm.InfiMMConfig",
            "AutoModelForCausalLM": "modeling_infimm.InfiMMForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_infimm.InfiMMForConditionalGeneration",
        },
        "model_type": "infimm",
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        "seq_length": 1024,
        "cross_attn_every_n_layers": model.gated.every_n_layers,
        "use_grad_checkpoint": False,
        "freeze_llm": language_is_frozen,
        "use_flash_attn": False,
        "image_token_id": ids.special_id("<image>"),
        "eoc_token_id": ids.special_id("<|endofchunk|>"),
        "bos_token_id": ids.bos_id,
        "eos_token_id": ids.eos_id,
        "resampler_config": asdict(model.resampler),
        "gated_config": {name: value for name, value in asdict(model.gated).items() if name != "every_n_layers"},
        "visual": _visual_config(model.vision),
        "language": {**language, "bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id, "pad_token_id": ids.eos_id},
    }


def _visual_config(vision: EvaConfig) -> dict[str, Any]:
    """Return the authors' configuration of a tower. It gives the width of MLPs as a ratio; the authors' code rounds the product down."""
    ratio = round(vision.ffn_hidden_size / vision.hidden_size + 5e-4, 4)
    assert int(vision.hidden_size * ratio) == vision.ffn_hidden_size, f"no ratio of {vision.hidden_size} gives {vision.ffn_hidden_size}"
    return {
        **({"eva_model_name": "eva-clip-l-14-336"} if replace(vision, resize="crop") == EVA02_L_14_336 else {}),
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layers": vision.num_layers,
        "width": vision.hidden_size,
        "head_width": vision.head_dim,
        "mlp_ratio": ratio,
        "embed_dim": vision.output_size,
        "drop_path_rate": 0.0,
        "xattn": False,
        "fusedLN": True,
        "rope": vision.rotary_grid is not None,
        "pt_hw_seq_len": vision.rotary_grid or 16,
        "intp_freq": vision.rotary_grid is not None,
        "naiveswiglu": vision.swiglu,
        "subln": vision.swiglu,
        **({"postnorm": True} if vision.block == "post_norm" else {}),
    }


CONFIG_FIELDS = (
    ConfigField("architectures", note="Mistral or Llama: determined from the tensors"),
    ConfigField("model_type", must_be=("infimm", "infimm-zephyr"), default="infimm"),
    ConfigField("cross_attn_every_n_layers", kind=int, read="gated.every_n_layers", default=2),
    ConfigField("seq_length", kind=int, note="not used by the authors' code"),
    ConfigField("use_grad_checkpoint", kind=bool, note=TRAINING),
    ConfigField("freeze_llm", kind=bool, note=TRAINING),
    ConfigField("use_flash_attn", kind=bool, note=SAME),
    ConfigField("image_token_id", kind=int, note="determined from the tokenizer"),
    ConfigField("eoc_token_id", kind=int, note="determined from the tokenizer"),
    ConfigField("resampler_config.num_latents", kind=int, read="resampler.num_latents", default=64),
    ConfigField("resampler_config.num_layers", kind=int, read="resampler.num_layers", default=6),
    ConfigField("resampler_config.num_attention_heads", kind=int, read="resampler.num_attention_heads", default=8),
    ConfigField("resampler_config.head_dim", kind=int, read="resampler.head_dim", default=64),
    ConfigField("resampler_config.ffn_multiplier", kind=int, read="resampler.ffn_multiplier", default=4),
    ConfigField("gated_config.num_attention_heads", kind=int, read="gated.num_attention_heads", default=8),
    ConfigField("gated_config.head_dim", kind=int, read="gated.head_dim", default=64),
    ConfigField("gated_config.ffn_multiplier", kind=int, read="gated.ffn_multiplier", default=4),
    *nested("visual", EVA_FIELDS, ours="vision"),
    *nested("language", DECODER_FIELDS, ours="decoder"),
)
"""How each field of a released config.json is read. Numbers of latents and heads are constants of the authors' code; our exports write
them."""


def infimm_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """Convert config.json of a released InfiMM to fields of an InfiMMConfig. Raises ValueError if our model does not support a setting."""
    visual, language = part_of(document, "visual"), part_of(document, "language")
    found = read_fields(document, CONFIG_FIELDS, also=explained_fields(language, part="language."))
    return {**found, **under("vision", eva_values(visual, part="visual.")), **under("decoder", decoder_values(language))}
