"""Public data sets in their published form are converted to shards that `prepare index` reads, and losses are counted."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from support.data_files import picture, write_tar

from megatron_mm.cli import main as cli
from megatron_mm.data.prepare.index import IndexOptions, prepare_index
from megatron_mm.data.prepare.published.convert import Converted, Options, convert
from megatron_mm.data.prepare.published.losses import DamagedFile
from megatron_mm.data.prepare.published.records import iterate_records
from megatron_mm.data.sources.index import SourceIndex, open_index
from megatron_mm.data.sources.shards import iterate_jsonl, iterate_tar


def indexed(out: Path, demo_data: Path) -> SourceIndex:
    prepare_index(out, tokenizer=demo_data / "tokenizer.model", options=IndexOptions(max_rejected=0))
    return open_index(out)


def documents(out: Path) -> list[dict[str, Any]]:
    found = []
    for shard in sorted(out.glob("*.tar")):
        found += [json.loads(sample.members["json"].data) for sample in iterate_tar(shard)]
    return found


def run(layout: str, inputs: list[Path], out: Path, *, lose: float = 0.0, **options: Any) -> Converted:
    return convert([str(path) for path in inputs], out, options=Options(layout, **options), max_rejected=lose, max_dropped_images=lose)


def write_images(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(size=(20 + number, 30)))
    return folder


# ------------------------------------------------------------------------------------------------------------------ pairs


def test_img2dataset_tars_are_indexed_as_they_are(tmp_path: Path, demo_data: Path) -> None:
    """Including the parquet and statistics files next to them."""
    source = tmp_path / "train" / "laion"
    described = json.dumps({"url": "http://x/1.jpg", "caption": "a red circle", "key": "000000001", "status": "success"}).encode()
    write_tar(source / "00000.tar", {"000000001.jpg": picture(), "000000001.json": described, "000000001.txt": b"a red circle"})
    pyarrow.parquet.write_table(pyarrow.table({"url": ["http://x/1.jpg"]}), source / "00000.parquet")
    (source / "00000_stats.json").write_text(json.dumps({"successes": 1}))
    index = indexed(source, demo_data)
    assert index.kind == "pairs" and len(index) == 1


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


# ------------------------------------------------------------------------------------------------------------ interleaved


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
    assert documents(tmp_path / "out") == [{"items": [{"image": "0.jpg"}, {"text": "one"}, {"image": "1.jpg"}, {"text": "two"}]}]
    assert len(indexed(tmp_path / "out", demo_data)) == 1


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


# ---------------------------------------------------------------------------------------------------- conversations, tasks


def test_llava_mix(tmp_path: Path, demo_data: Path) -> None:
    images = write_images(tmp_path / "images", ["coco/train2017/0.jpg"])
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A circle."}]
    entries = [
        {"id": "0", "image": "coco/train2017/0.jpg", "conversations": talk},
        {"id": "1", "conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}], "model": ""},
        {
            "id": "2",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "A?"},
                {"role": "assistant", "content": "B."},
            ],
        },
    ]
    (tmp_path / "mix.json").write_text(json.dumps([*entries, {"id": "3", "image": "coco/gone.jpg", "conversations": talk}], indent=1))
    found = run("llava", [tmp_path / "mix.json"], tmp_path / "out", images=str(images), lose=0.5)
    assert (found.samples, found.images, found.rejected) == (3, 1, {"image not found": 1})
    index = indexed(tmp_path / "out", demo_data)
    assert index.kind == "conversations" and index.sizes(slice(0, 3)).num_images.tolist() == [1, 0, 0]


def test_vqa_joins_questions_and_answers(tmp_path: Path, demo_data: Path) -> None:
    images = write_images(tmp_path / "images", [f"COCO_train2014_{7:012d}.jpg"])
    questions = [{"question_id": n, "image_id": 7, "question": f"How many {n}?"} for n in (70, 71, 72)]
    answers = [
        {"question_id": 70, "image_id": 7, "multiple_choice_answer": "two", "answers": [{"answer": "two"}]},
        {"question_id": 71, "image_id": 7, "answers": [{"answer": "one"}, {"answer": "three"}, {"answer": "three"}]},
        {"question_id": 99, "image_id": 7, "multiple_choice_answer": "none"},
    ]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "train2014", "questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"data_subtype": "train2014", "annotations": answers}))
    settings = {"images": str(images), "form": "vqav2", "annotations": str(tmp_path / "a.json")}
    found = run("tasks", [tmp_path / "q.json"], tmp_path / "out", lose=0.5, **settings)
    assert (found.samples, found.rejected) == (2, {"question without answer": 1, "answer without question": 1})
    assert [document["answer"] for document in documents(tmp_path / "out")] == ["two", "three"]
    index = indexed(tmp_path / "out", demo_data)
    assert index.kind == "tasks" and index.image(0, 0) == index.image(1, 0) == (images / f"COCO_train2014_{7:012d}.jpg").read_bytes()
    assert (tmp_path / "out" / found.shards[0]).read_bytes().count(index.image(0, 0)) == 1, "both questions share the picture's bytes"


@pytest.mark.parametrize(("form", "image_id", "image"), [("textvqa", "003a8ae2", "003a8ae2.jpg"), ("vizwiz", "V_val_7.jpg", "V_val_7.jpg")])
def test_other_questions_in_the_form_of_vqav2(tmp_path: Path, form: str, image_id: str, image: str) -> None:
    """TextVQA and VizWiz as converted for open_flamingo's evaluation: named images, and `multiple_choice_answer` is the first answer."""
    images = write_images(tmp_path / "images", [image])
    question, answers = {"question_id": 1, "image_id": image_id, "question": "what?"}, [{"answer": word} for word in ("no", "red", "red")]
    answer = {"question_id": 1, "image_id": image_id, "multiple_choice_answer": "no", "answers": answers}
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "T-validation", "questions": [question]}))
    (tmp_path / "a.json").write_text(json.dumps({"data_subtype": "T-validation", "annotations": [answer]}))
    for name in (form, "vqav2"):
        run("tasks", [tmp_path / "q.json"], tmp_path / name, form=name, images=str(images), annotations=str(tmp_path / "a.json"))
    assert [document["answer"] for name in (form, "vqav2") for document in documents(tmp_path / name)] == ["red", "red"]
    assert documents(tmp_path / form)[0]["task"] == ("vizwiz" if form == "vizwiz" else "vqa")
    with pytest.raises(ValueError, match="format gqa has no --annotations"):
        run("tasks", [tmp_path / "q.json"], tmp_path / "g", form="gqa", images=str(images), annotations=str(tmp_path / "a.json"))


