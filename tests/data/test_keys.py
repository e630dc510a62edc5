"""Fields and files with unusual names, read in place: `prepare index --text-key --image-key --messages-key`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.data_files import picture, write_tar

from megatron_mm.cli import main as cli
from megatron_mm.data.prepare.index import IndexOptions, prepare_index
from megatron_mm.data.prepare.tokenizer import prepare_tokenizer
from megatron_mm.data.sources.index import SourceIndex, open_index
from megatron_mm.data.text.documents import read_items
from megatron_mm.data.text.items import ImageReference, Text
from megatron_mm.data.text.keys import Keys


def indexed(source: Path, demo_data: Path, **options: Any) -> SourceIndex:
    prepare_index(source, tokenizer=demo_data / "tokenizer.model", options=IndexOptions(**options))
    return open_index(source)


def test_texts_under_another_name(tmp_path: Path, demo_data: Path) -> None:
    (tmp_path / "0.jsonl").write_text(json.dumps({"meta": {"raw": "a red circle"}, "text": "another"}) + "\n")
    assert read_items(indexed(tmp_path, demo_data, keys=Keys(text="meta.raw")), 0) == [Text("a red circle")]
    assert read_items(indexed(tmp_path, demo_data), 0) == [Text("another")], "and read again, as the name has changed"
    with pytest.raises(ValueError, match="JSON has no nothing"):
        indexed(tmp_path, demo_data, keys=Keys(text="nothing"))


@pytest.mark.parametrize(("text", "expected"), [("note.txt", "a red circle"), ("meta.caption", "two squares")])
def test_pairs_of_files_with_other_names(tmp_path: Path, demo_data: Path, text: str, expected: str) -> None:
    described = json.dumps({"meta": {"caption": "two squares"}}).encode()
    write_tar(
        tmp_path / "0.tar",
        {"7.photo.jpg": picture(size=(21, 30)), "7.mask.png": picture(form="PNG"), "7.note.txt": b"a red circle", "7.json": described},
    )
    index = indexed(tmp_path, demo_data, keys=Keys(text=text, image="photo.jpg"))
    assert index.kind == "pairs" and index.items(0).widths.tolist() == [21]
    assert read_items(index, 0) == [Text(expected)]


def test_names_of_files_are_no_keys_that_end_at_the_last_dot(tmp_path: Path, demo_data: Path) -> None:
    write_tar(tmp_path / "0.tar", {"7.photo.jpg": picture(), "7.note.txt": b"a red circle"})
    assert len(indexed(tmp_path, demo_data, keys=Keys(text="note.txt", image="photo.jpg"))) == 1


def test_conversations_and_documents_with_other_fields(tmp_path: Path, demo_data: Path) -> None:
    turns = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "a circle"}]
    write_tar(tmp_path / "chats" / "0.tar", {"1.0.jpg": picture(), "1.json": json.dumps({"dialog": turns, "pictures": ["0.jpg"]}).encode()})
    index = indexed(tmp_path / "chats", demo_data, keys=Keys(messages="dialog", image="pictures"))
    assert index.kind == "conversations" and index.items(0).num_images == 1
    lists = json.dumps({"sentences": ["a red circle", None], "pictures": [None, "0.jpg"]}).encode()
    write_tar(tmp_path / "documents" / "0.tar", {"1.0.jpg": picture(), "1.json": lists})
    index = indexed(tmp_path / "documents", demo_data, keys=Keys(text="sentences", image="pictures"))
    assert index.kind == "interleaved" and read_items(index, 0) == [Text("a red circle"), ImageReference("0.jpg")]


def test_the_command_line(tmp_path: Path, demo_data: Path) -> None:
    (tmp_path / "0.jsonl").write_text("".join(json.dumps({"content": f"a red circle {n}"}) + "\n" for n in range(50)))
    cli.main(["prepare", "index", str(tmp_path), "--tokenizer", str(demo_data / "tokenizer.model"), "--text-key", "content"])
    assert len(open_index(tmp_path)) == 50
    assert "fingerprint" in prepare_tokenizer(tmp_path, out=tmp_path / "t.model", vocab_size=300, keys=Keys(text="content"))


def test_a_key_twice_in_an_object_is_no_guess(tmp_path: Path, demo_data: Path) -> None:
    lines = ['{"text": "a circle", "text": "a square"}', '{"text": "a circle", "text": "a circle"}', '{"text": "a ball"}']
    (tmp_path / "0.jsonl").write_text("\n".join(lines))
    index = indexed(tmp_path, demo_data, max_rejected=0.5)
    assert len(index) == 2 and index.rejected == {"JSON has a duplicate key": 1}
