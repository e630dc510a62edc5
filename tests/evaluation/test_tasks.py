"""Every task reads its published files, and reports missing or damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.published_files import picture, write_all

from megatron_mm.evaluation.published import FIGURES, UNCONFIRMED
from megatron_mm.evaluation.results import Result, table
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
    if task.kind == "choice" and name != "mmmu":
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
        ValueError, match=r"task vqav2 needs .*v2_OpenEnded_mscoco_val2014_questions.json, which does not exist.*visualqa.org.* as --data"
    ):
        TASKS["vqav2"].examples(tmp_path)


@pytest.mark.parametrize("contents", ["{", '{"data": [{"image_id": 3}]}', "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, contents: str) -> None:
    (tmp_path / "textvqa").mkdir()
    (tmp_path / "textvqa" / "TextVQA_0.5.1_val.json").write_text(contents)
    with pytest.raises(ValueError, match=r"task textvqa: .*TextVQA_0.5.1_val.json .*restore it, or put"):
        TASKS["textvqa"].examples(tmp_path)


def test_a_folder_of_images_that_is_not_there_is_named(files: Path, tmp_path: Path) -> None:
    """A missing image loses one item; if none exist at all, that is an error before the model is built."""
    shutil.copytree(files / "textvqa", tmp_path / "textvqa")
    (tmp_path / "textvqa" / "train_images").rename(tmp_path / "textvqa" / "pictures")
    with pytest.raises(ValueError, match=r"none of the 2 images that were checked exists; the first is .*val0.jpg: put .*train_images"):
        TASKS["textvqa"].examples(tmp_path)


def test_examples_of_one_number_are_kept_apart_and_counted(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(files / "textvqa", tmp_path / "textvqa")
    path = tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"
    (first, second) = json.loads(path.read_text())["data"]
    path.write_text(json.dumps({"data": [first, second, first, {**first, "question": "What else?"}]}))
    assert [example.key for example in TASKS["textvqa"].examples(tmp_path)] == ["0", "1", "0~2"]
    assert "1 examples occur more than once" in caplog.text and "1 examples share an id with another example" in caplog.text


def test_questions_without_answers_are_counted(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "vqav2", tmp_path / "vqav2")
    path = tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"
    path.write_text(json.dumps({"annotations": json.loads(path.read_text())["annotations"][:1]}))
    with pytest.raises(ValueError, match=r"v2_mscoco_val2014_annotations.json has no answers to 2 of the 3 questions in .*, such as 1"):
        TASKS["vqav2"].examples(tmp_path)


def test_mmbench_without_other_orders_gets_them(files: Path, tmp_path: Path) -> None:
    """The benchmark's first version has each question once; its evaluation asks every rotation of the choices."""
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


def test_open_questions_of_mmmu_have_all_of_their_answers_and_images(files: Path) -> None:
    choice, free = TASKS["mmmu"].examples(files)
    assert choice.choices == ("cat", "dog") and choice.answers == ("B",)
    assert free.choices == () and free.answers == ("24/7", "3.429") and len(free.images) == 2


