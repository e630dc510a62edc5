"""Exports in transformers: every class that config.json names loads the exported model, in the oldest and newest supported version.

`make test` tries the installed version. `make test-transformers` installs others into build/transformers/VERSION and tries them,
too, each in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.converted import written
from support.references import infimm_reference, mono_reference
from support.small_infimm import small_infimm
from support.small_mono import small_mono
from support.trained import Trained
from transformers import AutoModelForCausalLM

import megatron_mm
from megatron_mm.config import DecoderConfig, Experiment
from megatron_mm.conversion.to_hf import Export, convert_to_hf
from megatron_mm.conversion.verify import verify

LOADER = Path(__file__).parents[1] / "support" / "load_export.py"
VERSIONS = Path(megatron_mm.__path__[0]).parent / "build" / "transformers"


def infimm(tokenizer_path: Path, *, groups: int) -> Experiment:
    settings = small_infimm(decoder={"vocab_size": 416, "rotary_base": 500.0})
    decoder: DecoderConfig = settings.model.decoder
    decoder = replace(decoder, head_dim=decoder.hidden_size // decoder.num_attention_heads, num_query_groups=groups)
    data = replace(settings.data, tokenizer=tokenizer_path, chat_template="vicuna")
    return replace(settings, model=replace(settings.model, decoder=decoder), data=data)


@pytest.fixture(scope="module", params=["mm1", "infimm_mistral", "infimm_llama", "mono_internvl"])
def case(request: pytest.FixtureRequest, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An export, and a file with inputs and their expected logits."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "mm1":
        exported: Export = request.getfixturevalue("exported")
        save_file(mm1_case(request.getfixturevalue("trained"), exported.path), folder / "case.safetensors")
        return exported.path, folder / "case.safetensors"
    if request.param == "mono_internvl":
        settings, make_case = mono(tokenizer_path), mono_case
    else:
        settings, make_case = infimm(tokenizer_path, groups=2 if request.param == "infimm_mistral" else 4), infimm_case
    written(settings, folder / "run")
    convert_to_hf(folder / "run", folder / "model")
    save_file(make_case(settings, folder / "model"), folder / "case.safetensors")
    return folder / "model", folder / "case.safetensors"


def mm1_case(trained: Trained, path: Path) -> dict[str, torch.Tensor]:
    """The first document of the training batch."""
    config = json.loads((path / "preprocessor_config.json").read_text())
    length, batch = int(trained.batch.cu_seqlens[1]), trained.batch
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    assert batch.pixels is not None
    pixels = (batch.pixels[:1].float() / 255 - mean) / std
    return {
        "input_ids": batch.token_ids[None, :length].contiguous(),
        "pixel_values": pixels,
        "logits": trained.logits[0][None].contiguous(),
    }


def infimm_case(settings: Experiment, path: Path) -> dict[str, torch.Tensor]:
    """Two sequences with two images and one; logits of the plain reference."""
    config = json.loads((path / "config.json").read_text())
    reference = infimm_reference(settings.model, image_token=config["image_token_id"])  # type: ignore[arg-type]
    reference.load_state_dict(load_file(path / "model.safetensors"))
    generator, size = torch.Generator().manual_seed(0), config["visual"]["image_size"]
    ids = torch.randint(10, 300, (2, 20), generator=generator)
    for row, place in ((0, 3), (0, 9), (1, 5)):
        ids[row, place], ids[row, place + 1] = config["eoc_token_id"], config["image_token_id"]
    pixels = torch.randn(2, 2, 3, size, size, generator=generator)
    with torch.no_grad():
        logits = torch.stack([reference(ids[0], pixels[0]), reference(ids[1], pixels[1, :1])])
    return {"input_ids": ids, "pixel_values": pixels, "logits": logits}


def mono(tokenizer_path: Path) -> Experiment:
    settings = small_mono(decoder={"vocab_size": 416})
    return replace(settings, data=replace(settings.data, tokenizer=tokenizer_path, chat_template="vicuna", max_tiles=6))


def mono_case(settings: Experiment, path: Path) -> dict[str, torch.Tensor]:
    """Two sequences with two tiles and one; logits of the plain reference."""
    config, generator = json.loads((path / "config.json").read_text()), torch.Generator().manual_seed(0)
    reference = mono_reference(settings.model, image_token=config["image_token_id"])  # type: ignore[arg-type]
    reference.load_state_dict(load_file(path / "model.safetensors"))
    size, tokens = config["force_image_size"], settings.model.patches.num_tokens
    ids = torch.randint(10, 300, (2, 2 * tokens + 9), generator=generator)
    for row, place in ((0, 3), (0, 5 + tokens), (1, 4)):
        ids[row, place : place + tokens] = config["image_token_id"]
    pixels = torch.randn(2, 2, 3, size, size, generator=generator)
    with torch.no_grad():
        logits = torch.stack([reference(ids[0], pixels[0]), reference(ids[1], pixels[1, :1])])
    return {"input_ids": ids, "pixel_values": pixels, "logits": logits}


def load_in_a_process(case: tuple[Path, Path], *, first: Path | None) -> str:
    """Run the loader with the packages of a folder before the installed ones; return its last line of output."""
    paths = {} if first is None else {"PYTHONPATH": str(first)}
    done = subprocess.run(
        [sys.executable, str(LOADER), *map(str, case)], env={**os.environ, **paths}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_every_class_under_the_installed_transformers(case: tuple[Path, Path]) -> None:
    assert "AutoModelForCausalLM, AutoTokenizer, AutoProcessor" in load_in_a_process(case, first=None).replace(
        "AutoModelForImageTextToText, ", ""
    ).replace(", AutoModelForImageTextToText", "")


@pytest.mark.parametrize("case", ["infimm_mistral", "infimm_llama"], indirect=True)
def test_verify_of_a_run_of_infimm_and_its_decoder_alone(case: tuple[Path, Path], tmp_path: Path) -> None:
    """The whole model with its exported code, and the decoder alone as transformers' own class, without images."""
    folder, run_dir = case[0], case[0].parent / "run"
    found = verify(run_dir, folder, prompt="a red circle")
    assert found.passed and found.logits == 0
    alone = convert_to_hf(run_dir, tmp_path / "alone", part="language").path
    decoder, whole = (AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval() for path in (alone, folder))
    assert type(decoder).__name__ == "LlamaForCausalLM"
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert (decoder(ids).logits - whole(ids).logits).abs().max() < 1e-5, "without images the gated blocks do nothing"


@pytest.mark.slow
@pytest.mark.parametrize("version", sorted(path.name for path in VERSIONS.glob("*")) or ["none"])
def test_every_class_under_other_versions(case: tuple[Path, Path], version: str) -> None:
    if version == "none":
        pytest.skip("no other versions of transformers are in build/transformers: make test-transformers installs them")
    assert load_in_a_process(case, first=VERSIONS / version).startswith(f"transformers {version}: ")
