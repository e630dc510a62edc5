"""TextCore: the text-only tasks that MM1 averages over (arXiv 2403.09611): ARC, PIQA, LAMBADA, WinoGrande, HellaSwag, SciQ, TriviaQA,
WebQuestions. Choices are compared by likelihood, free answers by exact match. ARC is two tasks here, and the average gives each of the nine
tasks the same weight.

The folder of each task has EVALUATED.jsonl (`Task.evaluated`) and train.jsonl, with the fields of the publishers' files or of the Hugging
Face data set, written as JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mm.evaluation.metrics.choices import accuracy_scores
from megatron_mm.evaluation.metrics.vqa import exact_match_scores
from megatron_mm.evaluation.tasks.base import LETTERS, Example, Split, Task, parsed, read_json_lines

Row = dict[str, Any]


def _choice(question: str, choices: list[str], right: int) -> Example:
    return Example("", (), question, (LETTERS[right],), choices=tuple(choices), shown=choices[right])


def _arc(row: Row) -> Example:
    given = row["choices"] if "choices" in row else row["question"]["choices"]
    texts, labels = (
        (given["text"], given["label"]) if isinstance(given, dict) else zip(*((c["text"], c["label"]) for c in given), strict=True)
    )
    question = row["question"] if isinstance(row["question"], str) else row["question"]["stem"]
    return _choice(f"Question: {question}\nAnswer:", list(texts), list(labels).index(row["answerKey"]))


def _piqa(row: Row) -> Example:
    return _choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _winogrande(row: Row) -> Example:
    """Make each choice one of the two names and the rest of the sentence; the likelihood of both together decides, as is usual."""
    before, after = row["sentence"].split("_", 1)
    return _choice(before.rstrip(), [f"{row[f'option{n}']}{after}" for n in (1, 2)], int(row["answer"]) - 1)


def _hellaswag(row: Row) -> Example:
    return _choice(row["ctx"], list(row["endings"]), int(row["label"]))


def _sciq(row: Row) -> Example:
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return _choice(f"{row.get('support') or ''}\nQuestion: {row['question']}\nAnswer:".strip(), choices, 3)


def _lambada(row: Row) -> Example:
    before, _, last = row["text"].strip().rpartition(" ")
    return Example("", (), before, (last,))


def _triviaqa(row: Row) -> Example:
    answer = row["answer"] if "answer" in row else row["Answer"]
    named = [answer.get("value", answer.get("Value")), *(answer.get("aliases") or answer.get("Aliases") or [])]
    question = row["question"] if "question" in row else row["Question"]
    return Example("", (), f"Question: {question}\nAnswer:", tuple(dict.fromkeys(filter(None, named))))


def _webqs(row: Row) -> Example:
    return Example("", (), f"Question: {row['question']}\nAnswer:", tuple(row["answers"]))


def _split(name: str, read: Callable[[Row], Example]) -> Split:
    def rows(path: Path) -> list[Example]:
        from dataclasses import replace

        return parsed(path, lambda: [replace(read(row), key=str(number)) for number, row in enumerate(read_json_lines(path))])

    return Split((f"{name}.jsonl",), lambda folder: rows(folder / f"{name}.jsonl"))


def _task(name: str, title: str, read: Callable[[Row], Example], *, evaluated: str, ranks: bool, max_words: int | None = None) -> Task:
    return Task(
        name=name,
        title=title,
        kind="text",
        metric="accuracy, %",
        score=accuracy_scores if ranks else exact_match_scores,
        evaluated=_split(evaluated, read),
        demonstrations=_split("train", read),
        published_at=f"the Hugging Face data set of {title}, its splits written as JSON lines",
        method="rank" if ranks else "generate",
        max_words=max_words,
    )


TASKS = (
    _task("arc_easy", "ARC-Easy", _arc, evaluated="test", ranks=True),
    _task("arc_challenge", "ARC-Challenge", _arc, evaluated="test", ranks=True),
    _task("piqa", "PIQA", _piqa, evaluated="validation", ranks=True),
    _task("lambada", "LAMBADA", _lambada, evaluated="test", ranks=False, max_words=1),
    _task("winogrande", "WinoGrande", _winogrande, evaluated="validation", ranks=True),
    _task("hellaswag", "HellaSwag", _hellaswag, evaluated="validation", ranks=True),
    _task("sciq", "SciQ", _sciq, evaluated="test", ranks=True),
    _task("triviaqa", "TriviaQA", _triviaqa, evaluated="validation", ranks=False),
    _task("webqs", "WebQuestions", _webqs, evaluated="test", ranks=False),
)
