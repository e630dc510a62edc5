"""Every task reads its published files, and says what is missing or damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.published_files import picture, write_all

from megatron_mm.evaluation.published import FIGURES
from megatron_mm.evaluation.tasks.registry import GROUPS, TASKS, tasks_of

FROM_FILES = [name for name in TASKS if not name.startswith("drawn")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_all(data := tmp_path_factory.mktemp("tasks") / "data")
    return data


@pytest.mark.parametrize("name", FROM_FILES)
def test_a_task_reads_its_files(files: Path, name: str) -> None:
    task = TASKS[name]
    examples = task.examples(files)
    if task.demonstrations is not None:
        examples = examples + task.training_examples(files)
    assert all(example.key and example.answers and example.answer for example in examples)
    assert all(image.read() for example in examples for image in example.images)
    assert len({example.key for example in task.examples(files)}) == len(task.examples(files))
    if task.kind == "choice":
        assert all(example.answers[0] in "ABCDEFGHI"[: len(example.choices)] for example in examples)


def test_some_examples_are_as_their_files_say(files: Path) -> None:
    (train, restval, other) = TASKS["coco_caption"].training_examples(files)
    assert restval.answers == ("a green square 0.", "a green square 1.") and len({train.key, restval.key, other.key}) == 3
    vqa = TASKS["vqav2"].examples(files)[0]
    assert vqa.question == "What colour is square 0?" and vqa.shown == "red" and len(vqa.answers) == 10
    assert [example.key for example in TASKS["scienceqa"].examples(files)] == ["1", "2"]
    first, turned = TASKS["mmbench"].examples(files)
    assert first.images[0].read() == turned.images[0].read() and turned.answers == ("B",)
    assert TASKS["winogrande"].examples(files)[0].choices == ("Ann cried.", "Bob cried.")


def test_a_missing_file_is_named_with_where_it_is_published(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"task vqav2 needs .*v2_OpenEnded_mscoco_val2014_questions.json, which does not exist.*visualqa.org"
    ):
        TASKS["vqav2"].examples(tmp_path)


@pytest.mark.parametrize("contents", ["{", '{"data": [{"image_id": 3}]}', "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, contents: str) -> None:
    (tmp_path / "textvqa").mkdir()
    (tmp_path / "textvqa" / "TextVQA_0.5.1_val.json").write_text(contents)
    with pytest.raises(ValueError, match=r"task textvqa: .*TextVQA_0.5.1_val.json .*restore it, or put"):
        TASKS["textvqa"].examples(tmp_path)


def test_a_folder_of_images_that_is_not_there_is_named(files: Path, tmp_path: Path) -> None:
    """One missing image costs an item; none of them at all is an error before the model is built."""
    shutil.copytree(files / "textvqa", tmp_path / "textvqa")
    (tmp_path / "textvqa" / "train_images").rename(tmp_path / "textvqa" / "pictures")
    with pytest.raises(ValueError, match=r"none of 2 images that were looked for exists; the first is .*val0.jpg: put .*train_images"):
        TASKS["textvqa"].examples(tmp_path)


def test_examples_of_one_number_are_kept_apart_and_counted(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(files / "textvqa", tmp_path / "textvqa")
    path = tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"
    (first, second) = json.loads(path.read_text())["data"]
    path.write_text(json.dumps({"data": [first, second, first, {**first, "question": "What else?"}]}))
    assert [example.key for example in TASKS["textvqa"].examples(tmp_path)] == ["0", "1", "0~2"]
    assert "1 examples stand twice" in caplog.text and "1 examples have the number of another one" in caplog.text


def test_questions_without_answers_are_counted(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "vqav2", tmp_path / "vqav2")
    path = tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"
    path.write_text(json.dumps({"annotations": json.loads(path.read_text())["annotations"][:1]}))
    with pytest.raises(ValueError, match=r"v2_mscoco_val2014_annotations.json has no answers to 2 of the 3 questions of .*, such as 1"):
        TASKS["vqav2"].examples(tmp_path)


def test_mmbench_without_other_orders_gets_them(files: Path, tmp_path: Path) -> None:
    """The first version of the benchmark has each question once; its evaluation asks in every rotation."""
    (tmp_path / "mmbench").mkdir()
    lines = (files / "mmbench" / "MMBench_DEV_EN.tsv").read_text().splitlines()
    (tmp_path / "mmbench" / "MMBench_DEV_EN.tsv").write_text("\n".join(lines[:2]) + "\n")
    asked = TASKS["mmbench"].examples(tmp_path)
    assert [(one.key, one.choices, one.answers) for one in asked] == [
        ("5", ("cat", "dog"), ("A",)),
        ("1000005", ("dog", "cat"), ("B",)),
    ]


def test_mme_reads_parquet_and_says_which_categories_are_missing(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    image = {"bytes": picture("red"), "path": "1.jpg"}
    rows = [
        {"question_id": "count/1.jpg", "image": image, "question": "Are there two?", "answer": answer, "category": "count"}
        for answer in ("Yes", "No")
    ]
    (tmp_path / "mme" / "data").mkdir(parents=True)
    table.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mme" / "data" / "test-00000-of-00001.parquet")
    asked = TASKS["mme"].examples(tmp_path)
    assert [(one.key, one.answers, one.category) for one in asked] == [
        ("count/1.jpg#0", ("yes",), "count"),
        ("count/1.jpg#1", ("no",), "count"),
    ]
    assert "lacks 13 of its 14 categories" in caplog.text


def test_groups_and_unknown_names() -> None:
    assert [task.name for task in tasks_of(["infimm", "vqav2"])] == ["coco_caption", "vqav2", "textvqa", "okvqa"]
    with pytest.raises(ValueError, match="unknown task 'cocoa': choose from coco_caption"):
        tasks_of(["cocoa"])


def test_published_figures_are_of_known_recipes_and_tasks() -> None:
    from megatron_mm.families.recipes import RECIPES

    assert {task for _, task, _ in FIGURES} <= set(TASKS) and set(GROUPS) >= {"mm1", "infimm"}
    unknown = {recipe for recipe, _, _ in FIGURES} - set(RECIPES)
    assert all(recipe.endswith("_sft") for recipe in unknown)
