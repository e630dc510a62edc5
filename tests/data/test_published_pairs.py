"""Image-text pairs in their published form, from tars, tables, folders and caption files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from support.data_files import picture, write_tar
from support.published_runs import indexed, run, write_images

from megatron_mm.data.image_formats import IMAGE_EXTENSIONS


def test_img2dataset_tars_are_indexed_as_they_are(tmp_path: Path, demo_data: Path) -> None:
    """Including the parquet and statistics files next to them."""
    source = tmp_path / "train" / "laion"
    described = json.dumps({"url": "http://x/1.jpg", "caption": "a red circle", "key": "000000001", "status": "success"}).encode()
    write_tar(source / "00000.tar", {"000000001.jpg": picture(), "000000001.json": described, "000000001.txt": b"a red circle"})
    pyarrow.parquet.write_table(pyarrow.table({"url": ["http://x/1.jpg"]}), source / "00000.parquet")
    (source / "00000_stats.json").write_text(json.dumps({"successes": 1}))
    index = indexed(source, demo_data)
    assert index.kind == "pairs" and len(index) == 1


def test_every_image_format_of_a_tar_is_read(tmp_path: Path) -> None:
    """The files of a tar may have any extension that `prepare index` reads."""
    files = {f"{number}.{extension}": picture() for number, extension in enumerate(IMAGE_EXTENSIONS)}
    captions = {f"{number}.txt": b"a red circle" for number in range(len(files))}
    write_tar(tmp_path / "in.tar", dict(sorted((files | captions).items())))
    found = run("pairs", [tmp_path / "in.tar"], tmp_path / "out")
    assert (found.samples, found.rejected) == (len(IMAGE_EXTENSIONS), {})


def test_img2dataset_parquet(tmp_path: Path, demo_data: Path) -> None:
    rows = {
        "key": ["0", "1", "2"],
        "status": ["success", "failed_to_download", "success"],
        "caption": ["a red circle", "gone", "two squares"],
        "jpg": [picture(), None, picture(size=(9, 8))],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "00000.parquet")
    found = run("pairs", [tmp_path / "00000.parquet"], tmp_path / "out")
    assert (found.samples, found.images, found.left_out) == (2, 2, {"not fetched by img2dataset: failed_to_download": 1})
    index = indexed(tmp_path / "out", demo_data)
    assert index.kind == "pairs" and index.image_sizes(slice(0, 2)).widths.tolist() == [20, 9]


def test_folders_of_images_and_texts(tmp_path: Path, demo_data: Path) -> None:
    """img2dataset's `files` format, whose names contain the shard, and other folders; names with dots stay distinct."""
    for folder, names in (("00000", ["000000001", "000000002"]), ("00001", ["000010001"]), ("mine", ["v1.2_a", "v1.2_b"])):
        write_images(tmp_path / "in" / folder, [f"{name}.jpg" for name in names])
        for name in names:
            (tmp_path / "in" / folder / f"{name}.txt").write_text(f"caption of {name}")
    (tmp_path / "in" / "00000" / "000000002.txt").unlink()
    (tmp_path / "in" / "00000" / "000000002.json").write_text(json.dumps({"text": None, "caption": "of the json"}))
    pyarrow.parquet.write_table(pyarrow.table({"url": ["http://x"]}), tmp_path / "in" / "00000.parquet")
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    (tmp_path / "in" / "README.md").write_text("about")
    found = run("pairs", [tmp_path / "in"], tmp_path / "out")
    assert found.samples == 5 and len(found.shards) == 3
    assert indexed(tmp_path / "out", demo_data).sizes(slice(0, 5)).num_images.tolist() == [1] * 5
    (tmp_path / "in" / "mine" / "v1.2_c.txt").write_text("without picture")
    with pytest.raises(ValueError, match=r"1 of 6 records \(16.7%\) are rejected, more than --max-rejected 0: no image: 1"):
        run("pairs", [tmp_path / "in"], tmp_path / "out")


