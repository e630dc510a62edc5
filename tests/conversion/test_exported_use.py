"""Typical uses of exported InfiMM and Mono-InternVL models: batches, beams, other weights, more tokens, arbitrary images."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.converted import written
from support.small_infimm import small_infimm
from support.small_mono import small_mono
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel, ProcessorMixin

from megatron_mm.config import Experiment
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.to_hf import convert_to_hf
from megatron_mm.data.load.tile_decode import EncodedTiles, TileDecoder
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.registry import family_of

SMALL = {"infimm": small_infimm, "mono_internvl": small_mono}
RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=list(SMALL))
def case(request: pytest.FixtureRequest, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """Settings and an export of random weights."""
    folder, settings = tmp_path_factory.mktemp(request.param), SMALL[request.param](decoder={"vocab_size": 416})
    settings = replace(settings, data=replace(settings.data, tokenizer=tokenizer_path, max_tiles=6 if request.param != "infimm" else None))
    written(settings, folder / "run")
    convert_to_hf(folder / "run", folder / "model")
    return settings, folder / "model"


def load(path: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    loaded = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    return loaded, AutoProcessor.from_pretrained(path, trust_remote_code=True)


@torch.no_grad()
def test_a_padded_batch_generates_what_each_prompt_does(case: tuple[Experiment, Path]) -> None:
    model, processor = load(case[1])
    images, texts = [[RGB], [RGB.rotate(90), RGB], []], ["<image>a red", "<image>one<image>the blue star left of", "how many stars?"]
    batch = processor(images=images, text=texts, return_tensors="pt")
    for beams in (1, 3):
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": beams}
        together = model.generate(**batch, **options)[:, -5:]
        for own, text, found in zip(images, texts, together, strict=True):
            alone = processor(images=own or None, text=text, return_tensors="pt")
            assert torch.equal(model.generate(**alone, **options)[0, -5:], found)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), model.generate(**batch, **options))


@torch.no_grad()
def test_other_weights_and_other_pixels_count_at_once(case: tuple[Experiment, Path]) -> None:
    """No result of an earlier call is cached."""
    model, processor = load(case[1])
    inputs = processor(images=RGB, text="<image>a red", return_tensors="pt")
    first = model(**inputs).logits
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("patch_embed", "cls_token")):
            parameter.add_(torch.ones_like(parameter))
    second = model(**inputs).logits
    inputs["pixel_values"].mul_(-1)
    third = model(**inputs).logits
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_more_tokens_and_saving(case: tuple[Experiment, Path], tmp_path: Path) -> None:
    """Embeddings can grow, the saved model loads, and a model saved by transformers can be imported into a checkpoint."""
    settings, path = case
    model, processor = load(path)
    inputs = processor(images=RGB, text="<image>a red", return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
    for saved in (model, processor):
        saved.save_pretrained(tmp_path / "saved")
    made = convert_from_hf(settings, tmp_path / "again", whole=tmp_path / "saved")
    assert not made.drawn
    model.resize_token_embeddings(440)
    processor.tokenizer.add_tokens(["<new>"], special_tokens=True)
    for saved in (model, processor):
        saved.save_pretrained(tmp_path / "larger")
    larger, its_processor = load(tmp_path / "larger")
    with torch.no_grad():
        after = larger(**its_processor(images=RGB, text="<image>a red", return_tensors="pt")).logits
    assert after.shape[-1] == 440 and torch.equal(after[..., :416], before)
    assert its_processor(text="red<new>", return_tensors="pt")["input_ids"][0, -1] == processor.tokenizer.convert_tokens_to_ids("<new>")


def test_mono_internvls_tiles_and_prompts_are_trainings(case: tuple[Experiment, Path]) -> None:
    """Grids, pixels and token ids, for images of many shapes and kinds."""
    settings, path = case
    if settings.model.family == "infimm":
        return  # one square per image: covered by the tests of MM1's processor
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    own, family = processor.image_processor, family_of(settings.model)
    image_input: Any = replace(family.image_input(settings.model), **tiled(settings))
    decoder = TileDecoder(image_input, threads=1)
    ids = Tokenizer.open(path / "tokenizer.model", special=family.special_tokens)
    rng = np.random.default_rng(1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (own.image_mean, own.image_std))
    for size in ((1, 1), (1, 300), (300, 2), (45, 45), (46, 46), (200, 100), (64, 96), (33, 71), (640, 480)):
        width, height = size
        shape = (height, width, 4 if int(width) == 64 else 3)
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        image.save(file := io.BytesIO(), "PNG")
        inputs = processor(images=Image.open(io.BytesIO(file.getvalue())), text="<image>a red circle", return_tensors="pt")
        tiles = inputs["pixel_values"][0]
        expected = decoder.decode([EncodedTiles(file.getvalue(), *size, tiles=range(len(tiles)))])
        assert expected.ok.all() and torch.equal((tiles * std + mean).mul(255).round().to(torch.uint8), expected.pixels), size
        count = len(tiles) * settings.model.patches.num_tokens
        special = [ids.special_id("<img>"), *[ids.special_id("<IMG_CONTEXT>")] * count, ids.special_id("</img>")]
        assert inputs["input_ids"][0].tolist() == [ids.bos_id, *special, *ids.encode("a red circle")]
    decoder.close()


def tiled(settings: Experiment) -> dict[str, Any]:
    from megatron_mm.data.tiling import Tiling

    return {"tiling": Tiling(settings.data.min_tiles, settings.data.max_tiles)}