def test_marks_and_line_breaks_of_unicode_are_read(files: Path, tmp_path: Path) -> None:
    """Byte order marks before JSON, JSON lines and tables, and Unicode line separators inside a text."""
    for name, file in (
        ("vizwiz", "val.json"),
        ("pope", "coco_pope_random.json"),
        ("mmbench", "MMBench_DEV_EN.tsv"),
        ("webqs", "test.jsonl"),
    ):
        shutil.copytree(files / name, tmp_path / name)
        path = tmp_path / name / file
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    path.write_text(json.dumps({"question": "one\u2028two\x85three", "answers": ["Zürich", "東京"]}, ensure_ascii=False) + "\n\n")
    for name in ("vizwiz", "pope", "mmbench"):
        assert len(TASKS[name].examples(tmp_path)) == len(TASKS[name].examples(files))
    (one,) = TASKS["webqs"].examples(tmp_path)
    assert one.question == "Question: one\u2028two\x85three\nAnswer:" and one.answers == ("Zürich", "東京")
    path.write_bytes('{"question": "Z\xfcrich"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"webqs/test.jsonl cannot be read as JSON lines \('utf-8' codec"):
        TASKS["webqs"].examples(tmp_path)
    path.write_text('{"question": "a", "answers": ["b"]}\n{"question"\n')
    with pytest.raises(ValueError, match=r"webqs/test.jsonl cannot be read as JSON lines, line 2 \("):
        TASKS["webqs"].examples(tmp_path)


def test_examples_without_an_answer_are_left_out_and_counted(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(files / "vizwiz", tmp_path / "vizwiz")
    path = tmp_path / "vizwiz" / "val.json"
    first, second = json.loads(path.read_text())
    second["answers"] = [{"answer": ""}] * 10
    path.write_text(json.dumps([first, second]))
    assert len(TASKS["vizwiz"].examples(tmp_path)) == 1
    assert f"1 of 2 examples have no answer and are left out; the first is {second['image']}" in caplog.text
    path.write_text(json.dumps([second]))
    with pytest.raises(ValueError, match=r"all 1 examples of val.json have no answer: the answers of some splits are not published"):
        TASKS["vizwiz"].examples(tmp_path)
    first["answers"] = [{"answer": ""}] * 9 + [{"answer": "a cup"}]
    path.write_text(json.dumps([first]))
    assert TASKS["vizwiz"].examples(tmp_path)[0].shown == "a cup", "a demonstration has an answer to show"


def test_damaged_rows_of_mmbench_cost_themselves(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head, row = (files / "mmbench" / "MMBench_DEV_EN.tsv").read_text().splitlines()[:2]
    image = row.split("\t")[-1]
    rows = [row, f"6\tWhich?\t\tcat\t\tcow\tdog\tD\tanimals\t{image}", f"7\tWhich?\t\tcat\tdog\t\t\tC\tanimals\t{image}"]
    rows += [f"8\tWhich?\t\tcat\tdog\t\t\t\tanimals\t{image}", "9\tWhich?\t\tcat\tdog\t\t\tA\tanimals\tabcde"]
    (tmp_path / "mmbench").mkdir()
    (tmp_path / "mmbench" / "MMBench_DEV_EN.tsv").write_text("\n".join([head, *rows]))
    found = {example.key: example for example in TASKS["mmbench"].examples(tmp_path)}
    assert {key for key in found if len(key) == 1} == {"5", "6", "9"}
    assert found["6"].choices == ("cat", "", "cow", "dog"), "a letter keeps its place"
    assert found["9"].images[0].read() == b""
    assert (
        "1 of 10 examples have no answer" in caplog.text and "1 of 9 examples have an answer that is not among their choices" in caplog.text
    )


def test_other_folders_beside_the_categories_of_mme_are_not_read(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "mme", tmp_path / "mme")
    (tmp_path / "mme" / "eval_tool").mkdir()
    (tmp_path / "mme" / "eval_tool" / "readme.txt").write_text("how to use it")
    assert len(TASKS["mme"].examples(tmp_path)) == len(TASKS["mme"].examples(files))


def test_a_method_that_does_not_go_with_a_task_is_refused() -> None:
    TASKS["pope"].check_method("rank")
    TASKS["scienceqa"].check_method("generate")
    with pytest.raises(ValueError, match="--method rank cannot be used with task vqav2: it has no choices"):
        TASKS["vqav2"].check_method("rank")
    with pytest.raises(ValueError, match="--method generate cannot be used with task piqa: its choices are whole texts"):
        TASKS["piqa"].check_method("generate")


def test_groups_and_unknown_names() -> None:
    assert [task.name for task in tasks_of(["infimm", "vqav2"])] == ["coco_caption", "vqav2", "textvqa", "okvqa"]
    with pytest.raises(ValueError, match="unknown task 'cocoa': choose from coco_caption"):
        tasks_of(["cocoa"])


def test_published_figures_are_of_known_recipes_and_tasks() -> None:
    from megatron_mm.families.recipes import RECIPES

    assert {task for _, task, _ in FIGURES} <= set(TASKS) and set(GROUPS) >= {"mm1", "infimm"}
    unknown = {recipe for recipe, _, _ in FIGURES} - set(RECIPES)
    assert all(recipe.endswith("_sft") for recipe in unknown)


def test_the_table_says_which_published_figures_are_not_confirmed() -> None:
    def lines(recipe: str, task: str) -> str:
        setting = {"task": task, "shots": 8, "limit": None, "model": {"checkpoint": "step_00000001"}}
        result = Result(task, TASKS[task].title, TASKS[task].metric, {"score": 10.0}, setting, 2, 0, {}, "", 1.0)
        return "\n".join(table([result], recipe=recipe))

    assert "123.1?" in lines("mm1_30b", "coco_caption") and UNCONFIRMED in lines("mm1_30b", "coco_caption")
    assert "116.3?" in lines("mm1_7b", "coco_caption") and "63.6 " in lines("mm1_7b", "vqav2"), "two sources give this one"
    assert "114.6 " in lines("mm1_3b", "coco_caption") and UNCONFIRMED not in lines("mm1_3b", "coco_caption")
    assert all(figure.source for figure in FIGURES.values())
