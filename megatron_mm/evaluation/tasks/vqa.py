"""Questions about images with free answers: VQAv2, OK-VQA, TextVQA, VizWiz (VQA accuracy) and GQA (exact match)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_mm.evaluation.metrics.vqa import exact_match_scores, vqa_scores
from megatron_mm.evaluation.tasks.base import DamagedFile, Example, ImageSource, Split, Task, annotated, parsed, read_json


def most_frequent(answers: tuple[str, ...]) -> str:
    """Return the answer shown in a demonstration: the most frequent non-empty one, the first in a tie."""
    given = Counter(answer for answer in answers if answer.strip())
    return given.most_common(1)[0][0] if given else ""


def _texts(answers: list[Any]) -> tuple[str, ...]:
    """Return the annotators' answers, which are texts or records."""
    return tuple(str(answer["answer"] if isinstance(answer, dict) else answer) for answer in answers)


def coco_vqa(questions: Path, annotations: Path, images: Path, *, split: str) -> list[Example]:
    """Read VQAv2 or OK-VQA: questions in one file, ten answers to each in another, COCO's images of 2014."""

    def rows() -> list[Example]:
        asked = read_json(questions)["questions"]
        answers = {row["question_id"]: _texts(row["answers"]) for row in read_json(annotations)["annotations"]}
        without = [row["question_id"] for row in asked if row["question_id"] not in answers]
        if without:
            raise DamagedFile(
                f"{annotations} has no answers to {len(without)} of the {len(asked)} questions in {questions}, such as {without[0]}"
            )
        return [
            Example(
                key=str(row["question_id"]),
                images=(ImageSource(images / f"{split}2014" / f"COCO_{split}2014_{int(row['image_id']):012d}.jpg"),),
                question=row["question"],
                answers=answers[row["question_id"]],
                shown=most_frequent(answers[row["question_id"]]),
            )
            for row in asked
        ]

    return parsed(questions, rows)


def textvqa(path: Path, folder: Path) -> list[Example]:
    def rows() -> list[Example]:
        return [
            Example(
                key=str(row["question_id"]),
                images=(ImageSource(folder / f"{row['image_id']}.jpg"),),
                question=row["question"],
                answers=_texts(row["answers"]),
                shown=most_frequent(_texts(row["answers"])),
            )
            for row in read_json(path)["data"]
        ]

    return parsed(path, rows)


def vizwiz(path: Path, folder: Path) -> list[Example]:
    def rows() -> list[Example]:
        found = []
        for row in read_json(path):
            answers = _texts(row["answers"])
            found.append(
                Example(row["image"], (ImageSource(folder / row["image"]),), row["question"], answers, shown=most_frequent(answers))
            )
        return found

    return parsed(path, rows)


def gqa(path: Path, folder: Path) -> list[Example]:
    def rows() -> list[Example]:
        return [
            Example(key, (ImageSource(folder / f"{row['imageId']}.jpg"),), row["question"], (str(row["answer"]),))
            for key, row in read_json(path).items()
        ]

    return parsed(path, rows)


def _coco_split(prefix: str, annotations: str, split: str) -> Split:
    files = (f"{prefix}OpenEnded_mscoco_{split}2014_questions.json", f"{annotations}mscoco_{split}2014_annotations.json")
    return Split(files, lambda folder: coco_vqa(folder / files[0], folder / files[1], folder, split=split))


_METRIC = "VQA accuracy, %"
_COCO_IMAGES = ("train2014", "val2014")

VQAV2 = Task(
    name="vqav2",
    title="VQAv2 (validation)",
    kind="vqa",
    metric=_METRIC,
    score=vqa_scores,
    evaluated=_coco_split("v2_", "v2_", "val"),
    demonstrations=_coco_split("v2_", "v2_", "train"),
    published_at="visualqa.org: questions and annotations of 2017; images of cocodataset.org: train2014.zip, val2014.zip",
    images=_COCO_IMAGES,
)
OKVQA = Task(
    name="okvqa",
    title="OK-VQA (validation)",
    kind="vqa",
    metric=_METRIC,
    score=vqa_scores,
    evaluated=_coco_split("", "", "val"),
    demonstrations=_coco_split("", "", "train"),
    published_at="okvqa.allenai.org: questions and annotations of version 1.1; images of cocodataset.org: train2014.zip, val2014.zip",
    images=_COCO_IMAGES,
)
TEXTVQA = Task(
    name="textvqa",
    title="TextVQA (validation)",
    kind="vqa",
    metric=_METRIC,
    score=vqa_scores,
    evaluated=annotated("TextVQA_0.5.1_val.json", textvqa, "train_images"),
    demonstrations=annotated("TextVQA_0.5.1_train.json", textvqa, "train_images"),
    published_at="textvqa.org: TextVQA_0.5.1_{train,val}.json and train_val_images.zip",
    images=("train_images",),
)
VIZWIZ = Task(
    name="vizwiz",
    title="VizWiz (validation)",
    kind="vqa",
    metric=_METRIC,
    score=vqa_scores,
    evaluated=annotated("val.json", vizwiz, "val"),
    demonstrations=annotated("train.json", vizwiz, "train"),
    published_at="vizwiz.org, visual question answering: annotations (train.json, val.json) and images (train.zip, val.zip)",
    prompt="vizwiz",
    images=("train", "val"),
)
GQA = Task(
    name="gqa",
    title="GQA (test-dev, balanced)",
    kind="vqa",
    metric="accuracy, %",
    score=exact_match_scores,
    evaluated=annotated("testdev_balanced_questions.json", gqa, "images"),
    demonstrations=annotated("train_balanced_questions.json", gqa, "images"),
    published_at="cs.stanford.edu/people/dorarad/gqa: questions 1.2 and images.zip",
    images=("images",),
)
TASKS = (VQAV2, OKVQA, TEXTVQA, VIZWIZ, GQA)
