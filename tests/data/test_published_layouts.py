"""Published data in unusual forms: images inside records, tables in folders, several splits, conversations of other tools."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data_files import picture, write_tar
from support.published_runs import lines, run

from megatron_mm.data.prepare.notes import is_note
from megatron_mm.data.prepare.published.chats import usual_chat
from megatron_mm.data.prepare.published.losses import DamagedFile
from megatron_mm.data.prepare.published.records import iterate_records
from megatron_mm.data.text.conversations import conversation_turns
from megatron_mm.data.text.keys import USUAL

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def samples(out: Path) -> list[tuple[str, list[bytes]]]:
    """Return (document, images) of each sample of a source, read with Python's tarfile instead of the package's reader."""
    found = []
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as archive:
            images: list[bytes] = []
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                if member.name.endswith((".json", ".txt")):
                    found.append((file.read().decode(), images))
                    images = []
                else:
                    images.append(file.read())
    return found


# ------------------------------------------------------------------------------------------------------- folders and tables


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_table_in_a_folder_describes_its_images(tmp_path: Path, table: str) -> None:
    """Hugging Face's imagefolder; images that the table does not name use the text files next to them, and losses are counted."""
    folder = tmp_path / "in" / "train"
    for number, name in enumerate(["0.jpg", "sub/1.jpg", "2.jpg", "3.jpg"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(size=(10 + number, 9)))
    (folder / "2.txt").write_text("its own text")
    rows = [{"file_name": name, "text": f"about {name}"} for name in ("0.jpg", "sub/1.jpg", "gone.jpg", "../../outside.jpg")]
    (tmp_path / "outside.jpg").write_bytes(picture())
    if table.endswith(".jsonl"):
        lines(folder / table, rows)
    elif table.endswith(".csv"):
        (folder / table).write_text("file_name,text\n" + "".join(f'{row["file_name"]},"{row["text"]}"\n' for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / table)
    found = run("pairs", tmp_path / "in", tmp_path / "out", lose=0.6)
    assert [text for text, _ in samples(tmp_path / "out")] == ["about 0.jpg", "about sub/1.jpg", "its own text"]
    assert found.rejected == {"image not found": 2, "no text": 1}
    (folder / "2.txt").write_text("another text")  # the folder's modification time does not change
    assert run("pairs", tmp_path / "in", tmp_path / "out", lose=0.6).samples == 3
    assert samples(tmp_path / "out")[2][0] == "another text"


@pytest.mark.parametrize("name", ["image_file_name", "file_names"])
def test_other_names_of_the_image_in_a_folders_table(tmp_path: Path, name: str) -> None:
    """`datasets` 4 and later."""
    (tmp_path / "f" / "sub").mkdir(parents=True)
    (tmp_path / "f" / "sub" / "0.jpg").write_bytes(picture())
    row = {name: "sub/0.jpg" if name == "image_file_name" else ["sub/0.jpg"], "text": "a cross"}
    (tmp_path / "f" / "metadata.jsonl").write_text(json.dumps(row))
    assert run("pairs", tmp_path / "f", tmp_path / "out").samples == 1


def test_the_table_beside_a_tar_of_img2dataset_holds_no_samples_of_its_own(tmp_path: Path) -> None:
    described = json.dumps({"url": "http://x/1.jpg", "caption": "a cross", "key": "000000001"}).encode()
    write_tar(tmp_path / "in" / "00000.tar", {"000000001.jpg": picture(), "000000001.json": described})
    rows = {"url": ["http://x/1.jpg", "http://x/2.jpg"], "caption": ["a cross", "lost"], "status": ["success", "failed_to_download"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "in" / "00000.parquet")
    for images in (None, str(tmp_path / "in")):
        assert run("pairs", tmp_path / "in", tmp_path / f"out{bool(images)}", images=images).samples == 1


def test_a_folder_of_several_splits_is_said_and_a_column_chooses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"question": ["what?"] * 2, "answer": ["a", "b"], "image": [{"bytes": picture(), "path": "1"}] * 2, "split": ["train", "test"]}
    for name in ("train-00000-of-00001.parquet", "validation-00000-of-00001-1a2b.parquet"):
        (tmp_path / "data").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(row), tmp_path / "data" / name)
    found = run("tasks", tmp_path / "data", tmp_path / "out", form="gqa", split="train")
    assert "has files of several splits (train, validation), and all are converted" in caplog.text
    assert (found.samples, found.left_out) == (2, {"of the split test": 2})
    caplog.clear()
    run("tasks", tmp_path / "data" / "train-*", tmp_path / "train", form="gqa")
    assert "splits" not in caplog.text
    with pytest.raises(ValueError, match="no samples in 2 inputs: of the split train: 2, of the split test: 2"):
        run("tasks", tmp_path / "data", tmp_path / "none", form="gqa", split="val")
    pyarrow.parquet.write_table(pyarrow.table(row).drop(["split"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no column `split`"):
        run("tasks", tmp_path / "a.parquet", tmp_path / "a", form="gqa", split="train")


def test_the_folder_of_a_saved_dataset_dict_has_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pyarrow.table({"text": ["a"]})
    for split in ("train", "test"):
        (tmp_path / "d" / split).mkdir(parents=True)
        with pyarrow.ipc.new_stream(tmp_path / "d" / split / "data-00000-of-00001.arrow", table.schema) as file:
            file.write_table(table)
    assert run("text", tmp_path / "d", tmp_path / "out").samples == 2
    assert "has files of several splits (test, train), and all are converted" in caplog.text


def test_a_list_of_captions_is_several_pairs(tmp_path: Path) -> None:
    """Flickr30k as parquet; COCO in LAVIS' form has a list for validation only."""
    rows: list[dict[str, Any]] = [
        {"image": "0.jpg", "caption": ["a", "b"]},
        {"image": "0.jpg", "caption": "c"},
        {"image": "0.jpg", "caption": ["d"], "text": "e"},
    ]
    (tmp_path / "im").mkdir()
    (tmp_path / "im" / "0.jpg").write_bytes(picture())
    run("pairs", lines(tmp_path / "a.jsonl", rows), tmp_path / "out", images=str(tmp_path / "im"))
    assert [document for document, _ in samples(tmp_path / "out")] == ["a", "b", "c", "e"]
    more = lines(tmp_path / "b.jsonl", [rows[1], {"image": "0.jpg", "caption": [1]}])
    assert run("pairs", more, tmp_path / "b", images=str(tmp_path / "im"), lose=0.5).rejected == {"caption is not text": 1}


def test_compressed_files_in_a_tar(tmp_path: Path) -> None:
    """As in webdataset's own test data."""
    write_tar(tmp_path / "0.tar", {"a.txt.gz": gzip.compress(b"one"), "b.json.gz": gzip.compress(b'{"text": "two"}'), "c.txt.gz": b"x"})
    found = run("text", tmp_path / "0.tar", tmp_path / "out", lose=0.5)
    assert (found.samples, found.rejected) == (2, {"damaged .gz file in a tar": 1})


def test_records_beside_images_are_read(tmp_path: Path) -> None:
    """A table in a folder of images, or with the folder's name, is not skipped because images exist."""
    folder = tmp_path / "in" / "photos"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(picture())
    (folder / "0.txt").write_text("a photo")
    table = pyarrow.table({"image": pyarrow.array([{"bytes": picture(size=(5, 5)), "path": None}], IMAGE), "text": ["in a table"]})
    pyarrow.parquet.write_table(table, folder / "more.parquet")
    lines(tmp_path / "in" / "photos.jsonl", [{"image": "data:image/png;base64," + base64.b64encode(picture()).decode(), "text": "a line"}])
    assert run("pairs", tmp_path / "in", tmp_path / "out").samples == 3
    assert sorted(text for text, _ in samples(tmp_path / "out")) == ["a line", "a photo", "in a table"]


@given(st.lists(st.lists(st.text(st.characters(blacklist_categories=["Cs"])), min_size=2, max_size=2), min_size=1))
def test_rows_of_csv_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    import csv

    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["a", "b"], *rows])
    assert list(iterate_records(str(path))) == [dict(zip("ab", row, strict=True)) for row in rows]


def test_damaged_csv_is_an_error_behind_its_good_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b'text\tn\none\t1\ntwo\ncaf\xe9\t3\n"cut off\t4')
    records = iterate_records(str(path))
    assert next(records) == {"text": "one", "n": "1"}
    assert getattr(next(records), "reason", None) == "row with a different number of fields than the first line"
    assert next(records) == {"text": "caf\udce9", "n": "3"}
    with pytest.raises(DamagedFile, match="cannot be read beyond line"):
        next(records)


def test_names_of_notes() -> None:
    for name in ("README.md", "LICENSE", "readme.txt", "LICENSE-2.0.txt", "README_zh.md", "a/.hidden.jsonl", "__MACOSX/._a", "state.json"):
        assert is_note(name), name
    for name in ("license_plates.jsonl", "README.jsonl", "readmes.txt", "licenses.parquet", "LICENSE.tar", "data.json"):
        assert not is_note(name), name


# ------------------------------------------------------------------------------------------------------------ images inside


def test_images_inside_of_interleaved_documents(tmp_path: Path) -> None:
    data = [picture(size=(7, 8)), picture(size=(8, 7))]
    images = [[{"bytes": data[0], "path": None}, None, {"bytes": data[1], "path": "b.jpg"}, {"bytes": None, "path": None}]]
    table = pyarrow.table({"images": pyarrow.array(images, pyarrow.list_(IMAGE)), "texts": [[None, "between", None, "after"]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert run("obelics", tmp_path / "a.parquet", tmp_path / "o").images == 2
    ((document, found),) = samples(tmp_path / "o")
    assert found == data and [*json.loads(document)["items"]] == [
        {"image": "0.jpg"},
        {"text": "between"},
        {"image": "1.jpg"},
        {"text": "after"},
    ]
    info = [{"image_name": "x.jpg", "image_base64": base64.b64encode(data[0]).decode(), "matched_text_index": 1}]
    lines(tmp_path / "a.jsonl", [{"text_list": ["one", "two"], "image_info": info}])
    run("mmc4", tmp_path / "a.jsonl", tmp_path / "m")
    ((document, found),) = samples(tmp_path / "m")
    assert found == [data[0]] and [*json.loads(document)["items"]][1] == {"image": "0.jpg"}


def test_chats_with_images_among_their_words(tmp_path: Path) -> None:
    (tmp_path / "im").mkdir()
    (tmp_path / "im" / "0.jpg").write_bytes(picture(size=(7, 8)))
    inside, answer = picture(size=(8, 7)), {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    question = {"type": "text", "text": "what?"}

    def chat(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": "developer", "content": "be kind"}, {"role": "user", "content": [*parts]}, answer]}

    encoded = "data:image/jpeg;base64," + base64.b64encode(inside).decode()
    chats = [
        chat({"type": "image_url", "image_url": {"url": "0.jpg", "detail": "low"}}, question),
        chat(question, {"type": "image_url", "image_url": {"url": encoded}}),
        chat({"type": "image", "image": "file://0.jpg"}, question, {"type": "image_url", "image_url": encoded}),
        {**chat({"type": "image"}, question), "images": ["0.jpg"]},
        chat({"type": "image_url", "image_url": {"url": "https://example.org/1.jpg"}}, question),
        {
            "images": [encoded, "0.jpg"],
            "texts": [{"user": "which?", "assistant": "this", "source": "x"}, {"user": "why?", "assistant": "so"}],
        },
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "bing", "value": "yo"}]},
    ]
    found = run("llava", lines(tmp_path / "a.jsonl", chats), tmp_path / "out", lose=0.2, images=str(tmp_path / "im"))
    assert found.rejected == {"image not found": 1}
    outside, written = (tmp_path / "im" / "0.jpg").read_bytes(), samples(tmp_path / "out")
    assert [images for _, images in written] == [[outside], [inside], [outside, inside], [outside], [inside, outside], []]
    turns = [conversation_turns(json.loads(document)) for document, _ in written]
    assert [turn.system for (turn, *_) in turns[:4]] == ["be kind"] * 4
    assert [sum(not isinstance(part, str) for part in turn[0].question) for turn in turns] == [1, 1, 2, 1, 2, 0]
    assert turns[1][0].question[0] == "what?" and len(turns[4]) == 2
    assert not any("base64" in document for document, _ in written)


def test_chats_in_the_forms_of_training_tools(tmp_path: Path) -> None:
    """LLaMA-Factory, ms-swift, Qwen-VL, XComposer, Alpaca and InternVL: system prompts, history and images without marks are kept."""
    (tmp_path / "im").mkdir()
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / "im" / name).write_bytes(picture(size=(8, 9 + int(name[0]))))
    plain = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat", "loss": True}]
    parts = [{"type": "image_url", "value": "0.jpg"}, {"type": "text", "value": "what?"}]
    source = {"type": "base64", "media_type": "image/jpeg", "data": base64.b64encode(picture()).decode()}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    chats: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "value": "a cat"}]}]},
        {"system": "be kind", "conversations": plain, "image": "0.jpg"},
        {"conversations": [{"from": "user", "value": "P 1: <img>0.jpg</img> <img>1.jpg</img>\nwhat?"}, plain[1]]},
        {"conversations": [{"from": "user", "value": "<ImageHere>what?"}, plain[1]], "image": ["1.jpg"]},
        {"system_prompt": "be kind", "instruction": "what", "input": "is it?", "output": "a cat", "image": "0.jpg"},
        {"query": "what?", "response": "a cat", "history": [["hi", "yo"]], "images": ["0.jpg", "1.jpg"]},
        {"conversation": [{"human": "hi", "assistant": "yo"}, {"human": "what?", "assistant": "a cat"}]},
        {"question": "what?", "answer": "a cat", "image_url": "0.jpg"},
        {"conversations": [{"from": "human", "value": "is <img>this</img> an image?"}, plain[1]]},
        {"conversation": plain, "images": [{"image": {"bytes": None, "path": "0.jpg"}}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "what?"}]}, answer]},
    ]
    run("llava", lines(tmp_path / "a.jsonl", chats), tmp_path / "out", images=str(tmp_path / "im"))
    written = samples(tmp_path / "out")
    turns = [conversation_turns(json.loads(document)) for document, _ in written]
    assert [len(images) for _, images in written] == [1, 1, 2, 1, 1, 2, 0, 1, 0, 1, 1]
    assert [said[0].system for said in turns] == ["", "be kind", "", "", "be kind", "", "", "", "", "", ""]
    assert all(said[-1].answer == "a cat" for said in turns) and [len(said) for said in turns] == [1, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1]
    assert [part for part in turns[2][0].question if isinstance(part, str)] == ["P 1: ", " ", "\nwhat?"]
    assert turns[4][0].question[1:] == ("\nwhat\nis it?",) and len(turns[5][0].question) == 4
    listed = {"set": {"root": "images/", "annotation": "a.jsonl", "repeat_time": 1, "length": 7}}
    with pytest.raises(ValueError, match="a list of data sets: convert the `annotation` of each"):
        run("llava", lines(tmp_path / "b.jsonl", [listed]), tmp_path / "b")


