"""Forms in which the same weights are published: shards, pickles, prefixes, buffers, wrappers of training programs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.converted import same, tensors
from support.hf_models import experiment, make_language, make_vision, save

from megatron_mm.conversion.from_hf import convert_from_hf

State = dict[str, torch.Tensor]


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def bare(state: State) -> State:
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


INSIDE = {"multi_modal_projector.linear_1.weight": torch.ones(2, 3), "vision_tower.vision_model.post_layernorm.bias": torch.ones(3)}
BUFFERS = {
    f"model.layers.{number}.self_attn.rotary_emb.{name}": torch.ones(8) for number in range(4) for name in ("inv_freq", "cos_cached")
}
DECODERS: dict[str, tuple[Callable[[State], State], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "no prefix": (bare, lambda config: config),
    "of data-parallel training": (lambda state: below("module.", state), lambda config: config),
    "of torch.compile": (lambda state: below("_orig_mod.", state), lambda config: config),
    "inside LLaVA": (
        lambda state: below("language_model.", state) | INSIDE,
        lambda config: {"model_type": "llava", "text_config": config},
    ),
    "inside LLaVA, transformers 5": (
        lambda state: (
            {name if name == "lm_head.weight" else f"model.language_model.{name.removeprefix('model.')}": t for name, t in state.items()}
            | INSIDE
        ),
        lambda config: {"model_type": "llava", "text_config": config},
    ),
    "rotary buffers": (lambda state: state | BUFFERS | {"model.rotary_emb.inv_freq": torch.ones(8)}, lambda config: config),
    "rotary buffers, no prefix": (lambda state: bare(state) | {"rotary_emb.inv_freq": torch.ones(8)}, lambda config: config),
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, dict[str, Any], State]:
    """Tensors and config.json of a Llama, and the tensors of the checkpoint made from them."""
    folder = save(make_language(), tmp_path_factory.mktemp("decoder") / "llama")
    convert_from_hf(experiment(), folder / "run", language=folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()), tensors(folder / "run")


def write(folder: Path, state: State, config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("variant", DECODERS)
def test_a_decoder(variant: str, decoder: tuple[State, dict[str, Any], State], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, config, expected = decoder
    change, describe = DECODERS[variant]
    with caplog.at_level(logging.INFO):
        convert_from_hf(experiment(), tmp_path / "run", language=write(tmp_path / "hf", change(state), describe(config)))
    assert same(tensors(tmp_path / "run"), expected)
    assert ("ignoring 2 others" in caplog.text) == ("LLaVA" in variant), "what is left out is said"


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_pickles_of_training_programs(wrapper: str, decoder: tuple[State, dict[str, Any], State], tmp_path: Path) -> None:
    state, config, expected = decoder
    (tmp_path / "hf").mkdir()
    torch.save({wrapper: below("module.", state), "epoch": 3}, tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert_from_hf(experiment(), tmp_path / "run", language=tmp_path / "hf")
    assert same(tensors(tmp_path / "run"), expected)


def test_a_tower_inside_a_larger_model(tmp_path: Path) -> None:
    plain = save(make_vision(), tmp_path / "clip")
    convert_from_hf(experiment(), tmp_path / "plain", vision=plain)
    state = {name.removeprefix("vision_model."): tensor for name, tensor in load_file(plain / "model.safetensors").items()}
    config = {"model_type": "llava", "vision_config": json.loads((plain / "config.json").read_text())}
    inside = write(tmp_path / "llava", below("vision_tower.vision_model.", state) | {"projector.weight": torch.ones(2)}, config)
    convert_from_hf(experiment(), tmp_path / "run", vision=inside)
    assert same(tensors(tmp_path / "run"), tensors(tmp_path / "plain"))


def test_a_larger_model_with_more_in_its_decoder_is_refused(decoder: tuple[State, dict[str, Any], State], tmp_path: Path) -> None:
    state, config, _ = decoder
    biased = {**below("language_model.", state), "language_model.model.layers.1.self_attn.q_proj.bias": torch.zeros(128)}
    folder = write(tmp_path / "hf", biased, {"model_type": "other", "text_config": config})
    with pytest.raises(ValueError, match=r"1 unknown tensors: model\.layers\.1\.self_attn\.q_proj\.bias"):
        convert_from_hf(experiment(), tmp_path / "run", language=folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "other", "text_config": {**config, "model_type": "gemma2"}}))
    with pytest.raises(ValueError, match=r"its config\.json says model_type 'other', which is a different architecture"):
        convert_from_hf(experiment(), tmp_path / "run", language=folder)


def test_files_that_are_named_otherwise(decoder: tuple[State, dict[str, Any], State], tmp_path: Path) -> None:
    state, config, expected = decoder
    folder = write(tmp_path / "hf", state, config)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(ValueError, match=r"holds no weights: .*to read one of \(model\.fp16\.safetensors\), specify the path of the file"):
        convert_from_hf(experiment(), tmp_path / "run", language=folder)
    convert_from_hf(experiment(), tmp_path / "run", language=folder / "model.fp16.safetensors")
    assert same(tensors(tmp_path / "run"), expected)
    (folder / "model.fp16.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"without their index model\.safetensors\.index\.json: download that file, too"):
        convert_from_hf(experiment(), tmp_path / "again", language=folder)
