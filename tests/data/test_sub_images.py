"""Sub-images, from the plan to the pixels: an overview and crops of each image, and some demonstrations at low resolution."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_files import ALONE, picture

from megatron_mm.config import Experiment
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.load.loader import StepBatch
from megatron_mm.data.load.tile_decode import EncodedTiles, TileDecoder
from megatron_mm.data.plan.packing import document_images
from megatron_mm.data.plan.stream import document_tiles
from megatron_mm.data.sub_images import LowResolution, SubImages, cut_sub_images
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel.topology import Topology
from megatron_mm.run.data import TrainingData, image_input, make_plan, open_tokenizer

SHARE = 0.6
SUB_IMAGES = SubImages()


def settings_on(path: Path, *, sub_images: SubImages | None = SUB_IMAGES, **data: Any) -> Experiment:
    """Return `debug_mm1_sft` on interleaved documents of several pictures."""
    base = get_recipe("debug_mm1_sft")
    assert isinstance(base.model, MM1Config)
    fields = {
        "path": path, "packing_window": 64, "sequence_length": 512, "mixture": {"interleaved": 1.0},
        "low_resolution_demonstrations": SHARE, **data,
    }  # fmt: skip
    return replace(base, model=replace(base.model, sub_images=sub_images), data=replace(base.data, **fields))


def load(settings: Experiment, topology: Topology = ALONE) -> StepBatch:
    loader = TrainingData(settings, topology, open_tokenizer(settings))
    try:
        return next(loader)
    finally:
        loader.close()


# ------------------------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_an_overview_and_crops_row_by_row(resize: Any) -> None:
    """The crops are parts of the square of twice the side; each may be decoded alone."""
    image = Image.open(io.BytesIO(picture(size=(100, 61), form="PNG")))
    transform = ImageTransform(16, (1, 2, 3), resize=resize)
    large = np.asarray(replace(transform, size=32).square(image)).transpose(2, 0, 1)
    expected = [np.asarray(transform.square(image)).transpose(2, 0, 1)]
    expected += [large[:, y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]
    found = cut_sub_images(image, SubImages(), transform, wanted=range(5), count=5)
    assert (found == np.stack(expected)).all()
    last = cut_sub_images(image, SubImages(overview_first=False), transform, wanted=range(5), count=5)
    assert (last == np.stack([*expected[1:], expected[0]])).all()
    for first in range(5):
        assert (cut_sub_images(image, SubImages(), transform, wanted=range(first, 5), count=5) == found[first:]).all()
    for order in (True, False):
        assert (cut_sub_images(image, SubImages(overview_first=order), transform, wanted=range(1), count=1) == found[:1]).all()
    assert cut_sub_images(image, SubImages(grid=3), transform, wanted=range(10), count=10).shape == (10, 3, 16, 16)


def test_numbers_of_the_paper() -> None:
    """1344 px: an overview and four crops of 672 px, 720 tokens in all; 1792 px with sub-images of 896 px."""
    settings = get_recipe("mm1_30b_sft")
    image = image_input(settings)
    assert image.size == 672 and image.max_tiles * image.tokens == 720 and image.transform.enlarged(2).size == 1344
    assert image.num_places(image.num_tiles(np.array([3000]), np.array([50]))).tolist() == [720]
    assert isinstance(settings.model, MM1Config)
    large = replace(settings.model, vision=replace(settings.model.vision, image_size=896))
    assert image_input(replace(settings, model=large)).transform.enlarged(2).size == 1792


# ---------------------------------------------------------------------------------------------------------- demonstrations


def test_which_images_are_shown_at_low_resolution() -> None:
    """A share of all images but each document's last; the choice depends only on seed, row and number."""
    rows, counts = np.arange(4000), np.random.default_rng(0).integers(0, 5, 4000)
    chosen = LowResolution(SHARE, seed=5).chosen(rows, counts)
    ends = np.cumsum(counts)
    assert not chosen[ends[counts > 0] - 1].any(), "what is asked about is shown whole"
    demonstrations = int((counts - 1).clip(0).sum())
    assert chosen.sum() / demonstrations == pytest.approx(SHARE, abs=0.02)
    backwards = LowResolution(SHARE, seed=5).chosen(rows[::-1], counts[::-1])
    documents = np.split(backwards, np.cumsum(counts[::-1])[:-1])[::-1]
    assert (np.concatenate(documents) == chosen).all(), "whatever is asked for beside it"
    assert (LowResolution(SHARE, seed=6).chosen(rows, counts) != chosen).mean() > 0.2
    assert not LowResolution(0.0, seed=5).chosen(rows, counts).any()
    assert LowResolution(1.0, seed=5).chosen(rows, counts).sum() == demonstrations


