"""All data that is not trained on is counted or causes an error: hostile tars, layouts, documents and images."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.data_files import picture, write_tar

from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.load.decode import PillowDecoder, is_plain
from megatron_mm.data.prepare.find import check_files, find_sources, shards_of
from megatron_mm.data.prepare.index import IndexOptions, prepare_index
from megatron_mm.data.prepare.kinds import detect_kind
from megatron_mm.data.prepare.samples import Losses, check_image, iterate_shard
from megatron_mm.data.sources.index import open_index
from megatron_mm.data.sources.shards import BrokenShard, iterate_tar
from megatron_mm.data.sources.tar import BLOCK
from megatron_mm.data.text.documents import parse_document
from megatron_mm.data.text.items import BadDocument, ImageReference, Text

ALL = IndexOptions(max_rejected=1, max_dropped_images=1)


@pytest.fixture
def tokenizer(demo_data: Path) -> Path:
    return demo_data / "tokenizer.model"


def pairs(numbers: range, *, key: str = "{}") -> dict[str, bytes]:
    return {f"{key.format(n)}.{e}": data for n in numbers for e, data in (("jpg", picture()), ("txt", f"circle {n}".encode()))}


def keys_and_losses(shard: Path) -> tuple[list[str], Losses]:
    losses = Losses()
    return [sample.key.lstrip("/") for sample in iterate_shard(shard, losses, "first")], losses


def meta(source: Path) -> dict[str, Any]:
    return json.loads((source / "index" / "meta.json").read_text())


# --------------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("first", ["README.txt", "0.gif", "0.bmp", "0.avif", "notes.json"])
def test_one_strange_member_does_not_make_pairs_texts(tmp_path: Path, tokenizer: Path, first: str) -> None:
    write_tar(tmp_path / "a" / "0.tar", {first: b'{"text": "a word"}', **pairs(range(1, 40))})
    prepare_index(tmp_path, tokenizer=tokenizer)
    index = open_index(tmp_path / "a")
    assert index.kind == "pairs" and len(index) == 39 and sum(index.rejected.values()) == 1


def test_texts_beside_images_are_refused_unless_the_kind_is_given(tmp_path: Path, tokenizer: Path) -> None:
    texts = {f"t{n}.txt": b"a text" for n in range(30)}
    write_tar(tmp_path / "a" / "0.tar", {**texts, **pairs(range(5))})
    with pytest.raises(ValueError, match=r"looks like texts, but 5 of 35 samples have images, which would be lost: use --kind"):
        prepare_index(tmp_path, tokenizer=tokenizer)
    prepare_index(tmp_path, tokenizer=tokenizer, options=IndexOptions(kind="text"))
    assert len(open_index(tmp_path / "a")) == 35
    with pytest.raises(
        ValueError, match=r"85.7% of source .* would be lost, more than --max-rejected 0.05: 30 samples rejected \(no image"
    ):
        prepare_index(tmp_path, tokenizer=tokenizer, options=IndexOptions(kind="pairs"))


def test_an_image_far_behind_the_samples_that_voted_is_counted(tmp_path: Path, tokenizer: Path) -> None:
    write_tar(tmp_path / "a" / "0.tar", {**{f"t{n:03d}.txt": b"a text" for n in range(300)}, **pairs(range(3))})
    prepare_index(tmp_path, tokenizer=tokenizer)
    assert open_index(tmp_path / "a").rejected == {"text with images next to it": 3}


def test_lines_that_name_images_are_no_texts(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a").mkdir()
    lines = [{"text": "a text", **({"image": "0.jpg"} if n % 5 == 0 else {"image": None})} for n in range(50)]
    (tmp_path / "a" / "0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"looks like texts, but 10 of 50 samples have images"):
        prepare_index(tmp_path, tokenizer=tokenizer)


# -------------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_what_preparation_accepts_decoding_accepts(form: str) -> None:
    data = picture(form=form)
    assert check_image(data) == (20, 30)
    decoder = PillowDecoder(ImageTransform(8, fill=(0, 0, 0)), threads=1)
    assert decoder.decode([data]).ok.all()
    decoder.close()


@pytest.fixture
def fake_gs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `gs` on the PATH that creates a file when it runs; the path of that file."""
    folder, mark = tmp_path / "bin", tmp_path / "gs_has_run"
    folder.mkdir()
    program = folder / "gs"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return mark


