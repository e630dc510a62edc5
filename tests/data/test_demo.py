"""The demo data is reproducible, has every format, fills its sequences, and has separate held-out scenes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from megatron_mm.data.prepare import demo
from megatron_mm.data.prepare.demo import COLOURS, SHAPES, draw_scene, prepare_demo
from megatron_mm.data.sources.index import open_split
from megatron_mm.data.sources.shards import iterate_jsonl, iterate_tar
from megatron_mm.families.recipes import get_recipe
from megatron_mm.run.data import make_plan


def test_demo_data_is_the_same_for_the_same_seed_and_has_every_format(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_demo(tmp_path / name, samples=60, seed=seed)
    shard = Path("train/pairs/00000.tar")
    contents = {name: (tmp_path / name / shard).read_bytes() for name in "abc"}
    assert contents["a"] == contents["b"] != contents["c"]
    assert all(extension.encode() in contents["a"] for extension in (".jpg", ".png", ".webp", ".txt", ".json"))
    held_out = (tmp_path / "a" / "heldout/pairs/00000.tar").read_bytes()
    assert held_out != contents["a"]
    for split in ("train", "heldout"):
        indexes = open_split(tmp_path / "a", split, sources=["pairs", "interleaved", "text"])
        assert all(not index.rejected for index in indexes)
        assert [bool(index.sample_rows["num_images"].sum()) for index in indexes] == [True, True, False]
    with pytest.raises(ValueError, match=r"already contains a data set"):
        prepare_demo(tmp_path / "a")
    with pytest.raises(ValueError, match=r"--samples is 39, but the tokenizer needs at least 40"):
        prepare_demo(tmp_path / "d", samples=39)


def test_the_first_sources_and_the_tokenizer_are_those_of_earlier_versions(demo_data: Path) -> None:
    """Texts are identical byte by byte, and so are the pictures' formats: drawing further sources changes neither."""
    digest = hashlib.sha256((demo_data / "tokenizer.model").read_bytes())
    for split in ("train", "heldout"):
        for name in ("pairs", "interleaved"):
            for sample in iterate_tar(demo_data / split / name / "00000.tar"):
                for extension in sorted(sample.members):
                    digest.update(extension.encode())
                    if extension in ("txt", "json"):
                        digest.update(sample.members[extension].data)
        digest.update((demo_data / split / "text" / "00000.jsonl").read_bytes())
    assert digest.hexdigest()[:16] == "eddb29b1b32472f2"


def test_conversations_and_tasks_are_about_their_pictures(demo_data: Path) -> None:
    indexes = open_split(demo_data, "train", sources=["conversations", "tasks"])
    assert [index.kind for index in indexes] == ["conversations", "tasks"] and not any(index.rejected for index in indexes)
    assert all((index.sample_rows["num_images"] == 1).all() and len(index) == 60 for index in indexes)
    turns, tasks, choices = Counter[int](), Counter[str](), Counter[bool]()
    for sample in iterate_tar(demo_data / "train" / "conversations" / "00000.tar"):
        turns[len(json.loads(sample.members["json"].data)["conversations"]) // 2] += 1
    for sample in iterate_tar(demo_data / "train" / "tasks" / "00000.tar"):
        fields = json.loads(sample.members["json"].data)
        tasks[fields["task"]] += 1
        if fields["task"] == "scienceqa":
            with Image.open(io.BytesIO(sample.members[fields["images"][0]].data)) as image:
                colours = image.convert("RGB").getcolors(1 << 16)
            shown = {min(COLOURS, key=lambda name: math.dist(COLOURS[name], colour)) for _, colour in sorted(colours)[-2:]}
            choices[fields["choices"][fields["answer"]] in shown] += 1
    assert set(turns) == {1, 2, 3} and set(tasks) == {"caption", "vqa", "vizwiz", "scienceqa"}
    assert choices[True] > 4 * choices[False], "the right choice is a colour of the picture"


def test_held_out_samples_are_not_training_samples(demo_data: Path) -> None:
    for name in ("pairs", "interleaved"):
        pictures = {
            split: {
                member.data
                for sample in iterate_tar(demo_data / split / name / "00000.tar")
                for extension, member in sample.members.items()
                if extension.endswith(("jpg", "png", "webp"))
            }
            for split in ("train", "heldout")
        }
        assert pictures["heldout"] and not pictures["train"] & pictures["heldout"]
    lines = {s: [line.data for line in iterate_jsonl(demo_data / s / "text" / "00000.jsonl")] for s in ("train", "heldout")}
    assert lines["train"] != lines["heldout"] and all("text" in json.loads(line) for line in lines["train"])


def test_captions_say_what_is_in_the_picture() -> None:
    """In a picture of a single shape, the centre pixel has the colour named in the caption; crosses and triangles cover it, too."""
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        scene = draw_scene(rng)
        words = scene.caption.split()
        if len(words) == 3 and words[2] in SHAPES:
            assert scene.image.getpixel((scene.image.width // 2, scene.image.height // 2)) == COLOURS[words[1]], scene.caption
            assert ("what colour?", words[1]) in scene.questions and ("what shape?", words[2]) in scene.questions
            found += 1
    assert found > 40


def test_pictures_differ_in_format_and_size(demo_data: Path) -> None:
    sizes, formats = set(), Counter[str]()
    for sample in iterate_tar(demo_data / "train" / "pairs" / "00000.tar"):
        (data,) = [member.data for extension, member in sample.members.items() if extension in ("jpg", "png", "webp")]
        with Image.open(io.BytesIO(data)) as image:
            sizes.add(image.size)
            formats[str(image.format)] += 1
    assert len(sizes) > 50 and set(formats) == {"JPEG", "PNG", "WEBP"} and min(formats.values()) > 10


def test_demo_data_is_packed_more_than_98_percent_full(tmp_path: Path) -> None:
    prepare_demo(tmp_path / "demo", samples=2000)
    base = get_recipe("debug_mm1")
    plan = make_plan(replace(base, data=replace(base.data, path=tmp_path / "demo")), split="train")
    state, used, room = plan.initial_state(), Counter[int](), Counter[int]()
    for _ in range(100):
        batch = plan.batch(state)
        state = batch.next_state
        for sequence in batch.sequences:
            used[sequence.source] += sequence.num_tokens
            room[sequence.source] += 256
    assert all(used[source] / room[source] > 0.98 for source in room), {s: used[s] / room[s] for s in room}


def test_the_same_command_makes_what_an_interrupted_one_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_demo(tmp_path / "whole", samples=40)
    with monkeypatch.context() as patch:
        patch.setattr(demo, "prepare_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_demo(tmp_path / "again", samples=600)
    assert (tmp_path / "again/train/pairs/00000.tar").exists()
    prepare_demo(tmp_path / "again", samples=40)
    files = [{path.relative_to(folder) for path in folder.rglob("*.tar")} for folder in (tmp_path / "whole", tmp_path / "again")]
    assert files[0] == files[1]
    shard = "train/pairs/00000.tar"
    assert (tmp_path / "again" / shard).read_bytes() == (tmp_path / "whole" / shard).read_bytes()
    with pytest.raises(ValueError, match=r"already contains a data set"):
        prepare_demo(tmp_path / "again", samples=40)


def interrupted(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt
