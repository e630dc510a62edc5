"""Indexing shard by shard: shards are not read twice, even after the process is killed, and different processes may read parts of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.data_files import bomb, picture, write_tar

from megatron_mm.data.prepare import shard_jobs
from megatron_mm.data.prepare.index import IndexOptions, prepare_index
from megatron_mm.data.prepare.row_files import read_header, row_file_of
from megatron_mm.data.prepare.shard_jobs import choose_shards
from megatron_mm.data.sources.index import open_index


@pytest.fixture
def tokenizer(demo_data: Path) -> Path:
    return demo_data / "tokenizer.model"


def write_shards(source: Path, count: int, *, samples: int = 3) -> list[Path]:
    """Write shards of pairs, all different."""
    return [
        write_tar(
            source / f"{number:03d}.tar",
            {
                f"{n}.{e}": d
                for n in range(samples)
                for e, d in (("png", picture(form="PNG", size=(9 + number, 9 + n))), ("txt", b"a circle"))
            },
        )
        for number in range(count)
    ]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that have been read."""
    names: list[str] = []
    original = shard_jobs._read
    monkeypatch.setattr(shard_jobs, "_read", lambda job: (names.append(job.shard.name), original(job))[1])
    return names


def index_of(source: Path) -> tuple[bytes, ...]:
    """Return the whole content of an index."""
    index = open_index(source)
    return (*(array.tobytes() for array in (index.sample_rows, index.item_rows, index.size_rows)), str(list(index.shards)).encode())


def test_only_new_and_changed_shards_are_read(tmp_path: Path, tokenizer: Path, reads: list[str]) -> None:
    source = tmp_path / "pairs"
    shards = write_shards(source, 4)
    prepare_index(tmp_path, tokenizer=tokenizer)
    assert reads == ["000.tar", "001.tar", "002.tar", "003.tar"]
    reads.clear()
    os.utime(shards[1])  # a new modification time, but the same content
    write_shards(source, 5)[4].rename(source / "0005.tar")  # same bytes again, and a new one between two others
    shards[2].write_bytes(write_tar(tmp_path / "other.tar", {"7.png": picture(form="PNG"), "7.txt": b"another"}).read_bytes())
    prepare_index(tmp_path / "pairs", tokenizer=tokenizer)
    assert sorted(reads) == ["0005.tar", "002.tar"]
    as_new = index_of(source)
    for path in (source / "index").rglob("*.rows"):
        path.unlink()
    prepare_index(tmp_path / "pairs", tokenizer=tokenizer)
    assert index_of(source) == as_new and len(reads) == 7
    reads.clear()
    shards[3].unlink()
    prepare_index(tmp_path / "pairs", tokenizer=tokenizer)
    assert reads == [] and len(open_index(source)) == 10


@pytest.mark.parametrize("options", [IndexOptions(caption_prompt="what is it?"), IndexOptions(kind="text")])
def test_shards_are_read_again_where_they_would_be_read_otherwise(
    tmp_path: Path, tokenizer: Path, reads: list[str], options: IndexOptions
) -> None:
    write_shards(tmp_path / "pairs", 2)
    prepare_index(tmp_path, tokenizer=tokenizer)
    prepare_index(tmp_path, tokenizer=tokenizer, options=options)
    assert len(reads) == 4
    prepare_index(tmp_path, tokenizer=tokenizer, options=options)
    assert len(reads) == 4


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"{}\n", lambda data: data[10:]])
def test_a_damaged_row_file_is_written_again(tmp_path: Path, tokenizer: Path, reads: list[str], damage: object) -> None:
    (shard,) = write_shards(tmp_path / "pairs", 1)
    prepare_index(tmp_path, tokenizer=tokenizer)
    path = row_file_of(tmp_path / "pairs", shard)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    prepare_index(tmp_path, tokenizer=tokenizer)
    assert len(reads) == 2 and len(open_index(tmp_path / "pairs")) == 3


def test_flipped_bits_of_a_row_file_are_an_error(tmp_path: Path, tokenizer: Path) -> None:
    (shard,) = write_shards(tmp_path / "pairs", 1)
    prepare_index(tmp_path, tokenizer=tokenizer)
    path = row_file_of(tmp_path / "pairs", shard)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"000.tar.rows is damaged: remove it"):
        prepare_index(tmp_path, tokenizer=tokenizer)


def test_parts_of_the_shards_are_merged_into_the_same_index(tmp_path: Path, tokenizer: Path, reads: list[str]) -> None:
    source = tmp_path / "pairs"
    write_shards(source, 7)
    prepare_index(tmp_path, tokenizer=tokenizer)
    whole = index_of(source)
    for path in (source / "index").rglob("*"):
        if path.is_file():
            path.unlink()
    reads.clear()
    for part in ("0/3", "2/3"):
        prepare_index(tmp_path, tokenizer=tokenizer, shards=part)
    assert not (source / "index" / "meta.json").exists()
    with pytest.raises(ValueError, match=r"shard 002.tar of source .* has not been read: run `megatron-mm prepare index` on it first"):
        prepare_index(tmp_path, tokenizer=tokenizer, merge_only=True)
    prepare_index(tmp_path, tokenizer=tokenizer, shards="2-3")
    prepare_index(tmp_path, tokenizer=tokenizer, merge_only=True)
    assert index_of(source) == whole and sorted(reads) == [f"{n:03d}.tar" for n in range(7)]


