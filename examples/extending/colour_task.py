"""A benchmark of your own: `megatron-mm evaluate RUN --tasks examples/extending/colour_task.py:COLOURS --data FOLDER`.

Its files lie in FOLDER/colours: `test.jsonl` and, for demonstrations, `train.jsonl`, each line {"image": "1.png", "colour": "red"}, and the
pictures in `images`.
"""

from __future__ import annotations

from pathlib import Path

from megatron_mm.evaluation.metrics.vqa import exact_match_scores
from megatron_mm.evaluation.tasks.base import Example, ImageSource, Task, annotated, parsed, read_json_lines


def read(file: Path, images: Path) -> list[Example]:
    """A question for each line. Raises DamagedFile for a line that is none."""
    return parsed(file, lambda: [example(str(number), row, images) for number, row in enumerate(read_json_lines(file))])


def example(key: str, row: dict[str, str], images: Path) -> Example:
    return Example(key, (ImageSource(images / row["image"]),), "which colour is it?", answers=(row["colour"],))


COLOURS = Task(
    name="colours",
    title="Colours",
    kind="vqa",
    metric="accuracy, %",
    score=exact_match_scores,
    evaluated=annotated("test.jsonl", read, "images"),
    demonstrations=annotated("train.jsonl", read, "images"),
    published_at="written by you",
)
