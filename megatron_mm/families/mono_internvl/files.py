"""What an exported Mono-InternVL needs besides its weights: the configuration of the authors' code, and the tokenizer.

The code itself is not ours and does not travel with them: `from_pretrained` takes it from a released checkpoint of the same architecture,
whose Python files belong beside the exported ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mm.config import Experiment
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.mono_internvl.config import SPECIAL_TOKENS, MonoInternVLConfig
from megatron_mm.hf.configs import decoder_config, write_document
from megatron_mm.hf.settings import decoder_settings, under
from megatron_mm.hf.tokenizer import open_run_tokenizer


def write_mono_internvl_files(
    model: MonoInternVLConfig, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None = None
) -> None:
    """Configuration and tokenizer: see `Family.write_files`."""
    ids = open_run_tokenizer(tokenizer, special=SPECIAL_TOKENS, rows=vocab_rows or model.decoder.vocab_size)
    write_document(out / "config.json", mono_internvl_config(model, experiment, ids, dtype=dtype, vocab_rows=vocab_rows))
    shutil.copyfile(tokenizer, out / "tokenizer.model")


def mono_internvl_config(
    model: MonoInternVLConfig, experiment: Experiment, ids: Tokenizer, *, dtype: str, vocab_rows: int | None
) -> dict[str, Any]:
    """config.json of a Mono-InternVL."""
    decoder, patches = model.decoder, model.patches
    length = experiment.data.sequence_length
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "model_type": "internvl_chat",
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        "downsample_ratio": 1 / patches.unshuffle,
        "dynamic_image_size": True,
        "force_image_size": patches.image_size,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "use_thumbnail": True,
        "llm_config": {
            "architectures": ["InternLM2VEForCausalLM"],
            "model_type": "internlm2",
            "bias": False,
            **decoder_config(decoder, sequence_length=length, vocab_rows=vocab_rows),
            "bos_token_id": ids.bos_id,
            "eos_token_id": ids.eos_id,
        },
        "vision_config": {
            "architectures": ["InternVisionPatchModel"],
            "model_type": "intern_vit_patch",
            "hidden_size": patches.hidden_size,
            "image_size": patches.position_grid * patches.patch_size,
            "patch_size": patches.patch_size,
        },
    }


def mono_internvl_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a released Mono-InternVL -> fields of a MonoInternVLConfig."""
    vision, decoder = document["vision_config"], decoder_settings(document["llm_config"])
    patches = {
        "image_size": document["force_image_size"],
        "patch_size": vision["patch_size"],
        "hidden_size": vision["hidden_size"],
        "unshuffle": round(1 / document.get("downsample_ratio", 0.5)),
        "position_grid": vision["image_size"] // vision["patch_size"],
    }
    return {**under("patches", patches), **under("decoder", decoder)}