def test_shards_are_chosen_by_numbers_or_parts() -> None:
    assert sorted(n for part in range(7) for n in choose_shards(f"{part}/7", 100)) == list(range(100))
    assert choose_shards("5-5", 100) == range(5, 6) and [len(choose_shards(f"{part}/8", 2)) for part in range(8)].count(1) == 2
    for text in ("5", "9-3", "7/7", "a-b", "1/0", "-1-3"):
        with pytest.raises(ValueError, match=f"--shards {text}"):
            choose_shards(text, 100)


def test_shards_by_number_are_read_where_a_source_has_them(tmp_path: Path, tokenizer: Path, reads: list[str]) -> None:
    write_shards(tmp_path / "train" / "many", 4, samples=1)
    write_shards(tmp_path / "train" / "few", 1, samples=1)
    prepare_index(tmp_path, tokenizer=tokenizer, shards="2-3")
    assert reads == ["002.tar", "003.tar"]
    with pytest.raises(ValueError, match=r"--shards 4-9 names no shard of any source: .* train/many has 4, train/few has 1"):
        prepare_index(tmp_path, tokenizer=tokenizer, shards="4-9")
    with pytest.raises(ValueError, match="--shards 3-2: the first number is greater than the last: did you mean 2-3"):
        prepare_index(tmp_path, tokenizer=tokenizer, shards="3-2")


def test_rows_of_a_stricter_check_are_used_and_those_of_a_weaker_one_are_not(tmp_path: Path, tokenizer: Path, reads: list[str]) -> None:
    members = {"0.png": picture(form="PNG"), "0.txt": b"x", "1.png": picture(form="PNG", size=(64, 64))[:-900], "1.txt": b"x"}
    write_tar(tmp_path / "pairs" / "0.tar", members)
    header, full = (IndexOptions(verify=verify, max_rejected=1.0) for verify in ("header", "full"))
    prepare_index(tmp_path, tokenizer=tokenizer, options=header, shards="0/1")
    with pytest.raises(ValueError, match="was read with --verify header: give `prepare merge` the same option"):
        prepare_index(tmp_path, tokenizer=tokenizer, options=full, merge_only=True)
    prepare_index(tmp_path, tokenizer=tokenizer, options=full)
    assert len(reads) == 2 and len(open_index(tmp_path / "pairs")) == 1
    prepare_index(tmp_path, tokenizer=tokenizer, options=header)
    assert len(reads) == 2 and len(open_index(tmp_path / "pairs")) == 1, "the damaged image does not come back"
    with pytest.raises(ValueError, match="was read with another tokenizer or other options"):
        prepare_index(tmp_path, tokenizer=tokenizer, options=IndexOptions(caption_prompt="what?"), merge_only=True)
    write_shards(tmp_path / "pairs", 1)[0].rename(tmp_path / "pairs" / "0.tar")
    with pytest.raises(ValueError, match="has changed since it was read"):
        prepare_index(tmp_path, tokenizer=tokenizer, options=full, merge_only=True)


def test_verification_decodes_all_images_or_some_or_none(tmp_path: Path, tokenizer: Path) -> None:
    broken = picture(form="PNG", size=(64, 64))[:-900]
    write_tar(tmp_path / "pairs" / "0.tar", {f"{n}.{e}": d for n in range(64) for e, d in (("png", broken), ("txt", b"x"))})
    found = {}
    for verify in ("header", "sample", "full"):
        with contextlib.suppress(ValueError):
            options = IndexOptions(verify=verify, max_rejected=1.0)
            found[verify] = prepare_index(tmp_path, tokenizer=tokenizer, options=options).sources.popitem()[1].samples
    assert found.pop("header") == 64 and 50 < found.pop("sample") < 64 and not found
    write_tar(tmp_path / "pairs" / "0.tar", {"0.png": bomb(60_000), "0.txt": b"x", "1.png": picture(form="PNG"), "1.txt": b"x"})
    options = IndexOptions(verify="header", max_rejected=1.0)
    assert prepare_index(tmp_path, tokenizer=tokenizer, options=options).sources.popitem()[1].samples == 1, "headers are always read"


_INDEX = [sys.executable, "-m", "megatron_mm", "prepare", "index"]


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_whole_shards_and_no_workers(tmp_path: Path, tokenizer: Path, workers: int, reads: list[str]) -> None:
    source = tmp_path / "pairs"
    shards = write_shards(source, 40, samples=40)
    command = [*_INDEX, str(tmp_path), "--tokenizer", str(tokenizer), "--workers", str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while len(done := list(source.glob("index/shards/*.rows"))) < 5:
            assert time.monotonic() < deadline and process.poll() is None, "indexing made no progress"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        while _alive(process.pid):
            assert time.monotonic() < deadline, "workers outlive the process that started them"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    done = [shard for shard in shards if read_header(row_file_of(source, shard)) is not None]
    assert 5 <= len(done) < 40 and not (source / "index" / "meta.json").exists()
    prepare_index(tmp_path, tokenizer=tokenizer)
    assert sorted(reads) == sorted(shard.name for shard in shards if shard not in done)
    index = open_index(source)
    assert len(index) == 1600 and (index.sample_rows["shard"] == [n for n in range(40) for _ in range(40)]).all()


def _alive(group: int) -> bool:
    """Return True if any process of a process group is running."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                return True
    return False