def test_an_answer_named_by_vqav2_decides_between_equally_frequent_ones(tmp_path: Path) -> None:
    """Also in parquet files, of which there may be several."""
    answers = [{"answer": "one"}, {"answer": "two"}]
    for number, named in enumerate(("two", "2")):
        row = {
            "question": ["q?"],
            "image": [{"bytes": picture(), "path": "1.jpg"}],
            "multiple_choice_answer": [named],
            "answers": [answers],
        }
        pyarrow.parquet.write_table(pyarrow.table(row), tmp_path / f"{number}.parquet")
    run("tasks", [tmp_path / "0.parquet", tmp_path / "1.parquet"], tmp_path / "out", form="vqav2")
    assert [document["answer"] for document in documents(tmp_path / "out")] == ["two", "2"]


@pytest.mark.parametrize(
    ("form", "content", "image", "answer"),
    [
        ("textvqa", {"data": [{"image_id": "7", "question": "q?", "answers": ["a", "b", "b"]}]}, "7.jpg", "b"),
        ("textcaps", {"data": [{"image_id": "7", "reference_strs": ["a sign"]}]}, "7.jpg", "a sign"),
        ("gqa", {"1": {"imageId": "7", "question": "q?", "answer": "no"}}, "7.jpg", "no"),
        ("vizwiz", [{"image": "v.jpg", "question": "q?", "answers": [{"answer": "unanswerable"}]}], "v.jpg", "unanswerable"),
        ("coco", {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"image_id": 7, "caption": "a dog"}]}, "7.jpg", "a dog"),
    ],
)
def test_question_and_caption_files(tmp_path: Path, form: str, content: Any, image: str, answer: str) -> None:
    images = write_images(tmp_path / "images", [image])
    (tmp_path / "in.json").write_text(json.dumps(content))
    run("tasks", [tmp_path / "in.json"], tmp_path / "out", images=str(images), form=form)
    task = {"textcaps": "caption", "coco": "caption", "vizwiz": "vizwiz"}.get(form, "vqa")
    question = {} if task == "caption" else {"question": "q?"}
    assert documents(tmp_path / "out") == [{"task": task, **question, "answer": answer, "images": ["0.jpg"]}]
    with pytest.raises(ValueError, match=f"in.json is not a file in the format {'gqa' if form != 'gqa' else 'coco'}"):
        run("tasks", [tmp_path / "in.json"], tmp_path / "other", images=str(images), form="gqa" if form != "gqa" else "coco")


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


