"""An exported MM1 fine-tuned with sub-images: its processor computes the pixels of training, and its logits equal those of training."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.data_files import picture
from support.small import packed_batch
from support.trained import Trained, train_one_step, training_logits
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from megatron_mm.config import ParallelConfig
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.reader import CheckpointReader
from megatron_mm.conversion.to_hf import Export, convert_to_hf
from megatron_mm.conversion.verify import verify
from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.load.tile_decode import EncodedTiles, TileDecoder
from megatron_mm.data.sub_images import SubImages
from megatron_mm.families.mm1.config import image_input
from megatron_mm.families.mm1.model import MM1Model
from megatron_mm.parallel import topology
from megatron_mm.training.build import build_chunks

DOCUMENTS = (((5,), "a red circle"), ((), "question: how many stars? answer: 3."), ((1, 5), "a blue star"))
"""For each document, the number of sub-images of each image that it begins with, and its text."""
IMAGES = [picture(size=size, form="PNG") for size in ((100, 70), (31, 200), (96, 96))]


@pytest.fixture(scope="module")
def tuned(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_one_step(tokenizer_path, tmp_path_factory.mktemp("tuned"), recipe="debug_mm1_sft")


@pytest.fixture(scope="module")
def exported(tuned: Trained, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return convert_to_hf(tuned.checkpoint, tmp_path_factory.mktemp("export") / "model", dtype="float32")


@pytest.fixture(scope="module")
def processor(exported: Export) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(exported.path, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(exported: Export) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(exported.path, trust_remote_code=True).eval()


def opened() -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for data in IMAGES]


def training_pixels(tuned: Trained, counts: list[int]) -> torch.Tensor:
    decoder = TileDecoder(image_input(tuned.config), threads=1)
    wanted = [EncodedTiles(data, 1, 1, tiles=range(count), count=count) for data, count in zip(IMAGES, counts, strict=True)]
    pixels = decoder.decode(wanted).pixels
    decoder.close()
    return pixels


def batch_of(tuned: Trained) -> PackedBatch:
    k, tokenizer = tuned.config.connector.num_tokens, tuned.tokenizer
    ids, starts, bounds = [], [], [0]
    for counts, text in DOCUMENTS:
        starts += [bounds[-1] + 1 + k * number for number in range(sum(counts))]
        ids += [tokenizer.bos_id, *[tokenizer.image_id] * (k * sum(counts)), *tokenizer.encode(text), tokenizer.eos_id]
        bounds.append(len(ids))
    pixels = training_pixels(tuned, [count for counts, _ in DOCUMENTS for count in counts])
    return packed_batch(torch.tensor(ids), bounds=bounds, starts=starts, masked_id=tokenizer.image_id, pixels=pixels)


def test_the_processor_makes_the_pixels_of_training(tuned: Trained, processor: ProcessorMixin) -> None:
    """Bit by bit, for any shape of the image; only overviews if they are requested."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tuned.config.vision.mean, tuned.config.vision.std))
    for counts, low in (([5, 5, 5], False), ([1, 5, 1], [True, False, True])):
        expected = (training_pixels(tuned, counts) / 255 - mean) / std
        inputs = processor(images=opened(), text="<image> and <image>, <image>", low_resolution=low, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"][0], expected)
        is_image = (inputs["input_ids"][0] == tuned.tokenizer.image_id).int().tolist()
        runs = [len(list(group)) for value, group in itertools.groupby(is_image) if value]
        assert runs == [16 * count for count in counts]
    with pytest.raises(ValueError, match="low_resolution has 2 values, but 3 images are given"):
        processor(images=opened(), text="<image>" * 3, low_resolution=[True, False])


def logits_of_training(tuned: Trained) -> list[torch.Tensor]:
    """Return the logits of each of `DOCUMENTS`."""
    process = topology.initialize(ParallelConfig(), seed=1)
    try:
        (chunk,) = build_chunks(tuned.experiment, process)
        assert isinstance(chunk, MM1Model)
        chunk.load_state_dict(tuned.weights)
        return training_logits(chunk, batch_of(tuned))
    finally:
        topology.shutdown()


def test_logits_are_the_training_models(tuned: Trained, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Within 1e-6 relative to the norm of a document's logits, which is fp32 rounding."""
    images, expected = iter(opened()), logits_of_training(tuned)
    for logits, (counts, text) in zip(expected, DOCUMENTS, strict=True):
        own = [next(images) for _ in counts]
        low = [count == 1 for count in counts]
        inputs = processor(images=own or None, text="<image>" * len(own) + text + "</s>", low_resolution=low, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs).logits[0]
        assert (found - logits).norm() < 1e-6 * logits.norm()
        assert logits.std() > 0.1


def test_generation_with_and_without_cache(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Prompts with different numbers of sub-images in one batch."""
    images = opened()
    text = ["<image>a red", "<image>a<image>the blue star left"]
    inputs = processor(images=[images[:1], images[1:]], text=text, low_resolution=[False, True, False], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 6, 3, 48, 48)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    alone = processor(images=images[:1], text=text[0], return_tensors="pt")
    assert torch.equal(model.generate(**alone, **options)[0, -6:], cached[0, -6:]), "padding changes nothing"


def test_there_and_back(tuned: Trained, exported: Export, tmp_path: Path) -> None:
    found = convert_from_hf(tuned.experiment, tmp_path / "back", whole=exported.path)
    reader = CheckpointReader(found.checkpoint)
    assert all(torch.equal(reader.read(name), weight) for name, weight in tuned.weights.items()) and not found.drawn
    verified = verify(exported.path, found.checkpoint, prompt="a red circle")
    assert verified.passed and verified.logits == 0.0


def test_how_images_are_shown_is_in_the_export(tuned: Trained, exported: Export, tmp_path: Path) -> None:
    """It does not prevent importing the weights into a recipe with other sub-images."""
    said = json.loads((exported.path / "preprocessor_config.json").read_text())
    assert said["sub_images"] == {"grid": 2, "overview_first": True} and said["size"] == {"height": 48, "width": 48}
    settings = replace(tuned.experiment, model=replace(tuned.config, sub_images=SubImages(grid=3)))
    assert convert_from_hf(settings, tmp_path / "other", whole=exported.path).num_parameters > 0
