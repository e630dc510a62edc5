"""Images in tiles, from the plan to the pixels, and JPEG artefacts that are the same after a resume."""

from __future__ import annotations

import io
import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_files import ALONE, blank_ranges, experiment, picture

from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.load.loader import StepBatch
from megatron_mm.data.load.tile_decode import EncodedTiles, TileDecoder
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.packing import document_images, document_lengths, pack_window
from megatron_mm.data.plan.plan import tile_owners
from megatron_mm.data.plan.stream import document_tiles, samples_of
from megatron_mm.data.ranges import ranges
from megatron_mm.data.sources.index import ITEM, SAMPLE, SourceIndex, open_split
from megatron_mm.data.sources.shards import read_range
from megatron_mm.data.tiling import Tiling, cut_tiles, tile_counts
from megatron_mm.evaluation.captions import caption_tasks
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mm1.family import MM1Family
from megatron_mm.parallel.topology import Topology
from megatron_mm.run import data as pipeline
from megatron_mm.run.data import TrainingData, make_plan, open_tokenizer

TILED = ImageInput(
    size=64,
    fill=(120, 110, 100),
    tokens=4,
    token="<IMG_CONTEXT>",
    before=("<img>",),
    after=("</img>",),
    tiling=Tiling(min_tiles=1, max_tiles=4),
)


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MM1 with images written as in Mono-InternVL, at a small size."""

    class Tiled(MM1Family):
        special_tokens = ("<img>", "</img>", "<IMG_CONTEXT>")

        def image_input(self, model: MM1Config) -> ImageInput:
            return TILED

    monkeypatch.setattr(pipeline, "family_of", lambda model: Tiled())
    yield


def load(
    path: Path, topology: Topology = ALONE, *, steps: int = 1, split: str = "train", cursor: Any = None, **data: Any
) -> list[StepBatch]:
    settings = experiment(path, **data)
    loader = TrainingData(settings, topology, open_tokenizer(settings), split=split, cursor=cursor)
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def pixels_of(steps: list[StepBatch]) -> torch.Tensor:
    return torch.cat([batch.pixels for step in steps for batch in step.micro_batches if batch.pixels is not None])


# ---------------------------------------------------------------------------------------------------------------- packing


def sized_source(documents: list[list[int | tuple[int, int]]]) -> SourceIndex:
    """Return an index of documents, each a list of items: the number of tokens of a text, or the width and height of an image."""
    samples, items = np.zeros(len(documents), SAMPLE), np.zeros(sum(map(len, documents)), ITEM)
    first = 0
    for row, document in zip(samples, documents, strict=True):
        row["first_item"], row["num_items"] = first, len(document)
        for item, content in zip(items[first : first + len(document)], document, strict=True):
            if isinstance(content, tuple):
                item["is_image"], (item["width"], item["height"]) = 1, content
                row["num_images"] += 1
            else:
                item["tokens"] = content
                row["text_tokens"] += content
        first += len(document)
    return SourceIndex("made", "interleaved", Path("made"), ("0.tar",), "", {}, samples, items)


def test_ranges_one_after_another() -> None:
    assert ranges(np.array([5, 9, 20]), np.array([3, 0, 2])).tolist() == [5, 6, 7, 20, 21]
    assert ranges(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).tolist() == []


def test_places_of_tiled_images() -> None:
    """BOS, 3 tokens, an image of 2 tiles and a thumbnail (1 + 3 x 4 + 1 = 14), a small one (6), EOS."""
    index = sized_source([[3, (64, 32), (9, 9)], [5], [(32, 96), 2]])
    images = document_images(index, 0, TILED)
    assert images.starts.tolist() == [4, 18] and images.ends.tolist() == [18, 24] and images.tiles.tolist() == [3, 1]
    assert images.length == 25
    samples = np.array([2, 0, 1, 0])
    sized = samples_of(index, samples, TILED)
    assert (
        sized.num_tiles.tolist() == [4, 4, 0, 4] == [*document_tiles(index, slice(2, 3), TILED), *document_tiles(index, samples[1:], TILED)]
    )
    assert document_lengths(sized, TILED).tolist() == [2 + 2 + 2 + 16, 25, 7, 25]


def test_documents_are_never_cut_inside_an_image_and_limits_count_tiles() -> None:
    rng = np.random.default_rng(0)
    sides = (10, 30, 60, 130)
    documents: list[list[int | tuple[int, int]]] = [
        [
            (int(rng.choice(sides)), int(rng.choice(sides))) if rng.random() < 0.5 else int(rng.integers(1, 40))
            for _ in range(rng.integers(1, 9))
        ]
        for _ in range(300)
    ]
    index = sized_source(documents)
    window = pack_window(
        index, samples_of(index, np.arange(300), TILED), Limits(64, 7, max_images_per_document=2), TILED, seed=0, first_position=600
    )
    assert max(window.tokens) <= 64 and max(window.images_of) <= 7
    assert (window.position == 600 + window.sample).all()
    cut = 0
    for sample in range(300):
        images = document_images(index, sample, TILED)
        mine = window.sample == sample
        bounds = sorted(zip(window.begin[mine].tolist(), window.end[mine].tolist(), strict=True))
        assert bounds[0][0] == 0 and bounds[-1][1] == images.length and all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
        for begin, end in bounds:
            inside = (images.starts >= begin) & (images.starts < end)
            assert (images.ends[inside] <= end).all() and inside.sum() <= 2
            (held,) = window.images[mine & (window.begin == begin)]
            assert held == images.tiles[inside].sum() <= 7
        cut += len(bounds) > 1
    assert 50 < cut < 250


def test_an_image_that_could_be_too_large_is_an_error() -> None:
    index = sized_source([[5]])
    with pytest.raises(ValueError, match=r"an image of 5 tiles takes 22 tokens, more than data.sequence_length 21"):
        pack_window(index, samples_of(index, np.array([0]), TILED), Limits(21, 5), TILED, seed=0)
    with pytest.raises(ValueError, match=r"an image becomes up to 5 tiles, more than data.max_images_per_sequence 4: raise it"):
        pack_window(index, samples_of(index, np.array([0]), TILED), Limits(22, 4), TILED, seed=0)
    pack_window(index, samples_of(index, np.array([0]), TILED), Limits(22, 5), TILED, seed=0)


def test_owners_of_tiles_are_neighbours() -> None:
    assert tile_owners(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert tile_owners(0, 2).tolist() == [] and tile_owners(1, 4).tolist() == [0]
    for count, size in itertools.product(range(30), (1, 2, 4, 8)):
        shares = np.bincount(tile_owners(count, size), minlength=size)
        assert shares.max() - shares.min() <= 1


# --------------------------------------------------------------------------------------------------------------- decoding


def image_of(width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(picture(size=(width, height), form="PNG")))


def test_the_wanted_tiles_of_an_image() -> None:
    decoder = TileDecoder(TILED, threads=2)
    expected = cut_tiles(image_of(100, 50), TILED.tiling, TILED.size)  # type: ignore[arg-type]
    assert len(expected) == 3
    data = picture(size=(100, 50), form="PNG")
    whole = EncodedTiles(data, width=100, height=50, tiles=range(3))
    found = decoder.decode([whole, replace(whole, tiles=range(1, 2)), replace(whole, data=b"x", tiles=range(2)), whole])
    assert found.ok.tolist() == [True, True, False, True] and found.pixels.shape == (3 + 1 + 2 + 3, 3, 64, 64)
    assert (found.pixels[:3].numpy() == expected).all() and (found.pixels[6:].numpy() == expected).all()
    assert (found.pixels[3].numpy() == expected[1]).all()
    assert (found.pixels[4:6] == torch.tensor(TILED.fill)[:, None, None]).all()
    assert decoder.decode([]).pixels.shape == (0, 3, 64, 64)
    decoder.close()


def test_an_image_in_another_s_place_has_as_many_tiles() -> None:
    """For shuffled images, and images whose size has changed."""
    decoder = TileDecoder(TILED, threads=1)
    wanted = EncodedTiles(picture(size=(33, 90), form="PNG"), width=100, height=50, tiles=range(3))
    found = decoder.decode([wanted])
    squashed = image_of(33, 90).resize((100, 50), Image.Resampling.BICUBIC)
    assert found.ok.all() and (found.pixels.numpy() == cut_tiles(squashed, TILED.tiling, TILED.size)).all()  # type: ignore[arg-type]
    decoder.close()


def degraded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def test_artefacts_of_an_image_that_is_not_cut_come_before_it_is_resized() -> None:
    decoder = TileDecoder(replace(TILED, tiling=None), threads=1)
    wanted = EncodedTiles(picture(size=(100, 50), form="PNG"), width=100, height=50, tiles=range(1))
    clean, poor, good = (decoder.decode([replace(wanted, qualities=q)]).pixels.float() for q in ((), (10,), (100,)))
    expected = np.asarray(degraded(image_of(100, 50), 10).resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (poor[0].numpy() == expected).all()
    assert (poor - clean).abs().mean() > 1.3 * (good - clean).abs().mean()
    decoder.close()


def test_every_tile_has_its_own_artefacts_after_it_is_cut() -> None:
    """The order of Mono-InternVL's training: resize, cut, append the thumbnail, then compress each tile separately as JPEG."""
    decoder, qualities = TileDecoder(TILED, threads=1), (10, 80, 40)
    wanted = EncodedTiles(picture(size=(100, 50), form="PNG"), width=100, height=50, tiles=range(3), qualities=qualities)
    found = decoder.decode([wanted, replace(wanted, tiles=range(1, 3), qualities=qualities[1:])]).pixels
    clean = cut_tiles(image_of(100, 50), TILED.tiling, TILED.size)  # type: ignore[arg-type]
    expected = [np.asarray(degraded(Image.fromarray(t.transpose(1, 2, 0)), q)) for t, q in zip(clean, qualities, strict=True)]
    assert (found[:3].numpy() == np.stack(expected).transpose(0, 3, 1, 2)).all()
    assert torch.equal(found[3:], found[1:3])
    decoder.close()