def test_no_program_runs_for_a_picture(fake_gs: Path) -> None:
    """Pillow passes EPS images to Ghostscript, whatever the file's name."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "EPS")
    with pytest.raises(OSError):  # the fake program makes no picture
        Image.open(io.BytesIO(buffer.getvalue())).load()
    assert fake_gs.exists(), "Pillow by itself runs it"
    fake_gs.unlink()
    with pytest.raises(BadDocument, match="image does not decode"):
        check_image(buffer.getvalue())
    decoder = PillowDecoder(ImageTransform(8, fill=(0, 0, 0)), threads=1)
    assert not decoder.decode([buffer.getvalue()]).ok.any() and not is_plain(buffer.getvalue())
    decoder.close()
    assert not fake_gs.exists()


def test_a_format_that_is_not_read_is_named(tmp_path: Path, tokenizer: Path) -> None:
    write_tar(tmp_path / "a" / "0.tar", {**pairs(range(9)), "9.heic": b"x", "9.txt": b"a phone's picture"})
    prepare_index(tmp_path, tokenizer=tokenizer, options=ALL)
    assert open_index(tmp_path / "a").rejected == {"image in an unsupported format: heic": 1}


# ----------------------------------------------------------------------------------------------------------------- documents


def test_a_document_keeps_its_texts_and_its_other_images(tmp_path: Path, tokenizer: Path) -> None:
    """And a run reads exactly what was counted."""
    info = [{"image_name": name, "matched_text_index": 0} for name in ("0.jpg", "gone.jpg", "bad.jpg")]
    members = {
        "d.0.jpg": picture(),
        "d.bad.jpg": b"no image",
        "d.json": json.dumps({"text_list": ["one", "two"], "image_info": info}).encode(),
    }
    write_tar(tmp_path / "a" / "0.tar", members)
    with pytest.raises(ValueError, match=r"2 of 3 images of source .* are missing or bad, more than --max-dropped-images 0.05"):
        prepare_index(tmp_path, tokenizer=tokenizer)
    prepare_index(tmp_path, tokenizer=tokenizer, options=ALL)
    index = open_index(tmp_path / "a")
    assert index.rejected == {} and index.items(0).is_image.tolist() == [True, False, False]
    assert meta(tmp_path / "a")["dropped"] == {"image does not decode": 1, "image is not in the shard": 1}
    assert index.image(0, 0) == members["d.0.jpg"]


def test_empty_entries_are_counted_and_a_null_text_hides_no_caption() -> None:
    dropped = Counter[str]()
    document = {"texts": ["one", None, " ", None], "images": [None, None, None, "0.jpg"]}
    items = parse_document("interleaved", json.dumps(document).encode(), is_json=True, dropped=dropped)
    assert items == [Text("one"), ImageReference("0.jpg")] and dropped == {"empty entry": 2}
    assert parse_document("pairs", b'{"text": null, "caption": "a ball"}', is_json=True) == [Text("a ball")]


# --------------------------------------------------------------------------------------------------------------------- files


def test_a_stray_manifest_hides_no_source(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "pairs" / "0.tar", pairs(range(2)))
    for stray in (tmp_path / "manifest.jsonl", tmp_path / "train" / "manifest.jsonl"):
        stray.write_text("{}\n")
        with pytest.raises(ValueError, match=r"manifest.jsonl is next to the folders of shards \(pairs\) and would be ignored"):
            find_sources(tmp_path)
        stray.unlink()
    assert [source.name for source in find_sources(tmp_path)] == ["pairs"]
    (tmp_path / "train" / "pairs" / "more").mkdir()
    write_tar(tmp_path / "train" / "pairs" / "more" / "1.tar", pairs(range(2)))
    with pytest.raises(ValueError, match=r"has shards both at its top level \(0.tar\) and in folders below it \(more/1.tar\)"):
        find_sources(tmp_path)


def test_nested_folders_are_one_source(tmp_path: Path, tokenizer: Path) -> None:
    for part in ("part-0/0.tar", "part-1/0.tar"):
        write_tar(tmp_path / "train" / "web" / part, pairs(range(3)))
    prepare_index(tmp_path, tokenizer=tokenizer)
    index = open_index(tmp_path / "train" / "web")
    assert list(index.shards) == ["part-0/0.tar", "part-1/0.tar"] and len(index) == 6 and index.document(5) == b"circle 2"


@pytest.mark.parametrize("name", ["1.tar.gz", "1.jsonl.zst", "1.parquet", "picture.jpg", "1.zip"])
def test_files_that_are_not_read_are_an_error(tmp_path: Path, tokenizer: Path, name: str) -> None:
    write_tar(tmp_path / "a" / "0.tar", pairs(range(3)))
    (tmp_path / "a" / name).write_bytes(b"data")
    with pytest.raises(ValueError, match=rf"has files that are not read: {name}. Unpack archives.*--ignore"):
        prepare_index(tmp_path, tokenizer=tokenizer)
    prepare_index(tmp_path, tokenizer=tokenizer, options=IndexOptions(ignore=("1.*", "*.jpg")))


def test_what_tools_write_beside_shards_is_no_data(tmp_path: Path) -> None:
    source = tmp_path / "a"
    write_tar(source / "00000.tar", pairs(range(3)))
    for name in (
        "00000.parquet",
        "00000_stats.json",
        "README.md",
        ".nv-meta/dataset.yaml",
        ".nv-meta/x.json",
        "index/rows.npy",
        "classes.txt",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"x")
    check_files(source, shards_of(source))


# ---------------------------------------------------------------------------------------------------------------------- tars


def test_published_files_in_a_source_name_the_command_that_converts_them(tmp_path: Path, tokenizer: Path) -> None:
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a cross"}]
    lines = {
        "mmc4": {"text_list": ["a"], "image_info": [{"image_name": "1.jpg", "matched_text_index": 0}]},
        "llava": {"image": "coco/1.jpg", "conversations": turns},
        "alpaca": {"image": "coco/1.jpg", "instruction": "what?", "output": "a cross", "text": ""},
    }
    for name, line in lines.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jsonl").write_text(json.dumps(line))
        with pytest.raises(ValueError, match=r"`prepare (llava`, `mmc4`|pairs\|llava\|mmc4)"):
            prepare_index(tmp_path / name, tokenizer=tokenizer)


def test_shards_that_energon_does_not_train_on_are_said(tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / "s" / name, {"a.jpg": picture(), "a.txt": b"a cross"})
    (tmp_path / "s" / ".nv-meta").mkdir()
    split = tmp_path / "s" / ".nv-meta" / "split.yaml"
    split.write_text("split_parts:\n  train:\n  - 0.tar\n  val:\n  - 1.tar\n  test: []\nexclude: []\n")
    prepare_index(tmp_path, tokenizer=tokenizer)
    assert "leaves 1 shards or samples out of training (1.tar (val) ...)" in caplog.text
    caplog.clear()
    split.write_text("split_parts:\n  train:\n  - 0.tar\n  - 1.tar\nexclude: []\n")
    prepare_index(tmp_path, tokenizer=tokenizer)
    assert "out of training" not in caplog.text


def test_tars_one_after_another_are_read_to_the_end(tmp_path: Path) -> None:
    one, two = (write_tar(tmp_path / f"{n}.tar", pairs(range(n, n + 2))).read_bytes() for n in (0, 2))
    both = tmp_path / "both.tar"
    both.write_bytes(one + two)
    keys, losses = keys_and_losses(both)
    assert keys == ["0", "1", "2", "3"] and not losses.rejected
    both.write_bytes(one + one)
    assert keys_and_losses(both)[0] == ["0", "1", "0", "1"], "the same names again are other samples"


def header_of(shard: Path, name: str) -> int:
    with tarfile.open(shard) as archive:
        return archive.getmember(name).offset


@pytest.mark.parametrize(
    "field", [(0, b"\xff"), (148, b"9999999\0"), (124, b"\x80\0\0\0\x40\0\0\0\0\0\0\0")], ids=["name", "checksum", "2^62 bytes"]
)
def test_a_broken_header_costs_what_is_beside_it(tmp_path: Path, tokenizer: Path, field: tuple[int, bytes]) -> None:
    shard = write_tar(tmp_path / "a" / "0.tar", pairs(range(10)))
    data, place = bytearray(shard.read_bytes()), header_of(shard, "4.jpg")
    data[place + field[0] : place + field[0] + len(field[1])] = field[1]
    if field[0] == 124:  # a correct checksum: only the size is absurd
        data[place + 148 : place + 156] = b"        "
        data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + BLOCK])
    shard.write_bytes(data)
    prepare_index(tmp_path, tokenizer=tokenizer, options=ALL)
    index = open_index(tmp_path / "a")
    # sample 3 may lack members in the damaged part, sample 4 lost its picture
    assert [index.document(n) for n in range(len(index))] == [f"circle {n}".encode() for n in (0, 1, 2, 5, 6, 7, 8, 9)]
    assert index.rejected == {"damaged tar header": 1, "sample next to damage in the shard": 1, "no image file": 1}


def test_a_shard_that_is_mostly_damage_is_an_error(tmp_path: Path, tokenizer: Path) -> None:
    write_tar(tmp_path / "a" / "0.tar", pairs(range(50)))
    (tmp_path / "a" / "1.tar").write_bytes(os.urandom(100_000))
    with pytest.raises(
        ValueError, match=r"% of source .* would be lost, more than --max-rejected 0.05: 1 samples rejected \(broken shard: 1\)"
    ):
        prepare_index(tmp_path, tokenizer=tokenizer)


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    archive.addfile(info, io.BytesIO(data) if data else None)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_lead_to_the_file_that_they_mean(tmp_path: Path, form: int) -> None:
    shard, image = tmp_path / "0.tar", picture()
    with tarfile.open(shard, "w", format=form) as archive:
        add(archive, "x/0.jpg", image)
        add(archive, "x/0.txt", b"one")
        add(archive, "x/1.jpg", kind=tarfile.LNKTYPE, link="x/0.jpg")
        add(archive, "x/1.txt", b"two")
        add(archive, "x/2.jpg", kind=tarfile.SYMTYPE, link="0.jpg")
        add(archive, "x/2.txt", b"three")
        add(archive, "x/3.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add(archive, "x/3.txt", b"four")
    losses = Losses()
    samples = list(iterate_shard(shard, losses, "first"))
    assert [sample.members["jpg"].data == image for sample in samples[:3]] == [True] * 3
    assert "jpg" not in samples[3].members and losses.skipped == {"link to a file that does not precede it in the tar": 1}


def test_apple_double_hidden_and_sparse_files_are_no_samples(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as archive:
        for n in range(2):
            for name, data in ((f"{n}.jpg", picture()), (f"{n}.txt", b"text")):
                add(archive, f"d/._{name}", b"Mac OS X")
                add(archive, f"d/{name}", data)
        add(archive, "d/.DS_Store", b"x")
        info = tarfile.TarInfo("d/2.jpg")
        info.size, info.pax_headers = 10, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "d/2.jpg"}
        archive.addfile(info, io.BytesIO(b"0123456789"))
        add(archive, "d/2.txt", b"text")
    losses = Losses()
    samples = list(iterate_shard(shard, losses, "first"))
    assert [sorted(sample.members) for sample in samples] == [["jpg", "txt"], ["jpg", "txt"], ["txt"]]
    assert losses.skipped == {"AppleDouble file": 4, "hidden file": 1, "sparse file in the tar": 1}


def test_keys_with_dots(tmp_path: Path, tokenizer: Path) -> None:
    """v1.0_1.jpg and v1.0_2.jpg belong to two samples, not to one sample "v1"."""
    shard = write_tar(tmp_path / "a" / "0.tar", pairs(range(9), key="v1.0_{}"))
    found = detect_kind([shard])
    assert (found.kind, found.key_ends) == ("pairs", "last")
    prepare_index(tmp_path, tokenizer=tokenizer)
    assert len(open_index(tmp_path / "a")) == 9
    interleaved = write_tar(tmp_path / "b" / "0.tar", {"0.0.jpg": picture(), "0.json": b'{"items": [{"text": "x"}, {"image": "0.jpg"}]}'})
    assert detect_kind([interleaved]).key_ends == "first"


def test_members_that_do_not_follow_one_another_say_so(tmp_path: Path, tokenizer: Path) -> None:
    members = pairs(range(9))
    apart = {name: members[name] for name in sorted(members, key=lambda name: name[-3:])}
    write_tar(tmp_path / "a" / "0.tar", apart)
    with pytest.raises(ValueError, match=r"has no usable sample|would be lost.*must follow one another"):
        prepare_index(tmp_path, tokenizer=tokenizer)


def test_97_percent_rejected_ends_with_the_reasons(tmp_path: Path, tokenizer: Path) -> None:
    bad = {f"b{n}.{e}": b"not an image" for n in range(97) for e in ("jpg", "txt")}
    write_tar(tmp_path / "a" / "0.tar", {**pairs(range(3)), **bad})
    with pytest.raises(ValueError, match=r"97.0% of source .* 97 samples rejected \(image does not decode: 97\), 3 usable"):
        prepare_index(tmp_path, tokenizer=tokenizer)
    assert not (tmp_path / "a" / "index" / "meta.json").exists()


def test_a_huge_member_that_is_no_data_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A film of gigabytes next to its caption uses no memory."""
    shard = write_tar(tmp_path / "0.tar", {"0.mp4": b"x" * 100_000, "0.txt": b"a film"})
    read = []
    monkeypatch.setattr("megatron_mm.data.sources.shards.read_range", lambda path, offset, size: read.append(size) or b"")
    (sample,) = iterate_tar(shard)
    assert sample.members["txt"].data == b"" and read == [6]


