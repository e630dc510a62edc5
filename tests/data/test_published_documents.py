"""Interleaved documents in their published form (OBELICS, MMC4), and how their images are found."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from support.data_files import picture, write_tar
from support.published_runs import documents, indexed, run, write_images


def obelics_parquet(path: Path, rows: list[tuple[list[str | None], list[str | None]]]) -> Path:
    table = {"texts": [texts for texts, _ in rows], "images": [images for _, images in rows], "metadata": ["[]"] * len(rows)}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return path


def test_obelics_with_images_by_url_and_by_its_hash(tmp_path: Path, demo_data: Path) -> None:
    """Images are found in img2dataset's tars, and in files named by the hash of their URL."""
    urls = [f"https://x.org/{n}.jpg?a=b" for n in range(4)]
    store = tmp_path / "images"
    for n in (0, 1):
        described = json.dumps({"url": urls[n], "key": f"00000000{n}"}).encode()
        write_tar(store / f"0000{n}.tar", {f"00000000{n}.jpg": picture(size=(10 + n, 9)), f"00000000{n}.json": described})
    write_images(store / "hashed", [f"{hashlib.sha256(urls[2].encode()).hexdigest()}.jpg"])
    rows: list[tuple[list[str | None], list[str | None]]] = [
        (["one", None, "two", None], [None, urls[0], None, urls[2]]),
        ([None, "three", None, None], [urls[1], None, urls[3], None]),  # one image was not fetched, one entry is empty
    ]
    found = run("obelics", [obelics_parquet(tmp_path / "0.parquet", rows)], tmp_path / "out", images=str(store), lose=0.5)
    assert (found.samples, found.images, found.rejected) == (2, 3, {})
    assert found.dropped == {"image not found": 1, "empty entry": 1}
    assert documents(tmp_path / "out") == [
        {"items": [{"text": "one"}, {"image": "0.jpg"}, {"text": "two"}, {"image": "1.jpg"}]},
        {"items": [{"image": "0.jpg"}, {"text": "three"}]},
    ]
    index = indexed(tmp_path / "out", demo_data)
    assert index.kind == "interleaved" and index.image_sizes(slice(0, 2)).widths.tolist() == [10, 20, 11]
    with pytest.raises(ValueError, match=r"1 of 4 images are missing or bad, more than --max-dropped-images 0: image not found: 1"):
        run("obelics", [tmp_path / "0.parquet"], tmp_path / "out", images=str(store))


def test_obelics_says_where_another_document_begins(tmp_path: Path) -> None:
    """Each part becomes a sample; images without a text of their own stay with the part next to them."""
    mark, images = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED", write_images(tmp_path / "im", ["0.jpg", "1.jpg"])
    rows: list[tuple[list[str | None], list[str | None]]] = [
        ([None, f"a\n\n{mark}\n\nb", None, f"{mark}\n\nc", None], ["0.jpg", None, "1.jpg", None, "0.jpg"]),
        ([f"{mark}\n\nd", None, mark, None], [None, "0.jpg", None, "1.jpg"]),
        ([mark, None], [None, "0.jpg"]),
    ]
    found = run("obelics", [obelics_parquet(tmp_path / "0.parquet", rows)], tmp_path / "out", images=str(images), lose=0.2)
    assert (found.samples, found.rejected, found.dropped) == (4, {"no text": 1}, {})
    assert documents(tmp_path / "out") == [
        {"items": [{"image": "0.jpg"}, {"text": "a"}]},
        {"items": [{"text": "b"}, {"image": "0.jpg"}]},
        {"items": [{"text": "c"}, {"image": "0.jpg"}]},
        {"items": [{"text": "d"}, {"image": "0.jpg"}, {"image": "1.jpg"}]},
    ]


def test_lists_of_texts_and_images_as_in_infimm_webmath(tmp_path: Path) -> None:
    images = write_images(tmp_path / "im", ["0.jpg"])
    table = {"URL": ["http://x"], "text_list": [["a", None, "b"]], "image_list": [[None, "0.jpg", None]], "metadata": [{"size": 2}]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "0.parquet")
    run("obelics", [tmp_path / "0.parquet"], tmp_path / "out", images=str(images))
    assert documents(tmp_path / "out") == [{"items": [{"text": "a"}, {"image": "0.jpg"}, {"text": "b"}]}]


