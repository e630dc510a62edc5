"""The loader: batches are as documented, each process gets its own part, and data that goes bad during a run is handled."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_files import ALONE, blank_ranges, experiment, rot

from megatron_mm.config import ParallelConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.load.loader import StepBatch
from megatron_mm.data.plan.plan import GlobalBatch, Plan, PlanState
from megatron_mm.data.sources.index import open_split
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.parallel.topology import Topology
from megatron_mm.run.data import TrainingData


def load(path: Path, topology: Topology = ALONE, *, steps: int = 1, parallel: ParallelConfig | None = None, **data: Any) -> list[StepBatch]:
    settings = experiment(path, **data)
    if parallel is not None:
        settings = replace(settings, parallel=parallel)
    loader = TrainingData(settings, topology, Tokenizer.open(settings.data.tokenizer_path))
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def same(one: PackedBatch, other: PackedBatch, *, leave_out: tuple[str, ...] = ()) -> bool:
    for name in PackedBatch.__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        if name not in leave_out and not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return True


def test_a_batch_is_as_documented(demo_data: Path) -> None:
    tokenizer = Tokenizer.open(demo_data / "tokenizer.model")
    (step,) = load(demo_data)
    assert len(step.micro_batches) == 4
    for batch in step.micro_batches:
        ids, bounds = batch.token_ids, batch.cu_seqlens.tolist()
        assert batch.num_tokens == batch.is_token.sum() <= 4 * 256 and bounds[0] == 0 and bounds[-1] == batch.num_tokens
        assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
        for begin, end in itertools.pairwise(bounds):
            assert batch.position_ids[begin:end].tolist() == list(range(end - begin))
            assert batch.loss_mask[end - 1] == 0, "the last token of a document has nothing to predict"
            if ids[begin] == tokenizer.pad_id:
                assert not batch.loss_mask[begin:end].any()
        assert torch.equal(batch.is_token, ids != tokenizer.pad_id)
        counted = batch.loss_mask.bool()
        assert torch.equal(batch.labels[counted], ids.roll(-1)[counted])
        assert not (batch.labels[counted] == tokenizer.image_id).any()
        assert (batch.labels[~counted] == tokenizer.pad_id).all()
        places = (batch.image_starts[:, None] + torch.arange(16)).flatten()
        assert torch.equal(places, (ids == tokenizer.image_id).nonzero().flatten())
        assert batch.pixels is not None and batch.pixels.shape == (batch.num_images, 3, 32, 32) and batch.pixels.dtype == torch.uint8
        next_tokens = (ids != tokenizer.pad_id) & (ids != tokenizer.eos_id) & (ids.roll(-1) != tokenizer.image_id)
        assert torch.equal(counted, next_tokens), "every word counts once"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "cea4f85f6c157f02"),
        ({"sequence_length": 48, "max_images_per_sequence": 2, "mixture": {"interleaved": 0.5, "pairs": 0.5}}, "2613e6f941b752b2"),
    ],
    ids=["whole", "cut"],
)
def test_runs_of_earlier_versions_go_on_with_the_same_batches(demo_data: Path, data: dict[str, Any], expected: str) -> None:
    """The hashes cover the documents of each global batch, as of the version before padding was left out. A change of them changes what a
    resumed run trains on and must be labelled so in the changelog. (They also depend on the tokenizer, hence on sentencepiece's
    training.)"""
    names = ("token_ids", "labels", "loss_mask", "position_ids", "source_ids")
    digest = hashlib.sha256()
    for step in load(demo_data, steps=3, **data):
        documents = []
        for batch in step.micro_batches:
            for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
                if batch.is_token[begin]:
                    images = batch.image_starts[(batch.image_starts >= begin) & (batch.image_starts < end)] - begin
                    parts = [*(getattr(batch, name)[begin:end] for name in names), images]
                    documents.append(b"".join(part.numpy().tobytes() for part in parts))
        digest.update(b"".join(sorted(documents)))
    assert digest.hexdigest()[:16] == expected


def test_every_image_knows_its_document(demo_data: Path) -> None:
    (step,) = load(demo_data)
    for batch in step.micro_batches:
        bounds = list(itertools.pairwise(batch.cu_seqlens.tolist()))
        for start, document in zip(batch.image_starts.tolist(), batch.image_documents.tolist(), strict=True):
            assert tuple(document) in bounds and document[0] <= start < document[1]


def test_captions_belong_to_their_pictures(demo_data: Path) -> None:
    """Pictures of a single square have the colour that their caption names."""
    tokenizer = Tokenizer.open(demo_data / "tokenizer.model")
    (step,) = load(demo_data, mixture={"pairs": 1.0})
    found = 0
    for batch in step.micro_batches:
        assert batch.pixels is not None
        bounds = batch.cu_seqlens.tolist()
        begins = {begin: end for begin, end in itertools.pairwise(bounds)}
        for number, start in enumerate(batch.image_starts.tolist()):
            text = tokenizer.decode(batch.token_ids[start + 16 : begins[start - 1] - 1].tolist())
            if text.startswith(("a red square", "a blue square")) and len(text.split()) == 3:
                red, _, blue = batch.pixels[number, :, 16, 16].tolist()
                assert (red > blue) == ("red" in text), text
                found += 1
    assert found > 3


def test_every_process_gets_its_part(demo_data: Path) -> None:
    (whole,) = load(demo_data)
    parts = {}
    for data_rank in range(2):
        for tensor_rank in range(2):
            topology = replace(ALONE, tensor_size=2, data_size=2, tensor_rank=tensor_rank, data_rank=data_rank, world_size=4)
            (parts[data_rank, tensor_rank],) = load(demo_data, topology)
    for data_rank in range(2):
        first, second = parts[data_rank, 0].micro_batches, parts[data_rank, 1].micro_batches
        assert len(first) == 2
        for a, b in zip(first, second, strict=True):
            assert same(a, b, leave_out=("pixels",))
            (match,) = [batch for batch in whole.micro_batches if torch.equal(batch.token_ids, a.token_ids)]
            assert a.pixels is not None and b.pixels is not None and match.pixels is not None
            assert torch.equal(a.pixels, match.pixels[a.image_owners == 0]) and torch.equal(b.pixels, match.pixels[a.image_owners == 1])


def test_pipeline_ranks_share_the_images_of_a_step(demo_data: Path) -> None:
    """Every image is decoded by one process, the counts of all ranks differ by at most one, and all know every image's rank."""
    (whole,) = load(demo_data)
    parts: list[StepBatch] = []
    for rank in range(3):
        here = replace(ALONE, pipeline_size=3, pipeline_rank=rank, world_size=3)
        (part,) = load(demo_data, here, parallel=ParallelConfig(pipeline=3, spread_encoder=True))
        parts.append(part)
    totals = [sum(len(batch.pixels) for batch in part.micro_batches if batch.pixels is not None) for part in parts]
    assert max(totals) - min(totals) <= 1 and sum(totals) == sum(batch.num_images for batch in whole.micro_batches)
    for full, *own in zip(whole.micro_batches, *(part.micro_batches for part in parts), strict=True):
        for rank, batch in enumerate(own):
            assert batch.image_stages is not None and batch.pixels is not None and full.pixels is not None
            assert torch.equal(batch.image_stages, own[0].image_stages)
            assert torch.equal(batch.pixels, full.pixels[batch.image_stages == rank])


