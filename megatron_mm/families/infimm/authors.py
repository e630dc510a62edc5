"""The files of an exported InfiMM, in `authors_code/`, that refer to the authors' classes, for use with the authors' own code.

The code itself (Infi-MM/infimm-zephyr, CC BY-NC 4.0, transformers 4.37) is not part of the export. Copy it next to the weights, and replace
our files with the files of the same name in `authors_code/`; then the released quickstart runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.hf.configs import write_document

AUTHORS_FILES = (
    "configuration_infimm_zephyr.py",
    "modeling_infimm_zephyr.py",
    "processing_infimm_zephyr.py",
    "eva_vit.py",
    "flamingo.py",
    "flamingo_lm.py",
    "helpers.py",
    "utils.py",
)
"""Files of Infi-MM/infimm-zephyr that its classes need."""

AUTHORS_PACKAGES = ("transformers==4.37.2", "torchvision", "timm<1", "einops", "einops-exts", "sentencepiece", "protobuf")
"""Packages that these files import besides torch."""

_CONFIG = {
    "architectures": ["InfiMMZephyrModel"],
    "auto_map": {
        "AutoConfig": "configuration_infimm_zephyr.InfiMMConfig",
        "AutoModelForCausalLM": "modeling_infimm_zephyr.InfiMMZephyrModel",
    },
    "model_type": "infimm-zephyr",
}
_PROCESSOR = {
    "auto_map": {"AutoProcessor": "processing_infimm_zephyr.InfiMMZephyrProcessor"},
    "processor_class": "InfiMMZephyrProcessor",
}


def fits_authors_code(model: InfiMMConfig) -> bool:
    """Return whether the authors' classes support the model: a Mistral whose numbers of latents and heads and whose image size (cropped)
    are constants."""
    resampler, gated = model.resampler, model.gated
    constants = (resampler.num_latents, resampler.num_layers, resampler.num_attention_heads, resampler.head_dim, resampler.ffn_multiplier)
    is_mistral = model.decoder.num_query_groups < model.decoder.num_attention_heads
    is_seen = (model.vision.image_size, model.vision.resize) == (336, "crop")
    fits = constants == (64, 6, 8, 64, 4) and (gated.num_attention_heads, gated.head_dim, gated.ffn_multiplier) == (8, 64, 4)
    return is_mistral and is_seen and fits


def write_authors_files(
    model: InfiMMConfig, out: Path, *, config: dict[str, Any], ids: Tokenizer, tokenizer_config: dict[str, Any]
) -> None:
    """Write the files of the folder `out`, which must not exist yet.

    Args:
        config: contents of the export's config.json.
        tokenizer_config: contents of the export's tokenizer_config.json.
    """
    out.mkdir()
    write_document(out / "config.json", {**config, **_CONFIG})
    write_document(out / "preprocessor_config.json", {**_PROCESSOR, "image_size": model.vision.image_size})
    write_document(out / "processor_config.json", _PROCESSOR)
    write_document(out / "tokenizer_config.json", _tokenizer_config(tokenizer_config, ids))


def _tokenizer_config(ours: dict[str, Any], ids: Tokenizer) -> dict[str, Any]:
    """Return the configuration of transformers' LlamaTokenizer, which the authors' processor uses. It reads tokenizer.model, which may lack
    special tokens of the family, so these are added here."""
    names = {ids.piece(index)[0]: index for index in (ids.bos_id, ids.eos_id)}
    names |= {name: ids.special_id(name) for name in ours["additional_special_tokens"]}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(index): {"content": name, **plain} for name, index in sorted(names.items(), key=lambda item: item[1])}
    kept = ("bos_token", "eos_token", "unk_token", "additional_special_tokens", "model_max_length", "chat_template")
    return {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": added,
        **{name: ours[name] for name in kept if name in ours},
        "pad_token": ours["eos_token"],  # as released
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
    }