def test_a_read_only_data_directory_is_indexed_elsewhere(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    write_tar(data / "train" / "pairs" / "0.tar", pairs(range(3)))
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
        with pytest.raises(ValueError, match=r"pairs cannot be written to: use --index-dir DIR, and train with --data.path DIR"):
            prepare_index(data, tokenizer=tokenizer)
    prepare_index(data, tokenizer=tokenizer, options=IndexOptions(index_dir=tmp_path / "indexes"))
    assert not (data / "train" / "pairs" / "index").exists()
    index = open_index(tmp_path / "indexes" / "train" / "pairs")
    assert index.document(2) == b"circle 2" and (tmp_path / "indexes" / "tokenizer.model").is_file()
    shutil.rmtree(data)
    with pytest.raises(ValueError, match=r"0.tar is missing"):
        open_index(tmp_path / "indexes" / "train" / "pairs")


def test_a_tar_that_ends_early_is_told_from_one_that_is_damaged(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", pairs(range(4)))
    shard.write_bytes(shard.read_bytes()[: header_of(shard, "3.txt") + 100])
    with pytest.raises(BrokenShard, match="it is truncated"):
        list(iterate_tar(shard))


def test_shards_in_upper_case_are_shards_and_folders_and_dead_links_are_none(tmp_path: Path, tokenizer: Path) -> None:
    members = {"1.png": picture(form="PNG"), "1.txt": b"a circle"}
    write_tar(tmp_path / "a" / "0.TAR", members)
    (tmp_path / "a" / "1.tar").mkdir()
    assert prepare_index(tmp_path / "a", tokenizer=tokenizer).sources[f"{tmp_path.name}/a"].samples == 1
    (tmp_path / "a" / "2.ndjson").write_text("{}")
    with pytest.raises(ValueError, match=r"files that are not read: 2\.ndjson"):
        prepare_index(tmp_path / "a", tokenizer=tokenizer)
    (tmp_path / "a" / "2.tar").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"is a link to .*nothing, which does not exist"):
        prepare_index(tmp_path / "a", tokenizer=tokenizer)


def test_samples_without_their_other_half_say_how_files_end(tmp_path: Path, demo_data: Path) -> None:
    """For gzipped members, names of other tools or members that are not adjacent, the error lists the suffixes found."""
    files = {f"{number}.{ending}": b"x" for ending in ("img.png", "json.gz") for number in range(3)}
    write_tar(tmp_path / "train" / "odd" / "0.tar", files)
    with pytest.raises(ValueError, match=r"--text-key and --image-key give.*end with \.img\.png \(3\), \.json\.gz \(3\)"):
        prepare_index(tmp_path / "train" / "odd", tokenizer=demo_data / "tokenizer.model")
