"""Reading tars as webdataset writes them, and byte ranges from many threads."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_mm.data.sources import shards
from megatron_mm.data.sources.shards import BrokenShard, TarWriter, iterate_jsonl, iterate_tar, read_range


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


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_with_folders_and_links(tmp_path: Path, form: int) -> None:
    path = tmp_path / "a.tar"
    long = "x" * (90 if form == tarfile.USTAR_FORMAT else 200)
    with tarfile.open(path, "w", format=form) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("folder/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        for info in (folder, link):
            archive.addfile(info)
        for name, data in ((f"folder/{long}.jpg", b"1" * 600), (f"folder/{long}.txt", b"two")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (sample,) = iterate_tar(path)
    assert sample.key == f"folder/{long}" and sorted(sample.members) == ["jpg", "txt"]
    for member in sample.members.values():
        assert read_range(path, member.offset, len(member.data)) == member.data


def test_a_key_that_comes_again_later_is_another_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"a.jpg": b"1", "b.jpg": b"2", "a.txt": b"3"})
    assert [(sample.key, list(sample.members)) for sample in iterate_tar(path)] == [("/a", ["jpg"]), ("/b", ["jpg"]), ("/a", ["txt"])]


@pytest.mark.parametrize(
    ("keep", "found", "message"),
    [
        (512 + 1024 + 512 + 300, 0, "ends without an end marker after byte 1536: it is truncated"),
        (512 + 1024 + 512 + 1024, 1, "ends without an end marker after byte 3072: it is truncated"),
        (512 + 1024 + 200, 0, "ends without an end marker after byte 1536: it is truncated"),
    ],
    ids=["in contents", "between files", "in a header"],
)
def test_a_truncated_tar_names_itself_and_the_byte(tmp_path: Path, keep: int, found: int, message: str) -> None:
    path = write(tmp_path / "a.tar", {"a.txt": b"a" * 1000, "b.txt": b"b" * 1000})
    path.write_bytes(path.read_bytes()[:keep])
    samples = []
    with pytest.raises(BrokenShard) as caught:
        for sample in iterate_tar(path):
            samples.append(sample)
    assert str(caught.value) == f"shard {path} {message}"
    assert len(samples) == found, "the last sample before the break may lack members, and is left out"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", ": it is empty"), (b"x" * 2000, ""), (gzip.compress(b"tar"), " but gzip: unpack it")],
    ids=["empty", "no tar", "gzip"],
)
def test_what_is_no_tar_is_broken(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(BrokenShard, match=f"{path} is not a tar{message}"):
        list(iterate_tar(path))


def test_a_shard_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456789")
    opened = []
    really_open = os.open

    def counted(*arguments: Any) -> int:
        opened.append(arguments[0])
        return really_open(*arguments)

    monkeypatch.setattr(os, "open", counted)
    assert [read_range(path, n, 2) for n in range(5)] == [b"01", b"12", b"23", b"34", b"45"]
    assert opened == [path]


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


def with_pax_header(path: Path, records: bytes, *, name: str = "x.txt", kind: bytes = tarfile.XHDTYPE) -> Path:
    """Write a tar of a.txt, of a file after an extension header of these bytes, and of z.txt."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, data in (("a.txt", b"first"), ("header", records), (name, b"7 bytes"), ("z.txt", b"last")):
            info = tarfile.TarInfo(member)
            info.size, info.type = len(data), kind if member == "header" else tarfile.REGTYPE
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "records",
    [b"14 path=y.txt ", b"99 path=y.txt\n", b"path=y.txt\n", b"14 size=+7777\n", b"12 size=7 8\n", b"33 size=999999999999999999999999\n"],
)
def test_a_malformed_pax_header_is_damage_and_its_file_gets_no_other_name(tmp_path: Path, records: bytes) -> None:
    path, skipped = with_pax_header(tmp_path / "a.tar", records), []
    found = [member.name for sample in iterate_tar(path, skipped=skipped.append) for member in sample.members.values()]
    assert found == ["z.txt"], "a.txt is next to the damage"
    assert [(what.reason, what.name, what.offset, what.size) for what in skipped[:1]] == [("damaged tar header", "x.txt", 1024, 1543)]


@pytest.mark.parametrize(
    "records", [b"14 path=y.txt\n\0\0", b"33 size=000000000000000000000007\n14 path=y.txt\n", b"8 size=\n14 path=y.txt\n"]
)
def test_unusual_pax_headers_are_read(tmp_path: Path, records: bytes) -> None:
    path = with_pax_header(tmp_path / "a.tar", records)
    assert {m.name: m.data for s in iterate_tar(path) for m in s.members.values()} == {
        "a.txt": b"first",
        "y.txt": b"7 bytes",
        "z.txt": b"last",
    }


def test_a_long_name_ends_at_its_first_zero_byte(tmp_path: Path) -> None:
    path = with_pax_header(tmp_path / "a.tar", b"y.txt\0rest.of/the.buffer\0", kind=tarfile.GNUTYPE_LONGNAME)
    assert [member.name for sample in iterate_tar(path) for member in sample.members.values()] == ["a.txt", "y.txt", "z.txt"]


@pytest.mark.parametrize(("end", "found"), [(b"", 1), (b"\n", 1), (b"x", 0), (b"x\n", 0)])
def test_a_line_of_exactly_the_limit_is_not_longer_than_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes, found: int) -> None:
    monkeypatch.setattr(shards, "MAX_FILE_BYTES", 12)
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"1"}' + end)
    skipped: list[Any] = []
    assert len(list(iterate_jsonl(tmp_path / "a.jsonl", skipped=skipped.append))) == found and len(skipped) == 1 - found
