"""`prepare index`: what is good is found, what is bad is rejected by reason, and nothing stops."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mm.data.demo import prepare_demo
from megatron_mm.data.index import open_index, open_split
from megatron_mm.data.prepare import prepare_index
from megatron_mm.data.shards import TarWriter


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 30), form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(buffer, form)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A small PNG whose header claims side x side pixels."""
    data = bytearray(picture(form="PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tar = TarWriter(path)
    for name, data in members.items():
        tar.add(name, data)
    tar.close()


@pytest.fixture
def tokenizer(demo_data: Path) -> Path:
    return demo_data / "tokenizer.model"


def test_every_kind_of_bad_pair_is_rejected_by_its_reason(tmp_path: Path, tokenizer: Path) -> None:
    good = {"000.jpg": picture(), "000.txt": b"a red circle", "001.png": picture(form="PNG"), "001.json": b'{"caption": "two squares"}'}
    special = {
        **{"002.jpg": picture("CMYK"), "002.txt": b"cmyk", "003.png": picture("I;16", form="PNG"), "003.txt": b"sixteen bits"},
        **{"004.webp": picture(form="WEBP"), "004.txt": b"webp", "005.png": picture("RGBA", form="PNG"), "005.txt": b"transparent"},
    }
    bad = {
        **{"006.jpg": picture()[:-100], "006.txt": b"truncated"},
        **{"007.png": bomb(9000), "007.txt": b"large", "015.png": bomb(60000), "015.txt": b"bomb"},
        **{"008.jpg": b"no image at all", "008.txt": b"text"},
        **{"009.jpg": picture(), "009.json": b'{"caption": '},
        **{"010.jpg": picture(), "010.json": b'{"url": "x"}'},
        **{"011.txt": b"without image"},
        **{"012.jpg": picture()},
        **{"013.jpg": picture(), "013.txt": b"\xff\xfe"},
        **{"014.jpg": picture(), "014.txt": b"  \n"},
    }
    write_tar(tmp_path / "pairs" / "0.tar", {**good, **special, **bad})
    prepare_index(tmp_path, tokenizer=tokenizer)
    index = open_index(tmp_path / "pairs")
    assert index.kind == "pairs" and len(index) == 6
    assert index.rejected == {
        "image does not decode": 2,
        "image of more than 64 megapixels": 2,
        "malformed JSON": 1,
        "JSON has no text or caption": 1,
        "no image file": 1,
        "no text file": 1,
        "text is not UTF-8": 1,
        "no text": 1,
    }
    images = index.items[index.items["is_image"] == 1]
    assert {(int(row["width"]), int(row["height"])) for row in images} == {(20, 30)}


@pytest.mark.parametrize(
    ("document", "order"),
    [
        ({"items": [{"text": "one"}, {"image": "0.jpg"}, {"text": "two"}, {"image": "1.png"}]}, [0, 1, 0, 1]),
        ({"texts": ["one", None, "two", None], "images": [None, "0.jpg", None, "1.png"]}, [0, 1, 0, 1]),
        (
            {
                "text_list": ["one", "two"],
                "image_info": [{"image_name": "1.png", "matched_text_index": 1}, {"image_name": "0.jpg", "matched_text_index": 0}],
            },
            [1, 0, 1, 0],
        ),
    ],
    ids=["items", "obelics", "mmc4"],
)
def test_interleaved_documents_keep_their_order(tmp_path: Path, tokenizer: Path, document: dict, order: list[int]) -> None:
    members = {"a.0.jpg": picture(), "a.1.png": picture(form="PNG", size=(7, 9)), "a.json": json.dumps(document).encode()}
    write_tar(tmp_path / "interleaved" / "0.tar", members)
    prepare_index(tmp_path, tokenizer=tokenizer)
    index = open_index(tmp_path / "interleaved")
    assert index.kind == "interleaved"
    assert index.items["is_image"].tolist() == order
    assert index.items[index.items["is_image"] == 1]["width"].tolist() == [20, 7]


def test_a_reference_to_a_missing_image_and_a_malformed_list_are_rejected(tmp_path: Path, tokenizer: Path) -> None:
    documents = [
        {"items": [{"text": "fine"}, {"image": "0.jpg"}]},
        {"items": [{"text": "gone"}, {"image": "9.jpg"}]},
        {"items": ["not an object"]},
        {"texts": ["one"], "images": []},
        {"nothing": 1},
    ]
    members = {}
    for number, document in enumerate(documents):
        members[f"{number}.0.jpg"] = picture()
        members[f"{number}.json"] = json.dumps(document).encode()
    write_tar(tmp_path / "interleaved" / "0.tar", members)
    prepare_index(tmp_path, tokenizer=tokenizer)
    assert open_index(tmp_path / "interleaved").rejected == {
        "JSON has no items, texts or text_list": 1,
        "image is not in the shard": 1,
        "malformed items list": 1,
        "malformed texts list": 1,
    }


@pytest.mark.parametrize("cut", [700, 1000, 2048 + 1])
def test_a_broken_tar_is_named_and_its_good_samples_are_used(
    tmp_path: Path, tokenizer: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    members = {f"{n}.{e}": d for n in range(4) for e, d in (("jpg", picture()), ("txt", b"a red circle"))}
    path = tmp_path / "pairs" / "0.tar"
    write_tar(path, members)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 512 * 512 - 8192 - cut])
    prepare_index(tmp_path, tokenizer=tokenizer)
    index = open_index(tmp_path / "pairs")
    assert index.rejected.get("broken shard") == 1
    assert 1 <= len(index) < 4
    assert str(path) in caplog.text


def test_the_number_of_workers_does_not_change_the_index(demo_data: Path, tmp_path: Path, tokenizer: Path) -> None:
    for number in range(3):
        members = {f"{n}.{e}": d for n in range(5) for e, d in (("jpg", picture(size=(9, 9 + n + number))), ("txt", b"a circle"))}
        write_tar(tmp_path / "pairs" / f"{number}.tar", members)
    files = [tmp_path / "pairs" / "index" / name for name in ("meta.json", "samples.npy", "items.npy")]
    prepare_index(tmp_path, tokenizer=tokenizer, workers=1)
    one = [file.read_bytes() for file in files]
    prepare_index(tmp_path, tokenizer=tokenizer, workers=2)
    assert [file.read_bytes() for file in files] == one


def test_paths_without_data_are_named(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist"):
        prepare_index(tmp_path / "nowhere", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=f"{tmp_path} has no .tar or .jsonl shards"):
        prepare_index(tmp_path, tokenizer=tokenizer)
    write_tar(tmp_path / "pairs" / "0.tar", {"0.jpg": picture(), "0.txt": b"x"})
    with pytest.raises(ValueError, match=r"no tokenizer"):
        prepare_index(tmp_path)


def test_opening_a_split_names_what_is_missing(demo_data: Path, tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist"):
        open_split(tmp_path / "nowhere", "train", sources=["pairs"])
    with pytest.raises(ValueError, match=r"has no folder 'validation'; it has"):
        open_split(demo_data, "validation", sources=["pairs"])
    with pytest.raises(ValueError, match=r"lacks the sources \['video'\].*it has \['interleaved', 'pairs', 'text'\]"):
        open_split(demo_data, "train", sources=["pairs", "video"])
    source = tmp_path / "train" / "pairs"
    write_tar(source / "0.tar", {"0.jpg": picture(), "0.txt": b"x"})
    with pytest.raises(ValueError, match=r"has no index: run `megatron-mm prepare index"):
        open_split(tmp_path, "train", sources=["pairs"])
    prepare_index(tmp_path, tokenizer=tokenizer)
    write_tar(source / "0.tar", {"0.jpg": picture(), "0.txt": b"x", "1.txt": b"more" * 5000})
    with pytest.raises(ValueError, match=r"when it was indexed"):
        open_split(tmp_path, "train", sources=["pairs"])


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
        assert [bool(index.samples["num_images"].sum()) for index in indexes] == [True, True, False]
    with pytest.raises(ValueError, match=r"has a data set already"):
        prepare_demo(tmp_path / "a")
