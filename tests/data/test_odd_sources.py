"""Sources in odd states: links, notes, folders without shards, pipes that a reader must not wait for, files that change during a read."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from support.data_files import picture, write_tar
from support.published_runs import lines, run

from megatron_mm.data.prepare.find import find_sources, shards_of
from megatron_mm.data.prepare.index import IndexOptions, prepare_index
from megatron_mm.data.prepare.published.losses import DamagedFile
from megatron_mm.data.prepare.published.records import iterate_records
from megatron_mm.data.prepare.row_files import write_row_file
from megatron_mm.data.prepare.samples import Losses, ShardRows
from megatron_mm.data.sources.index import open_index
from megatron_mm.data.sources.rows import ITEM, SAMPLE


def test_sources_and_shards_that_are_links(tmp_path: Path, demo_data: Path) -> None:
    """A linked source keeps its name, also in --index-dir; a shard that is read under another name is not a stray one."""
    data, tokenizer = tmp_path / "data", demo_data / "tokenizer.model"
    for name in ("one", "two"):
        write_tar(tmp_path / "disk" / name / "shards" / "0.tar", {"0.jpg": picture(), "0.txt": name.encode()})
        (data / "train").mkdir(parents=True, exist_ok=True)
        (data / "train" / name).symlink_to(tmp_path / "disk" / name / "shards")
    write_tar(data / "pool" / "7.tar", {"0.jpg": picture(), "0.txt": b"three"})
    (data / "train" / "three").mkdir()
    (data / "train" / "three" / "0.tar").symlink_to(data / "pool" / "7.tar")
    (data / "train" / "three" / "loop").symlink_to(data / "train" / "three")
    (data / "train" / "self").symlink_to("self")
    assert [source.name for source in find_sources(data)] == ["one", "three", "two"]
    prepare_index(data, tokenizer=tokenizer, options=IndexOptions(index_dir=tmp_path / "indexes"))
    prepare_index(data, tokenizer=tokenizer)
    for root in (data, tmp_path / "indexes"):
        assert [open_index(root / "train" / name).document(0) for name in ("one", "two", "three")] == [b"one", b"two", b"three"]
    (data / "train" / "three" / "1.tar").symlink_to("1.tar")
    with pytest.raises(ValueError, match=r"1.tar is a link to 1.tar, which does not exist"):
        find_sources(data)


def test_what_a_source_was_made_of_is_no_stray_shard(tmp_path: Path, demo_data: Path) -> None:
    made_of = lines(tmp_path / "texts.jsonl", [{"text": "a"}])
    run("text", made_of, tmp_path / "train" / "texts")
    assert [source.name for source in find_sources(tmp_path)] == ["texts"]
    lines(tmp_path / "other.jsonl", [{"text": "b"}])
    with pytest.raises(ValueError, match=r"other.jsonl is next to .* skip it with --ignore 'other.jsonl'"):
        find_sources(tmp_path)
    options = IndexOptions(ignore=("other*",))
    assert prepare_index(tmp_path, tokenizer=demo_data / "tokenizer.model", options=options).sources["train/texts"].samples == 1


def test_folders_without_shards_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("pairs", "index"):
        write_tar(tmp_path / "train" / name / "0.tar", {"0.jpg": picture(), "0.txt": b"text"})
    for name in ("web/1.tgz", "notes/README.md"):
        (tmp_path / "train" / name).parent.mkdir()
        (tmp_path / "train" / name).write_bytes(b"packed")
    assert [source.name for source in find_sources(tmp_path)] == ["index", "pairs"]
    assert "web has no .tar or .jsonl shards and is left out; 1.tgz can be made into shards" in caplog.text and "notes" not in caplog.text
    with pytest.raises(ValueError, match=r"1.tgz is a file, but must be a folder"):
        find_sources(tmp_path / "train" / "web" / "1.tgz")


@pytest.mark.timeout(60)
def test_nothing_waits_for_a_pipe(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(picture())
    for name in ("0.txt", "1.txt"):
        (folder / name).write_text("text")
    os.mkfifo(folder / "1.jpg")
    assert run("pairs", folder, tmp_path / "a", lose=0.5).rejected == {"image file cannot be read": 1}
    named = lines(tmp_path / "a.jsonl", [{"image": f"{n}.jpg", "text": "a"} for n in range(2)])
    assert run("pairs", named, tmp_path / "b", lose=0.5, images=str(folder)).rejected == {"image not found": 1}
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="it is not a file but a pipe or a device"):
        run("text", tmp_path / "b.jsonl", tmp_path / "c", lose=1.0)
    os.mkfifo(folder / "2.tar")
    with pytest.raises(ValueError, match=r"2.tar is not a file but a pipe or a device"):
        shards_of(folder)


def test_frames_without_contents_in_zstd(tmp_path: Path) -> None:
    """`pzstd` begins a file with such a frame; they also occur between frames."""
    skipped, path = b"\x5f\x2a\x4d\x18\x04\0\0\0abcd", tmp_path / "a.jsonl.zst"
    path.write_bytes(skipped + b"".join(zstandard.compress(json.dumps({"text": text}).encode() + b"\n") + skipped for text in "ab"))
    assert list(iterate_records(str(path))) == [{"text": "a"}, {"text": "b"}]
    path.write_bytes(skipped)
    assert list(iterate_records(str(path))) == []
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DamagedFile, match="cut off"):
        list(iterate_records(str(path)))


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DamagedFile, match="several columns named 'text'"):
        list(iterate_records(str(tmp_path / "a.parquet")))


def test_a_shard_that_is_written_to_while_it_is_read(tmp_path: Path) -> None:
    """Its rows are not stored: they would be taken for the rows of the new file."""
    import numpy as np

    shard = write_tar(tmp_path / "0.tar", {"0.txt": b"a"})
    before, rows = shard.stat(), ShardRows(np.zeros(0, SAMPLE), np.zeros(0, ITEM), Losses(rejected=Counter()))
    write_row_file(tmp_path / "a.rows", shard, rows, recipe="", before=before)
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(ValueError, match=r"0.tar changed while it was read: run this again when it is complete"):
        write_row_file(tmp_path / "b.rows", shard, rows, recipe="", before=before)
    assert not (tmp_path / "b.rows").exists()