def test_mmc4_as_released(tmp_path: Path, demo_data: Path) -> None:
    images = write_images(tmp_path / "images", ["a1.jpg", "b2.png"])
    document = {
        "url": "http://x",
        "text_list": ["one", "two"],
        "image_info": [
            {"image_name": "b2.png", "raw_url": "http://x/b2", "matched_text_index": 1, "matched_sim": 0.3},
            {"image_name": "gone.jpg", "raw_url": "http://x/gone", "matched_text_index": 0, "matched_sim": 0.2},
            {"image_name": "a1.jpg", "raw_url": "http://x/a1", "matched_text_index": 0, "matched_sim": 0.2},
        ],
        "similarity_matrix": [[0.1, 0.2]],
    }
    with zipfile.ZipFile(tmp_path / "docs_shard_0_v2.jsonl.zip", "w") as archive:
        archive.writestr("docs_shard_0_v2.jsonl", json.dumps(document) + "\n" + "broken\n")
    found = run("mmc4", [tmp_path / "docs_shard_0_v2.jsonl.zip"], tmp_path / "out", images=str(images), lose=0.5)
    assert (found.samples, found.rejected, found.dropped) == (1, {"malformed JSON": 1}, {"image not found": 1})
    assert any("record 1 (gone.jpg)" in line for line in found.examples), "it is named by its file, not by its address"
    assert documents(tmp_path / "out") == [{"items": [{"image": "0.jpg"}, {"text": "one"}, {"image": "1.jpg"}, {"text": "two"}]}]
    assert len(indexed(tmp_path / "out", demo_data)) == 1


def test_images_in_an_archive_are_not_found_but_it_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = write_images(tmp_path / "images", ["0.jpg"])
    with zipfile.ZipFile(images / "more.zip", "w") as archive:
        archive.write(images / "0.jpg", "1.jpg")
    line = {"text_list": ["x"], "image_info": [{"image_name": "1.jpg", "raw_url": "http://x/1", "matched_text_index": 0}]}
    (tmp_path / "0.jsonl").write_text(json.dumps(line))
    run("mmc4", [tmp_path / "0.jsonl"], tmp_path / "out", images=str(images), lose=1.0)
    assert f"{images} contains archives, whose images are not found (1, such as more.zip): unpack it into a folder" in caplog.text
    with pytest.raises(ValueError, match=r"more\.zip is a file, but --images takes a folder: unpack it into a folder"):
        run("mmc4", [tmp_path / "0.jsonl"], tmp_path / "out2", images=str(images / "more.zip"), lose=1.0)


def test_images_that_come_later_are_found_by_the_same_command(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["0.jpg"])
    line = {"text_list": ["x"], "image_info": [{"image_name": "a/late.jpg", "matched_text_index": 0}]}
    (tmp_path / "0.jsonl").write_text(json.dumps(line))
    assert run("mmc4", [tmp_path / "0.jsonl"], tmp_path / "out", images=str(images), lose=1.0).images == 0
    write_images(images, ["late.jpg"])
    assert run("mmc4", [tmp_path / "0.jsonl"], tmp_path / "out", images=str(images)).images == 1


def test_one_file_name_in_two_folders_is_no_image(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["a/0.jpg", "b/0.jpg"])
    line = {"text_list": ["x"], "image_info": [{"image_name": "0.jpg", "matched_text_index": 0}]}
    (tmp_path / "0.jsonl").write_text(json.dumps(line))
    found = run("mmc4", [tmp_path / "0.jsonl"], tmp_path / "out", images=str(images), lose=1.0)
    assert found.dropped == {"several images with that name": 1}


def test_an_image_of_mmc4_without_a_place_costs_itself(tmp_path: Path, demo_data: Path) -> None:
    write_images(tmp_path / "images", ["0.jpg"])
    infos = [
        {"image_name": "0.jpg", "matched_text_index": 0},
        {"image_name": "0.jpg", "matched_text_index": None},
        {"image_name": None, "matched_text_index": 0},
        {"image_name": "0.jpg", "matched_text_index": 7},
    ]
    rows = [{"text_list": ["a circle"], "image_info": infos}, {"text_list": ["a square"], "image_info": None}]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run("mmc4", [tmp_path / "docs.jsonl"], tmp_path / "out", lose=0.8, images=str(tmp_path / "images"))
    assert (found.samples, found.images, found.dropped) == (2, 1, {"image without a name or without a text to belong to": 3})


@pytest.mark.parametrize(
    ("named", "lies"),
    [
        ("train2017/1.jpg", "coco/train2017/1.jpg"),
        ("coco/train2017/1.jpg", "train2017/1.jpg"),
        ("/coco/1.jpg", "coco/1.jpg"),
        ("./coco//1.jpg", "coco/1.jpg"),
        ("coco/1.jpg", "1.jpg"),
        ("1.jpg", "coco/1.jpg"),
    ],
)
def test_an_image_is_found_by_the_end_of_its_path(tmp_path: Path, named: str, lies: str) -> None:
    images = write_images(tmp_path / "images", [lies])
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": named, "caption": "a cross"}))
    assert run("pairs", [tmp_path / "a.jsonl"], tmp_path / "out", images=str(images)).samples == 1


@pytest.mark.parametrize(("named", "lies"), [("train/1/image.png", "train/2/image.png"), ("vg/1.jpg", "coco/1.jpg")])
def test_an_image_of_another_folder_is_another_image(tmp_path: Path, named: str, lies: str) -> None:
    images = write_images(tmp_path / "images", [lies])
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": named, "caption": "a cross"}))
    with pytest.raises(ValueError, match=f"image with that name is in another folder: 1(?s:.*)record 1 .image {named}"):
        run("pairs", [tmp_path / "a.jsonl"], tmp_path / "out", images=str(images))