# ----------------------------------------------------------------------------------------------------------------- loader


@pytest.mark.usefixtures("tiled")
def test_a_batch_of_tiled_images(demo_data: Path) -> None:
    """Every tile is an image of the batch, in its place and with its own pixels."""
    settings = experiment(demo_data)
    tokenizer, plan = open_tokenizer(settings), make_plan(settings, split="train")
    (step,) = load(demo_data)
    begin, end, place = (tokenizer.special_id(name) for name in ("<img>", "</img>", "<IMG_CONTEXT>"))
    counts, decoder = Counter[int](), TileDecoder(TILED, threads=1)
    assert step.plan.num_images == sum(batch.num_images for batch in step.micro_batches)
    for batch, sequences in zip(step.micro_batches, step.plan.micro_batches_of(0, 1), strict=True):
        ids, mask = batch.token_ids, batch.loss_mask
        assert int(batch.is_token.sum()) == sum(sequence.num_tokens for sequence in sequences)
        places = (batch.image_starts[:, None] + torch.arange(4)).flatten()
        assert torch.equal(places, (ids == place).nonzero().flatten())
        for start, (first, last) in zip(batch.image_starts.tolist(), batch.image_documents.tolist(), strict=True):
            assert first < start < last and batch.position_ids[first] == 0
        image_like = (ids.roll(-1) == begin) | (ids.roll(-1) == end) | (ids.roll(-1) == place)
        assert not mask[image_like].any()
        words = batch.is_token & (ids != tokenizer.eos_id) & ~image_like
        assert torch.equal(mask.bool(), words), "and every word counts"
        tile = 0
        for sequence in sequences:
            index = plan.indexes[sequence.source]
            for sample in sequence.window.sample[sequence.first : sequence.last].tolist():
                row = index.sample_rows[sample]
                items = index.item_rows[row["first_item"] : row["first_item"] + row["num_items"]]
                for item in items[items["is_image"] == 1]:
                    data = read_range(index.root / index.shards[int(row["shard"])], int(item["offset"]), int(item["size"]))
                    with Image.open(io.BytesIO(data)) as opened:
                        expected = cut_tiles(opened.convert("RGB"), TILED.tiling, TILED.size)  # type: ignore[arg-type]
                    assert batch.pixels is not None and (batch.pixels[tile : tile + len(expected)].numpy() == expected).all()
                    start = int(batch.image_starts[tile])
                    assert ids[start - 1] == begin and ids[start + 4 * len(expected)] == end
                    tile += len(expected)
                    counts[len(expected)] += 1
        assert tile == batch.num_images
    assert set(counts) == {1, 3, 4, 5} and min(counts.values()) > 1
    decoder.close()


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize(("images", "jpeg_quality"), [("true", None), ("true", (20, 90)), ("shuffled", None), ("blank", None)])
def test_the_tensor_ranks_share_the_tiles(demo_data: Path, images: str, jpeg_quality: tuple[int, int] | None) -> None:
    """Also the tiles of an image that two ranks share; shuffled and blank images take the same places, and a tile has the same artefacts on
    any rank."""
    data: dict[str, Any] = {"images": images, "mixture": {"pairs": 1.0}, "jpeg_quality": jpeg_quality}
    (whole,), (true,) = load(demo_data, **data), load(demo_data, mixture={"pairs": 1.0}, jpeg_quality=jpeg_quality)
    parts = [load(demo_data, replace(ALONE, tensor_size=3, tensor_rank=rank), **data)[0] for rank in range(3)]
    for number, batch in enumerate(whole.micro_batches):
        mine = [part.micro_batches[number] for part in parts]
        assert batch.pixels is not None and len(batch.pixels) == batch.num_images
        for rank, part in enumerate(mine):
            assert torch.equal(part.image_starts, batch.image_starts) and torch.equal(part.token_ids, batch.token_ids)
            assert part.pixels is not None and torch.equal(part.pixels, batch.pixels[part.image_owners == rank])
        assert torch.equal(batch.image_starts, true.micro_batches[number].image_starts)
    moved = (pixels_of([whole]) != pixels_of([true])).flatten(1).any(dim=1).float().mean()
    assert moved > 0.9 if images != "true" else moved == 0