def test_a_middle_stage_reads_nothing_and_knows_the_integers(demo_data: Path, tmp_path: Path) -> None:
    (whole,) = load(demo_data)
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    for tar in data.glob("train/*/*.tar"):
        rot(tar, bytes(tar.stat().st_size))
    middle = replace(ALONE, pipeline_size=3, pipeline_rank=1)
    (step,) = load(data, middle)
    assert not step.bad
    for batch, full in zip(step.micro_batches, whole.micro_batches, strict=True):
        assert batch.pixels is None
        assert same(batch, full, leave_out=("pixels", "token_ids", "labels"))


def test_a_resume_continues_with_the_next_batch(demo_data: Path) -> None:
    straight = load(demo_data, steps=5)
    settings = experiment(demo_data)
    tokenizer = Tokenizer.open(settings.data.tokenizer_path)
    first = TrainingData(settings, ALONE, tokenizer)
    for _ in range(2):
        next(first)
    cursor = first.cursor  # although later batches have already been read ahead
    first.close()
    second = TrainingData(settings, ALONE, tokenizer, cursor=cursor)
    for expected in straight[2:]:
        assert all(same(a, b) for a, b in zip(next(second).micro_batches, expected.micro_batches, strict=True))
    second.close()


def test_shuffled_images_are_those_of_other_samples_and_blank_ones_are_blank(demo_data: Path) -> None:
    (true,), (shuffled,), (blank,) = (load(demo_data, images=images) for images in ("true", "shuffled", "blank"))
    pixels = {name: torch.cat([b.pixels for b in step.micro_batches]) for name, step in (("t", true), ("s", shuffled), ("b", blank))}
    assert pixels["t"].shape == pixels["s"].shape == pixels["b"].shape
    moved = (pixels["t"] != pixels["s"]).flatten(1).any(dim=1)
    assert moved.float().mean() > 0.95
    as_bytes = {name: {image.numpy().tobytes() for image in pixels[name]} for name in "ts"}
    assert as_bytes["t"] == as_bytes["s"], "the same pictures, elsewhere"
    assert (pixels["b"] == pixels["b"][0, :, :1, :1]).all()
    for a, b in zip(true.micro_batches, shuffled.micro_batches, strict=True):
        assert same(a, b, leave_out=("pixels",))


