"""Questions with given answers: ScienceQA, MMMU, SEED-Bench, MMBench (the most likely letter), POPE and MME (yes or no)."""

from __future__ import annotations

import ast
import base64
import csv
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mm.evaluation.metrics.choices import (
    MME_COGNITION,
    MME_PERCEPTION,
    accuracy_scores,
    circular_scores,
    mme_scores,
    pope_scores,
)
from megatron_mm.evaluation.metrics.mmmu import mmmu_scores
from megatron_mm.evaluation.tasks.base import (
    LETTERS,
    Example,
    ImageSource,
    Split,
    Task,
    annotated,
    parsed,
    read_json,
    read_json_lines,
    read_parquet,
)

logger = logging.getLogger(__name__)


def scienceqa(folder: Path, *, split: str) -> list[Example]:
    """Read the questions of a split that have an image."""

    def rows() -> list[Example]:
        problems = read_json(folder / "problems.json")
        found = []
        for key in read_json(folder / "pid_splits.json")[split]:
            row = problems[key]
            if row["image"]:
                image = ImageSource(folder / "images" / split / key / row["image"])
                letter = LETTERS[row["answer"]]
                found.append(
                    Example(
                        key,
                        (image,),
                        row["question"],
                        (letter,),
                        choices=tuple(row["choices"]),
                        context=row.get("hint") or "",
                        category=row["subject"],
                    )
                )
        return found

    return parsed(folder / "problems.json", rows)


def mmmu(folder: Path, *, split: str) -> list[Example]:
    """Read the questions of all subjects from the Hugging Face data set's files, SUBJECT/SPLIT-*.parquet. Open ones have no choices."""
    found = []
    for path in sorted(folder.glob(f"*/{split}-*.parquet")):
        found += _mmmu_subject(path)
    return found


def _mmmu_subject(path: Path) -> list[Example]:
    return parsed(path, lambda: [_mmmu_row(row, subject=path.parent.name) for row in read_parquet(path)])


def _mmmu_row(row: dict[str, Any], *, subject: str) -> Example:
    images = [row[f"image_{number}"] for number in range(1, 8) if row.get(f"image_{number}")]
    is_choice = row["question_type"] == "multiple-choice"
    return Example(
        key=row["id"],
        images=tuple(ImageSource(data=image["bytes"]) for image in images),
        question=row["question"],
        answers=(row["answer"],) if is_choice else _listed(row["answer"]),
        choices=_listed(row["options"]) if is_choice else (),
        category=subject,
    )


def _listed(value: Any) -> tuple[str, ...]:
    """Return the texts of a list, which MMMU's files write in Python syntax; a text that is not a list is returned as the only one."""
    if isinstance(value, str):
        try:
            found = ast.literal_eval(value) if value.lstrip().startswith("[") else value
        except (ValueError, SyntaxError):  # a text that begins with a bracket
            found = value
        value = found if isinstance(found, list) else [value]
    return tuple(map(str, value))


def seed(path: Path, folder: Path) -> list[Example]:
    """Read the questions about images, not those about videos."""

    def rows() -> list[Example]:
        fields = read_json(path)
        names = {number: name for name, number in fields.get("question_type", {}).items()}
        return [
            Example(
                key=str(row["question_id"]),
                images=(ImageSource(folder / row["data_id"]),),
                question=row["question"],
                answers=(row["answer"],),
                choices=tuple(str(row[f"choice_{letter}"]) for letter in "abcd"),
                category=str(names.get(row["question_type_id"], row["question_type_id"])),
            )
            for row in fields["questions"]
            if row.get("data_type", "image") == "image"
        ]

    return parsed(path, rows)