def test_planning_counts_what_documents_take(demo_data: Path) -> None:
    settings = settings_on(demo_data)
    (index,), image = make_plan(settings, split="train").indexes, image_input(settings)
    expected = [int(document_images(index, row, image).tiles.sum()) for row in range(len(index))]
    assert document_tiles(index, slice(0, len(index)), image).tolist() == expected
    some = np.array([7, 3, 3, 0])
    assert document_tiles(index, some, image).tolist() == [expected[row] for row in some]
    assert document_tiles(index, slice(5, 9), image).tolist() == expected[5:9]
    assert {1 + 5, 5 + 5, 5} < set(expected)
    full = image_input(settings_on(demo_data, low_resolution_demonstrations=0.0))
    assert (document_tiles(index, slice(0, len(index)), full) == 5 * index.sizes(slice(None)).num_images).all()


def test_without_sub_images_there_is_no_lower_resolution(demo_data: Path) -> None:
    with pytest.raises(ValueError, match=r"low_resolution_demonstrations is 0.6, but the model does not use sub-images"):
        image_input(settings_on(demo_data, sub_images=None))
    assert image_input(settings_on(demo_data, sub_images=None, low_resolution_demonstrations=0.0)).is_one_square
    with pytest.raises(
        ValueError, match=r"10 sub-images, more than data.max_images_per_sequence 9: raise it, or lower model.sub_images.grid"
    ):
        make_plan(settings_on(demo_data, sub_images=SubImages(grid=3), max_images_per_sequence=9), split="train")
    with pytest.raises(ValueError, match=r"sub_images.grid is 1"):
        SubImages(grid=1)


# ------------------------------------------------------------------------------------------------------------------ loader


@pytest.mark.parametrize("overview_first", [True, False])
def test_a_batch_of_sub_images(demo_data: Path, overview_first: bool) -> None:
    """Every sub-image is an image of the batch with its own pixels, and the batch has the plan's numbers."""
    sub_images = SubImages(overview_first=overview_first)
    settings = settings_on(demo_data, sub_images=sub_images)
    plan, step, image = make_plan(settings, split="train"), load(settings), image_input(settings)
    assert step.plan.num_images == sum(batch.num_images for batch in step.micro_batches)
    limit, seen = settings.data.max_images_per_sequence, Counter[int]()
    assert all(sequence.num_images <= limit and sequence.num_tokens <= 512 for sequence in step.plan.sequences)
    for batch, sequences in zip(step.micro_batches, step.plan.micro_batches_of(0, 1), strict=True):
        assert batch.pixels is not None and len(batch.pixels) == batch.num_images
        places = (batch.image_starts[:, None] + torch.arange(image.tokens)).flatten()
        assert torch.equal(places, (batch.token_ids == open_tokenizer(settings).image_id).nonzero().flatten())
        assert not batch.loss_mask[places - 1].any()
        tile = 0
        for sequence in sequences:
            index = plan.indexes[sequence.source]
            for sample in sequence.window.sample[sequence.first : sequence.last].tolist():
                for number, count in enumerate(document_images(index, sample, image).tiles.tolist()):
                    opened = Image.open(io.BytesIO(index.image(sample, number)))
                    expected = cut_sub_images(opened, sub_images, image.transform, wanted=range(count), count=count)
                    assert (batch.pixels[tile : tile + count].numpy() == expected).all()
                    tile += count
                    seen[count] += 1
        assert tile == batch.num_images
    assert set(seen) == {1, 5} and min(seen.values()) > 2


def test_the_tensor_ranks_share_the_sub_images(demo_data: Path) -> None:
    settings = settings_on(demo_data)
    whole = load(settings)
    parts = [load(settings, replace(ALONE, tensor_size=3, tensor_rank=rank)) for rank in range(3)]
    for number, batch in enumerate(whole.micro_batches):
        for rank, part in enumerate(part.micro_batches[number] for part in parts):
            assert torch.equal(part.token_ids, batch.token_ids) and torch.equal(part.image_starts, batch.image_starts)
            assert batch.pixels is not None and part.pixels is not None
            assert torch.equal(part.pixels, batch.pixels[part.image_owners == rank])
            assert abs(int((part.image_owners == rank).sum()) - batch.num_images / 3) < 1


def test_each_sub_image_has_its_own_artefacts(demo_data: Path) -> None:
    image, data = image_input(settings_on(demo_data)), picture(size=(100, 50), form="PNG")
    decoder = TileDecoder(image, threads=1)
    wanted = EncodedTiles(data, width=100, height=50, tiles=range(5))
    clean = decoder.decode([wanted]).pixels
    poor, good = (decoder.decode([replace(wanted, qualities=(quality,) * 5)]).pixels for quality in (10, 100))
    mixed = decoder.decode([replace(wanted, tiles=range(1, 4), qualities=(10, 100, 10))]).pixels
    assert torch.equal(mixed, torch.stack([poor[1], good[2], poor[3]]))
    assert (poor.float() - clean.float()).abs().mean() > 1.3 * (good.float() - clean.float()).abs().mean()
    low = decoder.decode([replace(wanted, tiles=range(1), count=1), replace(wanted, data=b"x")])
    assert torch.equal(low.pixels[0], clean[0]) and low.ok.tolist() == [True, False] and len(low.pixels) == 6
    decoder.close()
