"""From an experiment to batches: errors in the data path are reported before anything starts."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from support.data_files import ALONE, experiment

from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.mm1.family import MM1Family
from megatron_mm.run import data as pipeline
from megatron_mm.run.data import TrainingData, make_plan, open_tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nowhere", r"data.path .*nowhere is not a directory: use --data.path DIR"),
        (lambda path: path, r"has no folder 'train'; it has \[\]"),
        (lambda path: (path / "train").mkdir() or path, r"train lacks the sources \['interleaved', 'pairs', 'text'\] .* it has \[\]"),
    ],
)
def test_a_missing_or_empty_data_path_is_named(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_plan(experiment(make(tmp_path)), split="train")
    assert "\n" not in str(caught.value)


def test_a_source_that_was_not_indexed_is_named(demo_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    shutil.rmtree(data / "train" / "text" / "index")
    with pytest.raises(ValueError, match=r"text has no index: run `megatron-mm prepare index .*data` first"):
        make_plan(experiment(data), split="train")


def test_a_missing_tokenizer_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer.model does not exist: train one with .* or give --data.tokenizer FILE"):
        open_tokenizer(experiment(tmp_path))
    with pytest.raises(ValueError, match=r"tokenizer /nope.model does not exist: give another file as --data.tokenizer, or leave it out"):
        open_tokenizer(experiment(tmp_path, tokenizer=Path("/nope.model")))


def test_sources_without_weight_need_not_be_there(demo_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    shutil.rmtree(data / "train" / "text")
    plan = make_plan(experiment(data, mixture={"interleaved": 1.0, "pairs": 3.0, "text": 0.0}), split="train")
    batch = plan.batch(plan.initial_state())
    counts = [sum(sequence.source == source for sequence in batch.sequences) for source in range(2)]
    assert [index.name for index in plan.indexes] == ["interleaved", "pairs"]
    assert counts == [plan.global_batch_size // 4, plan.global_batch_size * 3 // 4]


def test_the_splits_are_planned_apart_and_described(demo_data: Path) -> None:
    train, heldout = (make_plan(experiment(demo_data), split=split) for split in ("train", "heldout"))
    assert [len(index) for index in train.indexes] == [96, 120, 24] and all(len(index) < 25 for index in heldout.indexes)
    lines = list(train.describe(train.batch(train.initial_state())))
    assert lines[0].startswith("  16 sequences, ") and "% full, 4 micro-batches" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["interleaved", "pairs", "text"]


def test_an_error_in_the_start_leaves_no_threads(demo_data: Path, tmp_path: Path) -> None:
    settings = experiment(demo_data)
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="has no folder"):
        TrainingData(settings, ALONE, Tokenizer.open(settings.data.tokenizer_path), split="validation")
    assert set(threading.enumerate()) == before


def test_the_cursor_is_of_the_batches_handed_out(demo_data: Path) -> None:
    """It does not include the batches that have been read ahead."""
    settings = experiment(demo_data)
    data = TrainingData(settings, ALONE, Tokenizer.open(settings.data.tokenizer_path))
    try:
        assert sum(data.cursor["drawn"]) == 0
        for step in (1, 2, 3):
            batch = next(data)
            assert data.cursor == batch.plan.next_state.to_dict()
            assert sum(data.cursor["drawn"]) == step * settings.train.global_batch_size
    finally:
        data.close()


def test_the_tokenizer_has_the_family_s_special_tokens(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = experiment(demo_data)
    assert open_tokenizer(settings).vocab_size == Tokenizer.open(settings.data.tokenizer_path).vocab_size

    class OfInfiMM(MM1Family):
        special_tokens = ("<|endofchunk|>", "<image>")

    monkeypatch.setattr(pipeline, "family_of", lambda model: OfInfiMM())
    tokenizer = open_tokenizer(settings)
    assert tokenizer.special_id("<|endofchunk|>") == tokenizer.vocab_size - 1
    assert tokenizer.image_id < tokenizer.vocab_size - 1, "the demo's model has <image> already"


def test_a_limit_on_a_document_s_images_reaches_the_plan(demo_data: Path) -> None:
    plan = make_plan(experiment(demo_data, max_images_per_document=1, mixture={"interleaved": 1.0}), split="train")
    window = plan.batch(plan.initial_state()).sequences[0].window
    assert window.images.max() == 1 and len(window.sample) > len(set(window.sample.tolist()))