def test_scienceqa_as_json_and_as_parquet(tmp_path: Path, demo_data: Path) -> None:
    images = write_images(tmp_path / "images", ["train/1/image.png"])
    problems = {
        "1": {"question": "Which?", "choices": ["salt", "iron"], "answer": 1, "hint": "Metals.", "image": "image.png", "split": "train"},
        "2": {"question": "What?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "split": "train"},
        "3": {"question": "Not here?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "split": "test"},
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    run("tasks", [tmp_path / "problems.json"], tmp_path / "out", images=str(images), form="scienceqa", split="train")
    without, with_image = documents(tmp_path / "out")
    assert with_image == {
        **{"task": "scienceqa", "context": "Metals.", "question": "Which?", "choices": ["salt", "iron"], "answer": 1},
        "images": ["0.jpg"],  # the file is called .png, but its bytes are JPEG
    }
    assert without["images"] == []
    rows = [{**entry, "image": {"bytes": picture(), "path": None} if entry["image"] else None} for entry in problems.values()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "0.parquet")
    assert run("tasks", [tmp_path / "0.parquet"], tmp_path / "rows", form="scienceqa").samples == 3
    assert indexed(tmp_path / "rows", demo_data).kind == "tasks"


# ------------------------------------------------------------------------------------------------------------------- texts


def text_files(folder: Path, texts: list[str]) -> list[Path]:
    """Write the same texts in every supported format."""
    lines = "".join(json.dumps({"text": text, "meta": {"n": 1}}) + "\n" for text in texts).encode()
    table = pyarrow.table({"text": texts})
    frames = b"".join(zstandard.compress(line + b"\n") for line in lines.splitlines())  # several frames, as written by parallel writers
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.jsonl", lines)
    streamed, whole = io.BytesIO(), io.BytesIO()
    with pyarrow.ipc.new_stream(streamed, table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(whole, table.schema) as file:
        file.write_table(table)
    members = gzip.compress(lines.splitlines(keepends=True)[0]) + gzip.compress(b"".join(lines.splitlines(keepends=True)[1:]))
    contents = {
        "a.jsonl": lines,
        "c4-train.00000-of-01024.json.gz": members,
        "a.jsonl.zst": frames,
        "a.jsonl.zip": packed.getvalue(),
        "list.json": json.dumps([{"text": text} for text in texts], indent=1).encode(),
        "stream.arrow": streamed.getvalue(),
        "file.arrow": whole.getvalue(),
        "a.txt": "\n\n".join(texts).encode(),
    }
    folder.mkdir()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=1)
    return sorted(folder.iterdir())


def test_texts_of_every_format_are_the_same(tmp_path: Path, demo_data: Path) -> None:
    texts = ["a red circle", "ünïcödé", "three"]
    files = text_files(tmp_path / "in", texts)
    found = run("text", files, tmp_path / "out", texts="paragraph")
    assert found.samples == len(texts) * len(files) and found.rejected == {} and len(found.shards) == len(files)
    for shard in found.shards:
        assert [json.loads(line.data)["text"] for line in iterate_jsonl(tmp_path / "out" / shard)] == texts
    index = indexed(tmp_path / "out", demo_data)
    assert index.kind == "text" and len(index) == found.samples


@pytest.mark.parametrize(
    "name", ["a.jsonl.zst", "c4-train.00000-of-01024.json.gz", "a.jsonl.zip", "a.parquet", "stream.arrow", "list.json"]
)
def test_a_file_that_is_cut_off_is_no_shorter_file(tmp_path: Path, name: str) -> None:
    texts = [f"text {n} " + "x" * n for n in range(50)]
    text_files(tmp_path / "in", texts)
    path = tmp_path / "in" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedFile):
        list(iterate_records(str(path)))
    with pytest.raises(
        ValueError, match=r"1 of 1 inputs are damaged, more than .*\. The shards are in|damaged input file: 1; .*\. The shards are in"
    ):
        run("text", [path], tmp_path / "out", lose=0.5)


def test_the_field_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"raw": {"content": "deep"}}) + "\n")
    with pytest.raises(ValueError, match=r"1 of 1 records \(100.0%\) are rejected.*no text: 1"):
        run("text", [tmp_path / "a.jsonl"], tmp_path / "out")
    assert run("text", [tmp_path / "a.jsonl"], tmp_path / "out", text_keys=("raw.content",)).samples == 1


