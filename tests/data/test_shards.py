"""Tars are read as webdataset writes them, and byte ranges by many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_mm.data import shards
from megatron_mm.data.shards import TarWriter, iterate_jsonl, iterate_tar, read_range


def write(path: Path, members: dict[str, bytes]) -> Path:
    tar = TarWriter(path)
    for name, data in members.items():
        tar.add(name, data)
    tar.close()
    return path


def test_the_key_ends_at_the_first_dot_of_the_last_part(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"d.1/x.JPG": b"1", "d.1/x.0.png": b"2", "d.1/x.json": b"3", "d.2/x.txt": b"4", "y.txt": b"5"})
    samples = list(iterate_tar(path))
    assert [sorted(sample.members) for sample in samples] == [["0.png", "jpg", "json"], ["txt"], ["txt"]]
    assert [sample.key for sample in samples] == ["d.1/x", "d.2/x", "/y"]


def test_offsets_lead_to_the_contents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {f"{n}.txt": bytes([n]) * (n * 300 + 1) for n in range(5)})
    for sample in iterate_tar(path):
        member = sample.members["txt"]
        assert read_range(path, member.offset, len(member.data)) == member.data


def test_lines_of_jsonl_are_found_by_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "zwei \xc3\xa4"}')
    lines = list(iterate_jsonl(path))
    assert [line.name for line in lines] == ["line 1", "line 3"]
    assert all(read_range(path, line.offset, len(line.data)) == line.data for line in lines)


def test_a_range_beyond_the_end_names_shard_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"0123456789")
    with pytest.raises(ValueError, match=f"{path} ends at byte 10, before the sample's last byte 15"):
        read_range(path, 5, 10)


def test_more_shards_than_open_files_and_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_FILES", 3)
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.bin")
        paths[-1].write_bytes(bytes([number]) * 1000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: read_range(paths[n % 20], n % 7, 500), range(2000)))
    assert all(data == bytes([n % 20]) * 500 for n, data in enumerate(found))
    assert len(shards._descriptors) <= 3


def test_the_same_contents_make_the_same_bytes(tmp_path: Path) -> None:
    members = {"a.txt": b"x", "b.jpg": b"y" * 2000}
    assert write(tmp_path / "a.tar", members).read_bytes() == write(tmp_path / "b.tar", members).read_bytes()