def test_images_are_counted_once_and_a_damaged_one_does_not_decode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An image has a key for its path, each tail of it and its stem, but it is one image."""
    images = write_images(tmp_path / "images", ["a/b/0.jpg", "a/1.jpg", "a/2.jpg", "a/3.jpg", "a/4.jpg"])
    (images / "a" / "2.jpg").write_bytes(b"\0" * 64)
    (images / "a" / "3.jpg").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 64)
    lines = [{"caption": f"picture {n}", "image": f"a/{'b/' * (n == 0)}{n}.jpg"} for n in range(5)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    caplog.set_level("INFO")
    found = run("pairs", [tmp_path / "pairs.jsonl"], tmp_path / "out", lose=1.0, images=str(images))
    assert f"found 5 images in {images}" in caplog.text and found.samples == 3
    assert found.rejected == {"image does not decode": 1, "image in an unsupported format": 1}


def test_pairs_with_keys_of_their_own(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["a/0.jpg", "a/1.jpg"])
    lines = [{"meta": {"caption": f"picture {n}"}, "where": f"a/{n}.jpg"} for n in range(2)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = run(
        "pairs", [tmp_path / "pairs.jsonl"], tmp_path / "out", images=str(images), text_keys=("meta.caption",), image_keys=("where",)
    )
    assert found.samples == 2
    rows = pyarrow.table({"image": [{"bytes": picture(), "path": "x"}], "text": ["of Hugging Face"]})
    pyarrow.parquet.write_table(rows, tmp_path / "hf.parquet")
    assert run("pairs", [tmp_path / "hf.parquet"], tmp_path / "hf").samples == 1


def test_tars_with_names_of_their_own(tmp_path: Path, demo_data: Path) -> None:
    """As in energon's field maps, the members' extensions or fields of the .json are given as options."""
    described = json.dumps({"captions": {"short": "a red circle"}}).encode()
    write_tar(
        tmp_path / "in" / "0.tar",
        {"0.photo.jpg": picture(), "0.thumb.jpg": picture(size=(3, 3)), "0.meta.json": described, "0.note.txt": b"note"},
    )
    for name, key, caption in (
        ("a", "captions.short", b"a red circle"),
        ("b", "note.txt", b"note"),
        ("c", "meta.json.captions.long", None),
    ):
        out = tmp_path / name
        if caption is None:
            with pytest.raises(ValueError, match="no text: 1"):
                run("pairs", [tmp_path / "in" / "0.tar"], out, text_keys=(key,), image_keys=("photo.jpg",))
            continue
        run("pairs", [tmp_path / "in" / "0.tar"], out, text_keys=(key,), image_keys=("photo.jpg",))
        index = indexed(out, demo_data)
        assert index.document(0) == caption and index.image_sizes(slice(0, 1)).widths.tolist() == [20]


def test_an_image_path_does_not_leave_its_folder(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["0.jpg"])
    write_images(tmp_path, ["secret.jpg"])
    lines = [{"caption": "x", "image": name} for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "a\0b", "x" * 5000)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"image not found: 4"):
        run("pairs", [tmp_path / "pairs.jsonl"], tmp_path / "out", images=str(images))


def test_coco_captions_as_pairs(tmp_path: Path, demo_data: Path) -> None:
    images = write_images(tmp_path / "images", ["7.jpg"])
    captions = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "id": n, "caption": f"a dog {n}"} for n in range(5)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    run("pairs", [tmp_path / "captions.json"], tmp_path / "out", images=str(images), form="coco")
    index = indexed(tmp_path / "out", demo_data)
    assert index.kind == "pairs" and len(index) == 5


def test_questions_do_not_become_captions(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"data": [{"image_id": "1", "question": "what?", "answers": ["red"]}]}))
    write_images(tmp_path / "images", ["1.jpg"])
    with pytest.raises(ValueError, match="format textvqa has questions, which --as pairs would lose"):
        run("pairs", [tmp_path / "q.json"], tmp_path / "out", form="textvqa", images=str(tmp_path / "images"))


def test_images_beside_records_are_no_records(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["0.jpg"])
    row = {"text_list": ["a circle"], "image_info": [{"image_name": "0.jpg", "matched_text_index": 0}]}
    (tmp_path / "docs.jsonl").write_text(json.dumps(row))
    assert run("mmc4", [tmp_path], tmp_path / "out", images=str(tmp_path / "images")).images == 1