@pytest.mark.usefixtures("tiled")
def test_a_bad_image_of_several_tiles_counts_once_over_all_processes(demo_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    (index,) = open_split(data, "train", sources=["pairs"])
    rows = index.item_rows[index.item_rows["is_image"] == 1]
    tiles = tile_counts(rows["width"], rows["height"], TILED.tiling, TILED.size)  # type: ignore[arg-type]
    blank_ranges(index.shard_of(0), [(int(row["offset"]), int(row["size"])) for row in rows[tiles > 3]])
    settings: dict[str, Any] = {"mixture": {"pairs": 1.0}, "max_bad_fraction": 1.0}
    (alone,) = load(data, **settings)
    parts = [load(data, replace(ALONE, tensor_size=5, tensor_rank=rank), **settings)[0] for rank in range(5)]
    assert sum(part.bad.get("pairs", 0) for part in parts) == alone.bad["pairs"] > 10
    blank = (pixels_of([alone]) == torch.tensor(TILED.fill, dtype=torch.uint8)[:, None, None]).flatten(1).all(dim=1)
    assert blank.sum() > 3 * alone.bad["pairs"]


@pytest.mark.usefixtures("tiled")
def test_a_middle_stage_knows_the_tiles_from_the_plan(demo_data: Path) -> None:
    (whole,) = load(demo_data)
    (middle,) = load(demo_data, replace(ALONE, pipeline_size=3, pipeline_rank=1))
    for batch, full in zip(middle.micro_batches, whole.micro_batches, strict=True):
        for name in PackedBatch.__dataclass_fields__:
            if name not in ("pixels", "token_ids", "labels", "max_seqlen") and getattr(full, name) is not None:
                assert torch.equal(getattr(batch, name), getattr(full, name)), name


@pytest.mark.usefixtures("tiled")
def test_captions_of_tiled_images(demo_data: Path) -> None:
    (index,) = open_split(demo_data, "heldout", sources=["pairs"])
    tokenizer = open_tokenizer(experiment(demo_data))
    lengths = set()
    for task in caption_tasks(index, tokenizer, TILED, count=12):
        prompt, tiles = task.prompt, len(task.prompt.pixels)
        assert prompt.image_starts == [2 + 4 * tile for tile in range(tiles)]
        assert prompt.ids == [tokenizer.bos_id, *TILED.ids(tokenizer.special_id, tiles=tiles)]
        assert (task.answered("x").image == prompt.pixels[-1].permute(1, 2, 0).numpy()).all()
        lengths.add(tiles)
    assert len(lengths) > 2


# ----------------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("fixture", [None, "tiled"])
def test_a_resume_sees_the_same_artefacts(demo_data: Path, fixture: str | None, request: pytest.FixtureRequest) -> None:
    if fixture:
        request.getfixturevalue(fixture)
    data: dict[str, Any] = {"jpeg_quality": (20, 90), "mixture": {"pairs": 0.5, "interleaved": 0.5}}
    straight = load(demo_data, steps=4, **data)
    later = load(demo_data, steps=2, cursor=straight[1].plan.next_state.to_dict(), **data)
    assert torch.equal(pixels_of(straight[2:]), pixels_of(later))
    clean = pixels_of(load(demo_data, steps=4, mixture=data["mixture"]))
    assert (clean != pixels_of(straight)).flatten(1).any(dim=1).float().mean() > 0.95


def test_artefacts_depend_on_the_place_in_the_stream_alone(demo_data: Path) -> None:
    """Not on batches, packing or processes; they differ in the next epoch, and with another seed."""

    def seen(seed: int = 1234, **changes: Any) -> dict[bytes, set[bytes]]:
        """Return the degraded versions of each clean picture in the first two epochs."""
        found: dict[bytes, set[bytes]] = {}
        settings = experiment(demo_data, mixture={"pairs": 1.0}, jpeg_quality=(5, 95))
        window = changes.pop("packing_window", 60)
        settings = replace(
            settings, train=replace(settings.train, seed=seed, **changes), data=replace(settings.data, packing_window=window)
        )
        clean = replace(settings, data=replace(settings.data, jpeg_quality=None))
        loaders = [TrainingData(one, ALONE, open_tokenizer(one)) for one in (settings, clean)]
        steps, pictures = [], 0
        while pictures < 240:
            steps.append([next(loader) for loader in loaders])
            pictures += steps[-1][0].plan.num_images
        for loader in loaders:
            loader.close()
        pairs = [(a, b) for degraded, plain in steps for a, b in zip(pixels_of([degraded]), pixels_of([plain]), strict=True)]
        assert len(pairs) == 240, "two whole epochs"
        for degraded, plain in pairs:
            found.setdefault(plain.numpy().tobytes(), set()).add(degraded.numpy().tobytes())
        return found

    base = seen(global_batch_size=1, micro_batch_size=1)
    assert seen(global_batch_size=1, micro_batch_size=1, packing_window=120) == base
    twice = [len(views) for views in base.values()]
    assert np.mean(twice) > 1.5, "another quality in the second epoch"
    assert seen(seed=7, global_batch_size=1, micro_batch_size=1) != base


def test_held_out_images_are_not_augmented(demo_data: Path) -> None:
    plain = load(demo_data, split="heldout")
    assert torch.equal(pixels_of(load(demo_data, split="heldout", jpeg_quality=(1, 5))), pixels_of(plain))
    assert not torch.equal(pixels_of(load(demo_data, jpeg_quality=(1, 5))), pixels_of(load(demo_data)))


@pytest.mark.parametrize("quality", [(90, 75), (-1, 5), (75, 101)])
def test_impossible_qualities_are_refused(demo_data: Path, quality: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"data.jpeg_quality is -?\d+ \d+, but must be two numbers from 0 to 100"):
        experiment(demo_data, jpeg_quality=quality)
