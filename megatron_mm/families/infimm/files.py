"""What an exported InfiMM needs besides its weights: the configuration of the authors' code, and the tokenizer.

The code itself is not ours and does not travel with them: `from_pretrained` takes it from a released checkpoint of the same architecture,
whose Python files belong beside the exported ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mm.config import EvaConfig, Experiment
from megatron_mm.config.towers import EVA02_L_14_336
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.infimm.config import END_OF_CHUNK, IMAGE, InfiMMConfig
from megatron_mm.hf.configs import Architecture, language_model_config, write_document
from megatron_mm.hf.settings import decoder_settings, under
from megatron_mm.hf.tokenizer import open_run_tokenizer


def write_infimm_files(
    model: InfiMMConfig, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None, language_is_frozen: bool
) -> None:
    """Configuration and tokenizer: see `Family.write_files`. The configuration says whether the language model was frozen last."""
    ids = open_run_tokenizer(tokenizer, special=(END_OF_CHUNK, IMAGE), rows=vocab_rows or model.decoder.vocab_size)
    write_document(
        out / "config.json",
        infimm_config(
            model,
            ids,
            sequence_length=experiment.data.sequence_length,
            language_is_frozen=language_is_frozen,
            dtype=dtype,
            vocab_rows=vocab_rows,
        ),
    )
    shutil.copyfile(tokenizer, out / "tokenizer.model")


def infimm_config(
    model: InfiMMConfig, ids: Tokenizer, *, sequence_length: int, language_is_frozen: bool, dtype: str, vocab_rows: int | None
) -> dict[str, Any]:
    """config.json of an InfiMM. The authors' classes are named where the language model is a Mistral, as Zephyr is."""
    decoder, mistral = model.decoder, model.decoder.num_query_groups < model.decoder.num_attention_heads
    code = {
        "architectures": ["InfiMMZephyrModel"],
        "auto_map": {
            "AutoConfig": "configuration_infimm_zephyr.InfiMMConfig",
            "AutoModelForCausalLM": "modeling_infimm_zephyr.InfiMMZephyrModel",
        },
    }
    kind: Architecture = "mistral" if mistral else "llama"
    language = language_model_config(decoder, architecture=kind, dtype=dtype, sequence_length=sequence_length, vocab_rows=vocab_rows)
    return {
        **(code if mistral else {}),
        "model_type": "infimm-zephyr" if mistral else "infimm",
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        "seq_length": 1024,
        "cross_attn_every_n_layers": model.gated.every_n_layers,
        "use_grad_checkpoint": False,
        "freeze_llm": language_is_frozen,
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


def infimm_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a released InfiMM -> fields of an InfiMMConfig."""
    visual, decoder = document["visual"], decoder_settings(document["language"])
    vision = {
        "image_size": visual["image_size"],
        "patch_size": visual["patch_size"],
        "hidden_size": visual["width"],
        "num_layers": visual["layers"],
        "num_attention_heads": visual["width"] // visual["head_width"],
        "ffn_hidden_size": int(visual["width"] * visual["mlp_ratio"]),
        "output_size": visual["embed_dim"],
        "swiglu": visual.get("naiveswiglu", False),
        "block": "post_norm" if visual.get("postnorm", False) else "pre_norm",
        "rotary_grid": visual["pt_hw_seq_len"] if visual.get("rope", False) else None,
    }
    return {**under("vision", vision), **under("decoder", decoder), "gated.every_n_layers": document["cross_attn_every_n_layers"]}