def _damage_images(data: Path, count: int) -> None:
    (index,) = open_split(data, "train", sources=["pairs"])
    images = index.item_rows[index.item_rows["is_image"] == 1]
    blank_ranges(index.shard_of(0), [(int(row["offset"]), int(row["size"])) for row in images[:count]])


def test_an_image_that_went_bad_is_replaced_and_counted(demo_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    _damage_images(data, 2)
    steps = load(data, steps=2, mixture={"pairs": 1.0}, max_bad_fraction=0.5)
    bad = sum(step.bad.get("pairs", 0) for step in steps)
    assert bad >= 2 and f"in sample 0 of {'pairs'}" in caplog.text
    fill = torch.tensor([122, 117, 104], dtype=torch.uint8)
    pixels = torch.cat([batch.pixels for step in steps for batch in step.micro_batches])
    assert int((pixels.float() - fill.view(3, 1, 1).float()).abs().amax(dim=(1, 2, 3)).le(2).sum()) == bad


def test_too_many_bad_samples_stop_the_run_by_name(demo_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    _damage_images(data, 60)
    with pytest.raises(ValueError, match=r"of \d+ images of source pairs failed, more than data.max_bad_fraction 0.01"):
        load(data, steps=6, mixture={"pairs": 1.0})


def _replace_line(data: Path, line: bytes) -> int:
    """Overwrite the first text with `line`, padded; return the number of tokens that the text had when it was indexed."""
    path = data / "train" / "text" / "00000.jsonl"
    content = path.read_bytes()
    length = content.index(b"\n")
    rot(path, line.ljust(length)[:length] + content[length:])
    return int(open_split(data, "train", sources=["text"])[0].sample_rows["text_tokens"][0])


@pytest.mark.parametrize(
    "line", [b"\xff" * 9999, b'{"text": "a', b'{"text": "red"}', b"[]"], ids=["bytes", "cut", "another text", "no object"]
)
def test_a_text_that_went_bad_costs_itself_alone(demo_data: Path, tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    indexed = _replace_line(data, line)
    (good,) = load(demo_data, mixture={"text": 1.0})
    (step,) = load(data, mixture={"text": 1.0}, max_bad_fraction=0.5)
    times = step.bad["text"]  # a global batch has several epochs of the few texts
    assert "unusable text in sample 0 of text" in caplog.text
    lost = sum(int((a.loss_mask - b.loss_mask).sum()) for a, b in zip(good.micro_batches, step.micro_batches, strict=True))
    assert times > 0 and lost == times * (indexed + 1)  # its tokens and EOS
    for batch in step.micro_batches:
        assert (batch.labels[batch.loss_mask == 0] == Tokenizer.open(data / "tokenizer.model").pad_id).all()


def test_too_many_bad_texts_stop_the_run_by_name(demo_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    path = data / "train" / "text" / "00000.jsonl"
    rot(path, path.read_bytes().replace(b"text", b"tixt"))
    with pytest.raises(ValueError, match=r"(\d+) of \1 texts of source text failed, more than data.max_bad_fraction 0.01"):
        load(data, steps=8, mixture={"text": 1.0})


def test_a_shard_that_is_gone_is_counted_until_the_run_stops(demo_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    settings = experiment(data, mixture={"pairs": 1.0}, prefetch_steps=1)
    loader = TrainingData(settings, ALONE, Tokenizer.open(settings.data.tokenizer_path))
    try:
        (data / "train" / "pairs" / "00000.tar").write_bytes(b"")
        with pytest.raises(ValueError, match=r"of source pairs failed, more than data.max_bad_fraction"):
            for _ in range(20):
                next(loader)
        with pytest.raises(ValueError, match=r"of source pairs failed"):
            next(loader)  # raises again
    finally:
        loader.close()


@pytest.mark.parametrize("line", [None, b"{}"])
def test_every_bad_sample_counts_once_over_all_processes(demo_data: Path, tmp_path: Path, line: bytes | None) -> None:
    """Texts are read by both tensor ranks of both end stages, images by one process each."""
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    mixture = {"pairs": 1.0}
    if line is None:
        _damage_images(data, 1)
    else:
        _replace_line(data, line)
        mixture = {"text": 1.0}
    (alone,) = load(data, mixture=mixture, max_bad_fraction=1.0)
    total = 0
    for tensor_rank in range(2):
        for stage in range(3):
            topology = replace(ALONE, tensor_size=2, tensor_rank=tensor_rank, pipeline_size=3, pipeline_rank=stage)
            (step,) = load(data, topology, mixture=mixture, max_bad_fraction=1.0)
            total += sum(step.bad.values())
    assert total == sum(alone.bad.values()) > 0


def test_another_tokenizer_than_the_index_is_an_error(demo_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    from megatron_mm.data.text.tokenizer import train_tokenizer

    train_tokenizer([f"other words {n}" for n in range(50)], data / "tokenizer.model", vocab_size=290)
    with pytest.raises(ValueError, match=r"was indexed with tokenizer .* index it again"):
        load(data)


def test_closing_leaves_no_threads(demo_data: Path) -> None:
    before = set(threading.enumerate())
    load(demo_data, steps=1)
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not left


def test_batches_do_not_share_memory(demo_data: Path) -> None:
    one, two = load(demo_data, steps=2)
    before = two.micro_batches[0].token_ids.clone()
    one.micro_batches[0].token_ids.zero_()
    assert torch.equal(two.micro_batches[0].token_ids, before)


def test_batches_are_made_ahead_but_not_without_end(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prefetch_steps` wait in the queue, one waits to get in, and the next one is being read."""
    planned = []
    plan_batch = Plan.batch

    def counted(self: Plan, state: PlanState) -> GlobalBatch:
        planned.append(state)
        return plan_batch(self, state)

    monkeypatch.setattr(Plan, "batch", counted)
    settings = experiment(demo_data, prefetch_steps=2)
    loader = TrainingData(settings, ALONE, Tokenizer.open(settings.data.tokenizer_path))
    try:
        for taken in range(3):
            deadline = time.monotonic() + 20
            while len(planned) < taken + 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(planned) == taken + 4
            time.sleep(0.1)
            assert len(planned) == taken + 4
            next(loader)
    finally:
        loader.close()


@pytest.mark.parametrize("images", ["true", "blank"])
def test_closing_at_once_or_after_an_error_leaves_no_threads(demo_data: Path, tmp_path: Path, images: str) -> None:
    before = set(threading.enumerate())
    settings = experiment(demo_data, images=images)
    TrainingData(settings, ALONE, Tokenizer.open(settings.data.tokenizer_path)).close()
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    _damage_images(data, 100)
    with contextlib.suppress(ValueError):
        load(data, steps=4, images=images, mixture={"pairs": 1.0})
    assert set(threading.enumerate()) == before


def test_shuffled_images_that_are_bad_are_named_by_their_own_sample(
    demo_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    _damage_images(data, 1)
    steps = load(data, steps=2, images="shuffled", max_bad_fraction=1.0)
    named = {record.message for record in caplog.records if "undecodable" in record.message}
    assert sum(step.bad.get("pairs", 0) for step in steps) >= 1
    shard = data / "train" / "pairs" / "00000.tar"
    assert named == {f"undecodable image in sample 0 of pairs ({shard}): it is replaced with a blank one"}