def test_lists_that_datasets_stores_as_columns(tmp_path: Path) -> None:
    """A `Sequence` of a dictionary."""
    talk = {"from": ["human", "gpt"], "value": ["what?", "a cat"]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"conversations": talk}]), tmp_path / "a.parquet")
    run("llava", tmp_path / "a.parquet", tmp_path / "a")
    assert [conversation_turns(json.loads(document))[0].answer for document, _ in samples(tmp_path / "a")] == ["a cat"]
    answers = {"answer": ["a", "b", "b"], "answer_id": [1, 2, 3]}
    rows = [{"question": "what?", "answers": answers, "image": {"bytes": picture(), "path": "1"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    run("tasks", tmp_path / "b.parquet", tmp_path / "b", form="vqav2")
    assert [json.loads(document)["answer"] for document, _ in samples(tmp_path / "b")] == ["b"]


def test_a_table_of_addresses_says_that_it_has_no_images(tmp_path: Path) -> None:
    row = {"URL": "http://x/1.jpg", "TEXT": "a cross"}
    with pytest.raises(ValueError, match=r"no --images folder is given: 1\..*\n.*record 1 \(URL http://x/1.jpg\)"):
        run("pairs", lines(tmp_path / "a.jsonl", [row]), tmp_path / "out")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "image", "image_url", "url", "role", "from", "value", "content", "user", "assistant"]), inner
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["messages", "conversations", "images", "image", "texts", "video", "history", "query", "system"]), _json
    )
)
def test_any_record_is_a_chat_or_a_reason(record: dict[str, Any]) -> None:
    from megatron_mm.data.prepare.published.layouts import Context, llava
    from megatron_mm.data.text.items import BadDocument

    before = repr(record)
    usual_chat(record, USUAL)
    with contextlib.suppress(BadDocument):
        llava(record, Context())
    assert repr(record) == before