def mmbench(path: Path) -> list[Example]:
    """Read the .tsv file, which has pictures in base64. A row whose index is larger by a multiple of 1,000,000 is the same question with
    its choices in another order, and may name the row that has its picture. For files without such rows (the first version of the
    benchmark) they are added here, one rotation per choice."""

    def rows() -> list[Example]:
        csv.field_size_limit(sys.maxsize)
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file, delimiter="\t"))
        pictures = {row["index"]: row["image"] for row in table}
        found = [
            Example(
                key=row["index"],
                images=(ImageSource(data=_from_base64(pictures.get(row["image"], row["image"]))),),
                question=row["question"],
                answers=(row.get("answer") or "",),
                choices=_mmbench_choices(row),
                context=row.get("hint") or "",
                category=row["category"],
            )
            for row in table
        ]
        return found if any(int(row["index"]) >= _NEXT_ORDER for row in table) else [turned for one in found for turned in _turned(one)]

    return parsed(path, rows)


def _mmbench_choices(row: dict[str, str]) -> tuple[str, ...]:
    """Return the choices of a row up to the last that is not empty, so that each keeps its letter."""
    texts = [row.get(letter) or "" for letter in "ABCD"]
    while texts and not texts[-1].strip():
        texts.pop()
    return tuple(texts)


def _from_base64(text: str) -> bytes:
    """Decode an image's bytes; empty if the text is damaged, so that its item is left out."""
    try:
        return base64.b64decode(text)
    except ValueError:
        return b""


_NEXT_ORDER = 1_000_000
"""Number that MMBench adds to a question's index for each further order of its choices."""


def _turned(example: Example) -> list[Example]:
    """Return a question with its choices in every rotation, the original order first."""
    choices, count = example.choices, len(example.choices)
    if not example.is_answered or not example.has_right_choice:
        return [example]  # `Task.examples` leaves it out and counts it
    right = LETTERS.index(example.answers[0])
    return [
        replace(
            example,
            key=str(int(example.key) + turn * _NEXT_ORDER),
            choices=choices[turn:] + choices[:turn],
            answers=(LETTERS[(right - turn) % count],),
        )
        for turn in range(count)
    ]


_POPE = tuple(f"coco_pope_{sampling}.json" for sampling in ("random", "popular", "adversarial"))


def pope(folder: Path) -> list[Example]:
    found = []
    for name in _POPE:
        sampling = name.removeprefix("coco_pope_").removesuffix(".json")

        def rows(name: str = name, sampling: str = sampling) -> list[Example]:
            return [
                Example(
                    key=f"{sampling}/{row['question_id']}",
                    images=(ImageSource(folder / "val2014" / row["image"]),),
                    question=row["text"],
                    answers=(row["label"].lower(),),
                    category=sampling,
                )
                for row in read_json_lines(folder / name)
            ]

        found += parsed(folder / name, rows)
    return found


_IMAGE_TYPES = (".jpg", ".png", ".jpeg")


def mme(folder: Path) -> list[Example]:
    """Read one folder per category, in which NAME.txt has two lines `QUESTION <tab> Yes|No` about NAME.jpg or .png. Texts and images are in
    the same folder, or in `questions_answers_YN` and `images`. The parquet files of lmms-lab are read, too."""
    found: list[Example] = []
    for table in sorted(folder.glob("*/test-*.parquet")):
        found += _mme_table(table)
    known = {*MME_PERCEPTION, *MME_COGNITION}
    for category in sorted(path for path in folder.iterdir() if path.is_dir() and path.name in known):
        texts = category / "questions_answers_YN" if (category / "questions_answers_YN").is_dir() else category
        images = category / "images" if (category / "images").is_dir() else category
        for path in sorted(texts.glob("*.txt")):
            found += _mme_image(path, images, category=category.name)
    absent = known - {example.category for example in found}
    if found and absent:
        logger.warning(
            "MME in %s lacks %d of its 14 categories (%s): the sums cover the others", folder, len(absent), ", ".join(sorted(absent))
        )
    return found


