"""Round trips: every tensor is bit-identical, in bf16 and fp32, for every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.converted import IDS, PIXELS, compute, hf_features, hf_logits, same, stored, weights, written
from support.distributed import run_processes
from support.hf_models import VOCABULARY, experiment, make_language, make_vision, save
from support.trained import make_images
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel

from megatron_mm.config import Experiment, MoEConfig
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.to_hf import convert_to_hf
from megatron_mm.data.text.tokenizer import Tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_decoders_and_towers_come_back_as_they_were(kind: str, precision: str, tmp_path: Path) -> None:
    language = save(make_language(kind), tmp_path / "language", dtype=DTYPES[precision], max_shard_size="100KB")
    vision = save(make_vision(), tmp_path / "vision", dtype=DTYPES[precision])
    run_dir = tmp_path / "run"
    made = convert_from_hf(experiment(precision=precision), run_dir, language=language, vision=vision)
    assert set(made.sources) == {"language (llama)", "vision (clip)"} and set(made.drawn) == {"connector"}
    options: dict[str, Any] = {"part": "language", "architecture": kind, "vocab_rows": VOCABULARY, "shard_size": "50KB"}
    convert_to_hf(run_dir, tmp_path / "language_again", **options)
    convert_to_hf(run_dir, tmp_path / "vision_again", part="vision")
    assert same(weights(tmp_path / "language_again"), weights(language))
    prefixed = {f"vision_model.{name}": tensor for name, tensor in weights(vision).items()}
    assert same(weights(tmp_path / "vision_again"), prefixed)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "language_again")
    assert type(again).__name__ == f"{kind.capitalize()}ForCausalLM"
    with torch.no_grad():
        assert torch.equal(again(IDS[None]).logits, AutoModelForCausalLM.from_pretrained(language)(IDS[None]).logits)


SPARSE = {"moe": MoEConfig(num_experts=4, every_n_layers=2)}
CHECKPOINTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "one process": (1, {}, {}, "fp32"),
    "tied": (1, {}, {"tied_embeddings": True}, "bf16"),
    "experts": (1, {}, SPARSE, "fp32"),
    "tensor 2 pipeline 2": (4, {"tensor": 2, "pipeline": 2}, {}, "bf16"),
    "expert 2": (2, {"expert": 2}, SPARSE, "bf16"),
}
"""Processes, layout, decoder, and the precision of the quick test; the other precision is tested with the slow tests."""


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=[] if precision == quick and processes < 4 else pytest.mark.slow)
        for name, (processes, *_, quick) in CHECKPOINTS.items()
        for precision in DTYPES
    ],
)
def test_our_checkpoints_come_back_as_they_were(name: str, precision: str, tokenizer_path: Path, tmp_path: Path) -> None:
    world_size, parallel, decoder, _ = CHECKPOINTS[name]
    settings = experiment(precision=precision, **decoder)
    settings = replace(settings, data=replace(settings.data, tokenizer=tokenizer_path))
    before = written(settings, tmp_path / "run", parallel, world_size=world_size)
    convert_to_hf(tmp_path / "run", tmp_path / "hf", shard_size="60KB")
    made = convert_from_hf(replace(settings, data=replace(settings.data, tokenizer=None)), tmp_path / "again", whole=tmp_path / "hf")
    assert made.drawn.keys() <= {"language"} and sum(made.drawn.values()) <= 8, "nothing but what routers remember of a step"
    assert same(stored(tmp_path / "again"), before)
    assert (made.checkpoint / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()


@pytest.fixture(scope="module")
def trained_in_parts(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """The experiment, and a run directory written with tensor parallel 2 and pipeline 2."""
    settings = experiment()
    settings = replace(settings, data=replace(settings.data, tokenizer=tokenizer_path))
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    written(settings, run_dir, {"tensor": 2, "pipeline": 2}, world_size=4)
    return settings, run_dir


def test_the_parts_compute_what_the_model_does(trained_in_parts: tuple[Experiment, Path], tmp_path: Path) -> None:
    """The tolerance is fp32 rounding on logits of about 1."""
    settings, run_dir = trained_in_parts
    (ours,) = run_processes(compute, 1, settings, run_dir)
    for kind in ("llama", "mistral"):
        convert_to_hf(run_dir, tmp_path / kind, part="language", architecture=kind)
        torch.testing.assert_close(hf_logits(tmp_path / kind), ours.logits, atol=1e-4, rtol=1e-4)
    convert_to_hf(run_dir, tmp_path / "vision", part="vision")
    torch.testing.assert_close(hf_features(tmp_path / "vision", settings), ours.features, atol=1e-4, rtol=1e-4)
    _, info = CLIPVisionModel.from_pretrained(tmp_path / "vision", output_loading_info=True)
    assert not any(info.values()), info


def test_the_parts_bring_tokenizer_and_image_processor(trained_in_parts: tuple[Experiment, Path], tmp_path: Path) -> None:
    settings, run_dir = trained_in_parts
    convert_to_hf(run_dir, tmp_path / "language", part="language")
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "language"), Tokenizer.open(settings.data.tokenizer_path)
    text = "a red circle left of the blue star."
    assert tokenizer(text).input_ids == [ours.bos_id, *ours.encode(text)]
    convert_to_hf(run_dir, tmp_path / "vision", part="vision")
    images = make_images(num_images=2, size=32)
    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "vision")(list(images), return_tensors="pt").pixel_values
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.model.vision.mean, settings.model.vision.std))
    torch.testing.assert_close(pixels, (images / 255 - mean) / std)
    assert pixels.shape == (2, *PIXELS.shape[1:])


def test_a_sparse_decoder_is_no_llama(tokenizer_path: Path, tmp_path: Path) -> None:
    settings = experiment(moe=MoEConfig(num_experts=2, every_n_layers=2))
    written(replace(settings, data=replace(settings.data, tokenizer=tokenizer_path)), tmp_path / "run")
    with pytest.raises(ValueError, match="has experts, which a Llama does not have: leave out --part"):
        convert_to_hf(tmp_path / "run", tmp_path / "out", part="language")
