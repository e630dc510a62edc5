"""Small random models of transformers' own classes, and an experiment of the same shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from megatron_mm.config import Experiment
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.recipes import get_recipe

VOCABULARY = 400
"""Rows of the language models; the recipe's has more."""

DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
}


def experiment(*, precision: str = "fp32", vocab_size: int = 416, image_size: int = 32, **decoder: Any) -> Experiment:
    """`debug_mm1` with the shapes of these models."""
    base = get_recipe("debug_mm1")
    assert isinstance(base.model, MM1Config)
    fields = {
        "num_layers": DECODER["num_hidden_layers"],
        "hidden_size": DECODER["hidden_size"],
        "ffn_hidden_size": DECODER["intermediate_size"],
        "num_attention_heads": DECODER["num_attention_heads"],
        "num_query_groups": DECODER["num_key_value_heads"],
        "head_dim": DECODER["head_dim"],
        "rotary_base": 500.0,
        "vocab_size": vocab_size,
        "tied_embeddings": False,
    }
    tower = replace(
        base.model.vision,
        image_size=image_size,
        hidden_size=TOWER["hidden_size"],
        ffn_hidden_size=TOWER["intermediate_size"],
        num_layers=TOWER["num_hidden_layers"],
        num_attention_heads=TOWER["num_attention_heads"],
    )
    model = replace(base.model, decoder=replace(base.model.decoder, **{**fields, **decoder}), vision=tower)
    return replace(base, model=model, train=replace(base.train, precision=precision))


def make_language(kind: str = "llama", **fields: Any) -> torch.nn.Module:
    """Return a random decoder; its norms' weights are random, too."""
    values = {**DECODER, **fields}
    model = MistralForCausalLM(MistralConfig(**values)) if kind == "mistral" else LlamaForCausalLM(LlamaConfig(**values))
    return scrambled(model, seed=1)


def make_vision(**fields: Any) -> CLIPVisionModel:
    """Return a random image tower."""
    return scrambled(CLIPVisionModel(CLIPVisionConfig(**{**TOWER, **fields})), seed=2)


@torch.no_grad()
def scrambled(model: torch.nn.Module, *, seed: int) -> Any:
    """Add noise to every weight, so that swapped tensors never agree by chance; return the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(model: Any, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write a model as transformers does."""
    model.to(dtype).save_pretrained(folder, **options)
    model.to(torch.float32)
    return folder