def test_inputs_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    files = []
    for n in range(3):
        files.append(tmp_path / f"{n}.jsonl")
        files[n].write_text(json.dumps({"text": f"text {n}"}) + "\n" + json.dumps({"text": "x" * 200}) + "\n")
    first = run("text", files, tmp_path / "out", shard_bytes=100)
    assert len(first.shards) == 3
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.jsonl")}
    files[1].write_text(json.dumps({"text": "another, that is longer"}))
    (tmp_path / "out" / "00002-00000.jsonl").unlink()  # as if it had been stopped
    again = run("text", files, tmp_path / "out", shard_bytes=100)
    changed = sorted(path.name for path in (tmp_path / "out").glob("*.jsonl") if times.get(path) != path.stat().st_mtime_ns)
    assert changed == ["00001-00000.jsonl", "00002-00000.jsonl"] and again.samples == 5
    assert not list((tmp_path / "out").glob(".*.partial"))


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    files = text_files(tmp_path / "in", ["one", "two"])
    for workers in (1, 3):
        convert([str(f) for f in files], tmp_path / str(workers), options=Options("text", texts="line"), workers=workers)
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.jsonl")} for n in ("1", "3"))
    assert one == three


def test_the_command_line(tmp_path: Path, demo_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From published files to an index and its report."""
    images = write_images(tmp_path / "images", ["0.jpg"])
    (tmp_path / "vizwiz.json").write_text(json.dumps([{"image": "0.jpg", "question": "q?", "answers": [{"answer": "a"}]}]))
    (tmp_path / "a.jsonl").write_text('{"body": {"raw": "a text"}}\n')
    data = tmp_path / "DATA"
    arguments = ["--format", "vizwiz", "--images", str(images), "--out", str(data / "train" / "vizwiz"), "--workers", "1"]
    cli.main(["prepare", "vqa", str(tmp_path / "vizwiz.json"), *arguments])
    cli.main(
        ["prepare", "text", str(tmp_path / "a.jsonl"), "--text-key", "body.raw", "--out", str(data / "train" / "web"), "--workers", "1"]
    )
    assert f"index it: megatron-mm prepare index {data}" in capsys.readouterr().out
    cli.main(["prepare", "index", str(data), "--tokenizer", str(demo_data / "tokenizer.model"), "--workers", "1"])
    cli.main(["prepare", "report", str(data), "--json", str(tmp_path / "report.json")])
    kinds = {name: source["kind"] for name, source in json.loads((tmp_path / "report.json").read_text())["sources"].items()}
    assert kinds == {"train/vizwiz": "tasks", "train/web": "text"}


def test_inputs_that_are_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input .*nowhere.jsonl does not exist"):
        run("text", [tmp_path / "nowhere.jsonl"], tmp_path / "out")
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a.pdf is in an unsupported format"):
        run("text", [tmp_path / "a.pdf"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"folder of images .*none does not exist"):
        run("mmc4", [tmp_path / "a.pdf"], tmp_path / "out", images=str(tmp_path / "none"))


# ----------------------------------------------------------------------------------------------------- what users really have


def test_inputs_that_are_not_given_any_more_are_an_error(tmp_path: Path) -> None:
    """Their shards may be all that is left of them: they are neither replaced nor counted as shards of the current inputs."""
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "a red circle"}\n')
    run("text", sorted(tmp_path.glob("*.jsonl")), tmp_path / "out")
    for inputs in (["0.jsonl"], ["1.jsonl", "2.jsonl"]):
        with pytest.raises(ValueError, match="which is not among the inputs of this command"):
            run("text", [tmp_path / name for name in inputs], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 3


def test_archives_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    lines = b'{"text": "a red circle"}\n'
    (tmp_path / "plain.jsonl.gz").write_bytes(lines)
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(lines))
    with zipfile.ZipFile(tmp_path / "mac.jsonl.zip", "w") as archive:
        archive.writestr("mac.jsonl", lines)
        archive.writestr("__MACOSX/._mac.jsonl", b"\0\5\26\7")
    found = run("text", [tmp_path / name for name in ("plain.jsonl.gz", "packed.jsonl", "mac.jsonl.zip")], tmp_path / "out")
    assert (found.samples, found.rejected) == (3, {})
    (tmp_path / "empty.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="it is empty"):
        run("text", [tmp_path / "empty.jsonl.gz"], tmp_path / "out2")


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


def test_fields_that_are_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "a red circle", "id": 7}\n')
    with pytest.raises(ValueError, match="The fields of the first one are content, id: choose with --text-key"):
        run("text", [tmp_path / "a.jsonl"], tmp_path / "out")


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


# ------------------------------------------------------------------------------------------------ odd but legal, and damaged

CONVERSATION = [{"from": "human", "value": "which one?"}, {"from": "gpt", "value": "the red one"}]


def table_with_a_bad_text(rows: int, *, bad: int) -> pyarrow.Table:
    """Return a table with one string that is not UTF-8, and a column of times that Python's datetime cannot represent."""
    values = pyarrow.array([b"a red circle" if row != bad else b"\xc3\x28" for row in range(rows)], pyarrow.binary())
    times = pyarrow.array([10**18 + 1] * rows, pyarrow.timestamp("ns"))
    return pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), rows, values.buffers()), "when": times, "id": range(rows)})