# ---------------------------------------------------------------------------------------------------- questions and captions


def test_captions_are_taught_once(tmp_path: Path) -> None:
    """TextCaps repeats all captions of an image with each of them; Karpathy's files hold several splits."""
    for name in ("a", "b"):
        (tmp_path / "im" / "val2014").mkdir(parents=True, exist_ok=True)
        (tmp_path / "im" / "val2014" / f"{name}.jpg").write_bytes(picture())
    entries = [{"image_id": "a", "caption_str": text, "reference_strs": ["one", "two"]} for text in ("one", "two")]
    (tmp_path / "textcaps.json").write_text(json.dumps({"data": [*entries, {"image_id": "b", "reference_strs": ["three", "four"]}]}))
    options: dict[str, Any] = {"images": str(tmp_path / "im")}
    run("pairs", tmp_path / "textcaps.json", tmp_path / "t", form="textcaps", **options)
    assert [text for text, _ in samples(tmp_path / "t")] == ["one", "two", "three", "four"]
    split = [
        {"filepath": "val2014", "filename": f"{name}.jpg", "split": where, "sentences": [{"raw": f"{name} {n}"} for n in range(2)]}
        for name, where in (("a", "train"), ("b", "test"))
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": split}))
    run("pairs", tmp_path / "karpathy.json", tmp_path / "k", form="karpathy", split="train", **options)
    assert [text for text, _ in samples(tmp_path / "k")] == ["a 0", "a 1"]
    assert run("tasks", tmp_path / "karpathy.json", tmp_path / "all", form="karpathy", **options).samples == 4
    with pytest.raises(ValueError, match=r"no entry is in the split 'dev': the splits are test, train"):
        run("pairs", tmp_path / "karpathy.json", tmp_path / "k2", form="karpathy", split="dev", **options)
    with pytest.raises(ValueError, match=r"format textcaps takes no --split"):
        run("pairs", tmp_path / "textcaps.json", tmp_path / "k3", form="textcaps", split="train", **options)


def test_pictures_of_coco_under_their_later_name_and_laion_by_address(tmp_path: Path) -> None:
    (tmp_path / "im" / "train2017").mkdir(parents=True)
    (tmp_path / "im" / "train2017" / "000000000009.jpg").write_bytes(picture())
    (tmp_path / "im" / "x.jpg").write_bytes(picture())
    (tmp_path / "im" / "x.json").write_text(json.dumps({"url": "http://x/1.jpg?w=2"}))
    records = [{"image": "COCO_train2014_000000000009.jpg", "text": "a"}, {"URL": "http://x/1.jpg?w=2", "TEXT": "b"}]
    found = run("pairs", lines(tmp_path / "a.jsonl", records), tmp_path / "out", images=str(tmp_path / "im"))
    assert found.samples == 2
    missing = lines(tmp_path / "b.jsonl", [{"image": "COCO_train2014_000000000010.jpg", "text": "a"}])
    with pytest.raises(ValueError, match=r"1 of 1 records \(100.0%\) are rejected, and nothing is left: image not found: 1"):
        run("pairs", missing, tmp_path / "out2", images=str(tmp_path / "im"), lose=1.0)


# -------------------------------------------------------------------------------------------------- links, pipes and frames
