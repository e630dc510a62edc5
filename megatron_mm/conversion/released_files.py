"""What exported InfiMM and Mono-InternVL models need besides their weights: the configurations of the authors' code, and the tokenizer.

The code itself is not ours and does not travel with them: `from_pretrained` takes it from a released checkpoint of the same architecture,
whose Python files belong beside the exported ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_mm.config import EvaConfig, Experiment
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig
from megatron_mm.families.registry import family_of
from megatron_mm.hf.configs import decoder_config, language_model_config
from megatron_mm.models.eva import EVA02_L_14_336


def write_infimm_files(experiment: Experiment, tokenizer: Path, out: Path, *, dtype: str, vocab_rows: int | None = None) -> None:
    """Configuration and tokenizer of an InfiMM."""
    ids = _tokenizer(experiment, tokenizer, rows=vocab_rows or experiment.model.decoder.vocab_size)
    _write(infimm_config(experiment, ids, dtype=dtype, vocab_rows=vocab_rows), tokenizer, out)


def write_mono_internvl_files(experiment: Experiment, tokenizer: Path, out: Path, *, dtype: str, vocab_rows: int | None = None) -> None:
    """Configuration and tokenizer of a Mono-InternVL."""
    ids = _tokenizer(experiment, tokenizer, rows=vocab_rows or experiment.model.decoder.vocab_size)
    _write(mono_internvl_config(experiment, ids, dtype=dtype, vocab_rows=vocab_rows), tokenizer, out)


def infimm_config(experiment: Experiment, ids: Tokenizer, *, dtype: str, vocab_rows: int | None) -> dict[str, Any]:
    """config.json of an InfiMM. The authors' classes are named where the language model is a Mistral, as Zephyr is."""
    model = experiment.model
    assert isinstance(model, InfiMMConfig), "the family's own files"
    decoder, mistral = model.decoder, model.decoder.num_query_groups < model.decoder.num_attention_heads
    length = experiment.data.sequence_length
    code = {
        "architectures": ["InfiMMZephyrModel"],
        "auto_map": {
            "AutoConfig": "configuration_infimm_zephyr.InfiMMConfig",
            "AutoModelForCausalLM": "modeling_infimm_zephyr.InfiMMZephyrModel",
        },
    }
    kind = "mistral" if mistral else "llama"
    language = language_model_config(decoder, architecture=kind, dtype=dtype, sequence_length=length, vocab_rows=vocab_rows)  # type: ignore[arg-type]
    return {
        **(code if mistral else {}),
        "model_type": "infimm-zephyr" if mistral else "infimm",
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        "seq_length": 1024,
        "cross_attn_every_n_layers": model.gated.every_n_layers,
        "use_grad_checkpoint": False,
        "freeze_llm": experiment.train.policy != "ift",
        "use_flash_attn": False,
        "image_token_id": ids.special_id("<image>"),
        "eoc_token_id": ids.special_id("<|endofchunk|>"),
        "visual": _visual_config(model.vision),
        "language": {**language, "bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id},
    }


def _visual_config(vision: EvaConfig) -> dict[str, Any]:
    """The authors' description of a tower; widths of MLPs are given as ratios, of which they take the whole part of the product."""
    ratio = round(vision.ffn_hidden_size / vision.hidden_size + 5e-4, 4)
    assert int(vision.hidden_size * ratio) == vision.ffn_hidden_size, f"no ratio gives {vision.ffn_hidden_size} of {vision.hidden_size}"
    return {
        **({"eva_model_name": "eva-clip-l-14-336"} if vision == EVA02_L_14_336 else {}),
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


def mono_internvl_config(experiment: Experiment, ids: Tokenizer, *, dtype: str, vocab_rows: int | None) -> dict[str, Any]:
    """config.json of a Mono-InternVL."""
    model = experiment.model
    assert isinstance(model, MonoInternVLConfig), "the family's own files"
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


def _tokenizer(experiment: Experiment, path: Path, *, rows: int) -> Tokenizer:
    ids = Tokenizer.open(path, special=family_of(experiment.model).special_tokens)
    if ids.vocab_size > rows:
        raise ValueError(f"{path} has {ids.vocab_size} ids, but {rows} embeddings are written: it is not this run's")
    return ids


def _write(config: dict[str, Any], tokenizer: Path, out: Path) -> None:
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(tokenizer, out / "tokenizer.model")