@pytest.mark.parametrize("ending", ["parquet", "PARQUET", "arrow"])
def test_one_bad_text_of_a_table_costs_its_row(tmp_path: Path, ending: str) -> None:
    table, path = table_with_a_bad_text(300, bad=150), tmp_path / f"a.{ending}"
    if ending == "arrow":
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, path)
    found = run("text", [path], tmp_path / "out", lose=0.05)
    assert (found.samples, found.rejected) == (299, {"text is not UTF-8": 1})
    assert found.examples == [f"text is not UTF-8: {path}, record 151 (id 150)"]


def test_lost_records_and_images_are_listed(tmp_path: Path) -> None:
    """A file lists all of them; the summary lists the first three of each reason."""
    images = write_images(tmp_path / "images", ["0.jpg"])
    lines = [{"texts": ["a", None, None], "images": [None, f"{number}.jpg", "0.jpg"], "id": number} for number in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, lines), "{", '{"texts": 3, "url": "http://x/9"}']))
    found = run("obelics", [tmp_path / "a.jsonl"], tmp_path / "out", images=str(images), lose=0.9)
    assert found.rejected == {"malformed JSON": 1, "malformed texts list": 1} and found.dropped == {"image not found": 4}
    listed = [json.loads(line) for line in (tmp_path / "out" / ".prepared" / "00000.rejected.jsonl").read_text().splitlines()]
    assert [line["record"] for line in listed] == [2, 3, 4, 5, 6, 7]
    assert listed[0] == {"record": 2, "reason": "image not found", "what": "1.jpg", "id": "1"}
    assert listed[-1] == {"record": 7, "reason": "malformed texts list", "url": "http://x/9"}
    assert sum("image not found" in line for line in found.named()) == 3 and "record 7 (url http://x/9)" in str(found)
    (tmp_path / "a.jsonl").write_text(json.dumps({"texts": ["a"], "images": [None]}))
    assert run("obelics", [tmp_path / "a.jsonl"], tmp_path / "out", images=str(images)).examples == []
    assert not (tmp_path / "out" / ".prepared" / "00000.rejected.jsonl").exists()


