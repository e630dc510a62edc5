"""Conversations, questions and captions in their published form (LLaVA, VQAv2, COCO, ScienceQA ...)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from support.data_files import picture, write_tar
from support.published_runs import documents, indexed, run, write_images

CONVERSATION = [{"from": "human", "value": "which one?"}, {"from": "gpt", "value": "the red one"}]


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


def test_lost_questions_and_answers_are_named_by_file_place_and_question(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = write_images(tmp_path / "images", ["5.jpg"])
    questions = [{"question_id": n, "image_id": image, "question": "what?"} for n, image in ((70, 9), (71, 5), (72, 5))]
    answers = [{"question_id": n, "multiple_choice_answer": "two"} for n in (70, 71, 98, 99)]
    q, a = tmp_path / "q.json", tmp_path / "a.json"
    q.write_text(json.dumps({"questions": questions}))
    a.write_text(json.dumps({"annotations": answers}))
    caplog.set_level("INFO")
    found = run("tasks", [q], tmp_path / "out", lose=0.9, images=str(images), form="vqav2", annotations=str(a))
    assert documents(tmp_path / "out") == [{"task": "vqa", "question": "what?", "answer": "two", "images": ["0.jpg"]}]
    assert sorted(found.examples) == [
        f"answer without question: {a}, record 3 (question_id 98)",
        f"answer without question: {a}, record 4 (question_id 99)",
        f"image not found: {q}, record 1 (question_id 70, image 9.jpg)",
        f"question without answer: {q}, record 3 (question_id 72)",
    ]
    assert "has a data_subtype (such as train2014), so image 9 is looked up as 9.jpg" in caplog.text
    listed = [json.loads(line) for line in (tmp_path / "out" / ".prepared" / "00000.rejected.jsonl").read_text().splitlines()]
    assert {"record": 3, "reason": "answer without question", "what": "question_id 98", "file": str(a)} in listed


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
        ("aokvqa", [{"image_id": 7, "question": "q?", "direct_answers": ["a", "b", "b"]}], "train2017/000000000007.jpg", "b"),
        ("docvqa", {"data": [{"image": "documents/x_1.png", "question": "q?", "answers": ["a", "A"]}]}, "documents/x_1.png", "a"),
        ("docvqa", {"data": [{"image_local_name": "7.jpeg", "question": "q?", "answers": ["a"]}]}, "images/7.jpeg", "a"),
        ("ocrvqa", {"0761": {"questions": ["q?"], "answers": ["a"], "split": 1, "imageURL": "http://x/1.gif"}}, "0761.jpg", "a"),
        ("chartqa", [{"imgname": "7.png", "query": "q?", "label": "0.72"}], "7.png", "0.72"),
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


def test_questions_of_one_split_and_several_in_a_row(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["1.jpg", "2.jpg"])
    books = {str(n): {"questions": [f"who {n}?", f"what {n}?"], "answers": ["a", "b"], "split": n} for n in (1, 2)}
    (tmp_path / "in.json").write_text(json.dumps(books))
    run("tasks", [tmp_path / "in.json"], tmp_path / "out", images=str(images), form="ocrvqa", split="val")
    assert [document["question"] for document in documents(tmp_path / "out")] == ["who 2?", "what 2?"]
    run("tasks", [tmp_path / "in.json"], tmp_path / "both", images=str(images), form="ocrvqa", split="train,val")
    assert len(documents(tmp_path / "both")) == 4
    with pytest.raises(ValueError, match="no entry is in the split 'test': the splits are train, val"):
        run("tasks", [tmp_path / "in.json"], tmp_path / "none", images=str(images), form="ocrvqa", split="train,test")
    rows = {"image": [{"bytes": picture(), "path": "1"}], "questions": [["who?", "what?"]], "answers": [["a", "b"]]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "o.parquet")
    assert run("tasks", [tmp_path / "o.parquet"], tmp_path / "o", form="ocrvqa").samples == 2
    chart = {"image": [{"bytes": picture(), "path": "1"}], "query": ["which?"], "label": [["0.72"]]}
    pyarrow.parquet.write_table(pyarrow.table(chart), tmp_path / "c.parquet")
    run("tasks", [tmp_path / "c.parquet"], tmp_path / "c", form="chartqa")
    assert documents(tmp_path / "c") == [{"task": "vqa", "question": "which?", "answer": "0.72", "images": ["0.jpg"]}]


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


def test_conversations_in_tars_next_to_their_image(tmp_path: Path) -> None:
    """As in Megatron-LM's example, with LLaVA's path, and as questions for energon."""
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cross"}]
    described = [turns, {"image": "some/path.png", "conversations": turns}, {"question": "what?", "answer": "a cross"}]
    files = {
        f"{n}.{kind}": data
        for n, found in enumerate(described)
        for kind, data in (("jpg", picture()), ("json", json.dumps(found).encode()))
    }
    write_tar(tmp_path / "0.tar", files)
    found = run("llava", [tmp_path / "0.tar"], tmp_path / "out")
    assert (found.samples, found.images) == (3, 3)
    assert [document["conversations"][-1]["value"] for document in documents(tmp_path / "out")] == ["a cross"] * 3