def _mme_table(path: Path) -> list[Example]:
    def rows() -> list[Example]:
        return [
            Example(
                key=f"{row['question_id']}#{number}",
                images=(ImageSource(data=row["image"]["bytes"]),),
                question=row["question"].strip(),
                answers=(row["answer"].strip().lower().rstrip("."),),
                category=row["category"],
            )
            for number, row in enumerate(read_parquet(path))
        ]

    return parsed(path, rows)


def _mme_image(path: Path, images: Path, *, category: str) -> list[Example]:
    def rows() -> list[Example]:
        picture = next((file for kind in _IMAGE_TYPES if (file := images / (path.stem + kind)).is_file()), images / f"{path.stem}.jpg")
        pairs = [line.strip().split("\t") for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        return [
            Example(
                key=f"{category}/{path.stem}#{number}",
                images=(ImageSource(picture),),
                question=question.strip(),
                answers=(answer.strip().lower().rstrip("."),),
                category=category,
            )
            for number, (question, answer) in enumerate(pairs)
        ]

    return parsed(path, rows)


_SCIENCEQA = ("problems.json", "pid_splits.json")

SCIENCEQA = Task(
    name="scienceqa",
    title="ScienceQA (test, questions with an image)",
    kind="choice",
    metric="accuracy, %",
    score=accuracy_scores,
    evaluated=Split(_SCIENCEQA, lambda folder: scienceqa(folder, split="test")),
    demonstrations=Split(_SCIENCEQA, lambda folder: scienceqa(folder, split="train")),
    published_at="github.com/lupantech/ScienceQA, data/scienceqa, and its images",
    method="rank",
    prompt="scienceqa",
    images=("images",),
)
MMMU = Task(
    name="mmmu",
    title="MMMU (validation)",
    kind="choice",
    metric="accuracy, %",
    score=mmmu_scores,
    evaluated=Split(("*/validation-*.parquet",), lambda folder: mmmu(folder, split="validation")),
    demonstrations=Split(("*/dev-*.parquet",), lambda folder: mmmu(folder, split="dev")),
    published_at="the Hugging Face data set MMMU/MMMU: a folder for each subject",
    method="rank",
    prompt="scienceqa",
)
SEED = Task(
    name="seed",
    title="SEED-Bench (images)",
    kind="choice",
    metric="accuracy, %",
    score=accuracy_scores,
    evaluated=annotated("SEED-Bench.json", seed, "SEED-Bench-image"),
    demonstrations=None,
    published_at="the Hugging Face data set AILab-CVC/SEED-Bench: SEED-Bench.json and SEED-Bench-image.zip",
    method="rank",
    prompt="scienceqa",
    images=("SEED-Bench-image",),
)
MMBENCH = Task(
    name="mmbench",
    title="MMBench (English, dev)",
    kind="choice",
    metric="circular accuracy, %",
    score=circular_scores,
    evaluated=Split(("MMBench_DEV_EN.tsv",), lambda folder: mmbench(folder / "MMBench_DEV_EN.tsv")),
    demonstrations=None,
    published_at="github.com/open-compass/MMBench: MMBench_DEV_EN.tsv",
    method="rank",
    prompt="scienceqa",
)
POPE = Task(
    name="pope",
    title="POPE (COCO; random, popular, adversarial)",
    kind="yes_no",
    metric="F1, %",
    score=pope_scores,
    evaluated=Split(_POPE, pope),
    demonstrations=None,
    published_at="github.com/AoiDragon/POPE, output/coco; images of cocodataset.org: val2014.zip",
    images=("val2014",),
)
MME = Task(
    name="mme",
    title="MME (perception and cognition)",
    kind="yes_no",
    metric="perception + cognition, of 2800",
    score=mme_scores,
    evaluated=Split(("*/",), mme),
    demonstrations=None,
    published_at="MME_Benchmark_release_version (available from its authors; github.com/BradyFU/Awesome-Multimodal-Large-Language-Models)",
    images=("CATEGORY/images",),
)
TASKS = (SCIENCEQA, MMMU, SEED, MMBENCH, POPE, MME)