def test_too_many_rejected_names_some(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"txt": "", "id": "first"}\n{"text": "x"}')
    with pytest.raises(ValueError, match=r"no text: 1.*\n  no text: .*a\.jsonl, record 1 \(id first\)"):
        run("text", [tmp_path / "a.jsonl"], tmp_path / "out")


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf" + json.dumps([{"text": "a"}, {"text": "b"}], indent=2).replace("\n", "\r\n").encode()])
def test_a_list_with_a_byte_order_mark(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    assert run("text", [tmp_path / "a.json"], tmp_path / "out").samples == 2


def test_json_that_is_damaged_in_the_middle(tmp_path: Path) -> None:
    """In a JSON list, the records before the damage are used; in JSON lines, all but the damaged lines."""
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}, {"text": "c"}])[:-6])
    found = run("text", [tmp_path / "list.json"], tmp_path / "list", lose=1)
    assert found.samples == 2 and "damaged after 2 records" in found.damaged[0]
    (tmp_path / "lines.jsonl").write_text('{"text": "cut\n{"text": "cut, too\n{"text": "a"}\n{"text": "b"}\n')
    found = run("text", [tmp_path / "lines.jsonl"], tmp_path / "lines", lose=1)
    assert found.samples == 2 and found.rejected == {"malformed JSON": 2}
    (tmp_path / "byte.json").write_bytes(b'[{"text": "a"}, {"text": "caf\xe9"}, {"text": "c"}]')
    found = run("text", [tmp_path / "byte.json"], tmp_path / "byte", lose=1)
    assert found.samples == 2 and found.rejected == {"text is not UTF-8": 1}
    (tmp_path / "wide.json").write_bytes(json.dumps([{"text": "a"}]).encode("utf-16"))
    with pytest.raises(ValueError, match=r"UTF-16.*iconv"):
        run("text", [tmp_path / "wide.json"], tmp_path / "wide")


