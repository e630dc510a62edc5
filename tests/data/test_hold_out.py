"""`--hold-out`: a fraction of the samples goes to the held-out split, chosen by contents, and is never in both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.data_files import picture
from support.published_runs import documents, indexed, lines, run, write_images

from megatron_mm.cli.main import main
from megatron_mm.data.prepare.published.hold_out import held_out_shards, is_held_out
from megatron_mm.data.prepare.published.layouts import OutSample


def texts_of(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for shard in sorted(folder.glob("*.jsonl")) for line in shard.read_text().splitlines()]


def write_texts(path: Path, numbers: range) -> Path:
    return lines(path, [{"text": f"text {number}"} for number in numbers])


def test_about_the_fraction_is_held_out_and_nothing_twice(tmp_path: Path) -> None:
    texts, out = write_texts(tmp_path / "in.jsonl", range(2000)), tmp_path / "data" / "train" / "c4"
    found = run("text", texts, out, hold_out=0.1)
    trained, held = texts_of(out), texts_of(tmp_path / "data" / "heldout" / "c4")
    assert sorted(trained + held) == sorted(f"text {number}" for number in range(2000)) and 150 < len(held) < 250
    assert (found.samples, found.held_out) == (2000, len(held))
    assert str(found).splitlines() == ["2,000 samples with 0 images in 2 shards", f"held out: {len(held)} of these samples"]


def test_samples_stay_on_their_side_if_the_input_grows(tmp_path: Path) -> None:
    for name, numbers in (("small", range(300)), ("large", range(100, 900))):
        run("text", write_texts(tmp_path / f"{name}.jsonl", numbers), tmp_path / "train" / name, hold_out=0.2)
    small, large = (set(texts_of(tmp_path / "heldout" / name)) for name in ("small", "large"))
    shared = {f"text {number}" for number in range(100, 300)}
    assert small & shared == large & shared != set()


def test_questions_about_an_image_stay_together() -> None:
    sides = set()
    for number in range(40):
        image = picture(size=(8 + number, 9))
        asked = [OutSample(f"question {question}".encode(), is_json=True, images=(("0.jpg", image),)) for question in range(3)]
        of_image = {is_held_out(sample, 0.5) for sample in asked}
        assert len(of_image) == 1
        sides |= of_image
    assert sides == {True, False}


def test_both_parts_are_indexed_and_a_second_call_makes_nothing_again(tmp_path: Path, demo_data: Path) -> None:
    records = [{"image": f"{number}.jpg", "caption": f"picture {number}"} for number in range(30)]
    images = write_images(tmp_path / "images", [f"{number}.jpg" for number in range(30)])
    pairs, out = lines(tmp_path / "pairs.jsonl", records), tmp_path / "data" / "train" / "laion"
    command = ["prepare", "pairs", str(pairs), "--out", str(out), "--images", str(images), "--hold-out", "0.3", "--workers", "1"]
    main(command)
    held = tmp_path / "data" / "heldout" / "laion"
    assert len(indexed(out, demo_data)) + len(indexed(held, demo_data)) == 30 and len(indexed(held, demo_data)) > 0
    written = {path: path.stat().st_mtime_ns for path in (*out.glob("*.tar"), *held.glob("*.tar"))}
    main(command)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    (shard,) = held.glob("*.tar")
    shard.unlink()
    main(command)
    assert shard.is_file()


def test_without_the_option_all_samples_are_trained_on_again(tmp_path: Path) -> None:
    texts, out = write_texts(tmp_path / "in.jsonl", range(100)), tmp_path / "train" / "c4"
    run("text", texts, out, hold_out=0.5)
    run("text", texts, out)
    assert len(texts_of(out)) == 100 and texts_of(tmp_path / "heldout" / "c4") == []


def test_an_interrupted_call_is_repeated(tmp_path: Path) -> None:
    """Its held-out shards are there, but the record of its work is not."""
    texts, out = write_texts(tmp_path / "in.jsonl", range(100)), tmp_path / "train" / "c4"
    run("text", texts, out, hold_out=0.5)
    held = texts_of(tmp_path / "heldout" / "c4")
    (out / ".prepared" / "00000.json").unlink()
    run("text", texts, out, hold_out=0.5)
    assert texts_of(tmp_path / "heldout" / "c4") == held and len(texts_of(out)) + len(held) == 100


def test_shards_of_others_are_left_alone(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "in.jsonl", range(100))
    run("text", texts, tmp_path / "heldout" / "c4")
    before = texts_of(tmp_path / "heldout" / "c4")
    with pytest.raises(ValueError, match=r"heldout/c4 has 1 shards that --hold-out did not write \(00000-00000.jsonl ...\): leave it out"):
        run("text", texts, tmp_path / "train" / "c4", hold_out=0.5)
    run("text", texts, tmp_path / "train" / "c4")
    assert texts_of(tmp_path / "heldout" / "c4") == before
    with pytest.raises(ValueError, match=r"--hold-out needs a source of a train split, but --out is .*: use --out DATA/train/NAME"):
        run("text", texts, tmp_path / "elsewhere", hold_out=0.5)


def test_conversions_of_before_the_option_are_not_made_again(tmp_path: Path) -> None:
    """The digest of an input's options is the one that it had."""
    texts, out = write_texts(tmp_path / "in.jsonl", range(10)), tmp_path / "train" / "c4"
    run("text", texts, out)
    record = json.loads((out / ".prepared" / "00000.json").read_text())
    del record["held_out"], record["held_out_shards"]
    (out / ".prepared" / "00000.json").write_text(json.dumps(record))
    (shard,) = out.glob("*.jsonl")
    before = shard.stat().st_mtime_ns
    assert run("text", texts, out).samples == 10 and shard.stat().st_mtime_ns == before
    assert documents(out) == []


def test_a_source_at_the_top_of_a_file_system_has_nothing_held_out() -> None:
    assert held_out_shards(Path("/out"), "00000") == []
