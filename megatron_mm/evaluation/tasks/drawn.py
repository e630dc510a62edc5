"""Tasks on the drawn scenes of `prepare demo`, with prompts in the form of the debug recipes' training documents.

Captions are those of the pairs (CIDEr-D). Questions are those of the interleaved documents, which consist of question, picture and answer
in turn, like a few-shot prompt. Demonstrations are drawn from the training split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mm.evaluation.metrics.cider import caption_scores
from megatron_mm.evaluation.metrics.vqa import exact_match_scores
from megatron_mm.evaluation.tasks.base import Example, ImageSource, Split, Task

if TYPE_CHECKING:
    from megatron_mm.data.sources.source import Source


def _open(folder: Path, split: str, source: str) -> Source:
    from megatron_mm.data.sources.index import open_index

    return open_index(folder / split / source, check=False)


def drawn_captions(folder: Path, *, split: str) -> list[Example]:
    index = _open(folder, split, "pairs")
    return [
        Example(f"{split}/{row}", (ImageSource(data=index.image(row, 0)),), answers=(index.document(row).decode().strip(),))
        for row in range(len(index))
    ]


def drawn_questions(folder: Path, *, split: str) -> list[Example]:
    """Read each question of the interleaved documents, with its picture."""
    index = _open(folder, split, "interleaved")
    found = []
    for row in range(len(index)):
        items = json.loads(index.document(row))["items"]
        for number in range(len(items) // 3):
            question, answer = items[3 * number]["text"], items[3 * number + 2]["text"]
            found.append(Example(f"{split}/{row}/{number}", (ImageSource(data=index.image(row, number)),), question, (answer,)))
    return found


def _split(split: str, source: str) -> tuple[str, ...]:
    return (f"{split}/{source}/index",)


_PUBLISHED = "megatron-mm prepare demo"

DRAWN_CAPTION = Task(
    name="drawn_caption",
    title="drawn scenes, captions",
    kind="caption",
    metric="CIDEr-D x 100",
    score=caption_scores,
    evaluated=Split(_split("heldout", "pairs"), lambda folder: drawn_captions(folder, split="heldout")),
    demonstrations=Split(_split("train", "pairs"), lambda folder: drawn_captions(folder, split="train")),
    published_at=_PUBLISHED,
    max_new_tokens=20,
    prompt="caption",
    form="bare caption",
    folder=".",
)
DRAWN_VQA = Task(
    name="drawn_vqa",
    title="drawn scenes, questions",
    kind="vqa",
    metric="accuracy, %",
    score=exact_match_scores,
    evaluated=Split(_split("heldout", "interleaved"), lambda folder: drawn_questions(folder, split="heldout")),
    demonstrations=Split(_split("train", "interleaved"), lambda folder: drawn_questions(folder, split="train")),
    published_at=_PUBLISHED,
    max_new_tokens=6,
    form="question before image",
    folder=".",
)
TASKS = (DRAWN_CAPTION, DRAWN_VQA)