def test_zstd_with_a_long_window(tmp_path: Path) -> None:
    """Similar to the output of `zstd --long=31`."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(b'{"text": "a"}\n') + packer.flush())
    assert run("text", [tmp_path / "a.jsonl.zst"], tmp_path / "out").samples == 1


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    """In a folder of `save_to_disk`, metadata files are not records, and cached results of `map` are not read."""
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    table = pyarrow.table({"text": ["a", "b"]})
    for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    for note in ("state.json", "dataset_info.json", "../dataset_dict.json"):
        (folder / note).write_text(json.dumps({"text": "about it"}))
    assert run("text", [tmp_path / "saved"], tmp_path / "out").samples == 2


def test_links_are_followed_and_broken_ones_are_counted(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.txt").write_text("b")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.txt").symlink_to(tmp_path / "nowhere")
    found = run("text", [tmp_path / "in"], tmp_path / "out", lose=0.5)
    assert found.samples == 2 and found.rejected == {"damaged input file": 1} and "gone.txt" in found.damaged[0]
    images = write_images(tmp_path / "pictures", ["COCO_1.jpg", "gone.jpg"])
    (images / "COCO_1.txt").write_text("a cross")
    (images / "gone.jpg").unlink()
    (images / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = run("pairs", [images], tmp_path / "pairs", lose=0.5)
    assert found.samples == 1 and found.rejected == {"image file cannot be read": 1}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train2014").symlink_to(images)
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "COCO_1.jpg", "caption": "a cross"}))
    assert run("pairs", [tmp_path / "q.jsonl"], tmp_path / "named", images=str(tmp_path / "linked")).samples == 1


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


def test_conversations_with_odd_turns(tmp_path: Path) -> None:
    """As they occur in LLaVA's mix and data sets derived from it."""
    entries = [
        {"id": 0, "image": "", "conversations": CONVERSATION},
        {"id": 1, "image": None, "conversations": CONVERSATION},
        {"id": 2, "conversations": [{"from": "gpt", "value": "hello"}, *CONVERSATION]},
        {"id": 3, "conversations": [*CONVERSATION, {"from": "human", "value": "thanks"}]},
        {"id": 4, "messages": [{"role": "system", "content": "be kind"}, {"role": "assistant", "content": "hi"}]},
        {"id": 5, "video": "a.mp4", "conversations": CONVERSATION},
    ]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    found = run("llava", [tmp_path / "a.json"], tmp_path / "out", lose=0.5)
    assert found.samples == 4 and found.dropped == {"turn without a question or an answer": 3}
    assert found.rejected == {"conversation about a video or a sound": 1, "conversation does not alternate questions and answers": 1}
    assert [[turn["value"] for turn in document["conversations"]] for document in documents(tmp_path / "out")] == 4 * [
        ["which one?", "the red one"]
    ]


def test_question_files_in_folders_and_tables(tmp_path: Path, demo_data: Path) -> None:
    """GQA's training questions are ten files; question sets are also republished as parquet files with images."""
    images = write_images(tmp_path / "images", ["1.jpg", "2.jpg"])
    for number in (1, 2):
        content = {f"0{number}": {"imageId": str(number), "question": "what?", "answer": "a cross"}}
        (tmp_path / "gqa").mkdir(exist_ok=True)
        (tmp_path / "gqa" / f"train_all_questions_{number}.json").write_text(json.dumps(content))
    assert run("tasks", [tmp_path / "gqa"], tmp_path / "a", form="gqa", images=str(images)).samples == 2
    assert run("tasks", [tmp_path / "gqa" / "*.json"], tmp_path / "b", form="gqa", images=str(images)).samples == 2
    rows = {
        "question": ["what?", "what?"],
        "image": [{"bytes": picture(), "path": "1.jpg"}] * 2,
        "answers": [["red", "blue", "red"], [None, "red", "red"]],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    assert run("tasks", [tmp_path / "t.parquet"], tmp_path / "c", form="textvqa").samples == 2
    assert [document["answer"] for document in documents(tmp_path / "c")] == ["red", "red"]
    assert indexed(tmp_path / "c", demo_data).kind == "tasks"
    with pytest.raises(ValueError, match=r"not a file in the format coco.*for example \{'category_id': 1"):
        (tmp_path / "instances.json").write_text(json.dumps({"images": [], "annotations": [{"category_id": 1}]}))
        run("tasks", [tmp_path / "instances.json"], tmp_path / "d", form="coco", images=str(images))


def test_an_empty_answer_or_caption_is_found_at_once(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["1.jpg"])
    captions = [{"image_id": 1, "caption": "a cross"}, {"image_id": 1, "caption": "\n"}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": captions}))
    found = run("tasks", [tmp_path / "coco.json"], tmp_path / "out", form="coco", images=str(images), lose=0.5)
    assert (found.samples, found.rejected) == (1, {"task without answer": 1})
