"""MMMU's accuracy (Yue et al., arXiv 2311.16502), reading answers as its own evaluation does (github.com/MMMU-Benchmark/MMMU, eval_utils).

A multiple-choice answer is right if its letter is. A generated answer chooses the last letter in brackets; if there is none, the last
letter between spaces; and in an answer of more than five words without either, the choice whose text occurs last. (If the official code
finds none, it draws a letter at random. Here such an answer is wrong, unless it contains a letter next to punctuation, as in "B: dog".)

An open answer is right if it contains one of the reference answers: as a text in what follows "is", "so", "answer" and the like in each of
its sentences, or as one of the numbers there, rounded to two decimals.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from megatron_mm.evaluation.metrics.spread import of_mean
from megatron_mm.evaluation.tasks.base import LETTERS, Answered

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # with an exponent
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
Value = str | float
"""A text in lower case, or a number."""


def chosen_letter(answer: str, choices: Sequence[str]) -> str:
    """Return the letter that a generated answer chooses; empty if none can be found."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer, letters = f" {answer} ", LETTERS[: len(choices)]
    places = {letter: answer.rfind(f"({letter})") for letter in letters}
    if max(places.values(), default=-1) < 0:
        places = {letter: answer.rfind(f" {letter} ") for letter in letters}
    if max(places.values(), default=-1) < 0 and len(answer.split()) > 5:
        places = {letter: answer.lower().rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=True)}
    if max(places.values(), default=-1) < 0:
        found = re.search(rf"\b([{letters}])\b", answer) if letters else None  # "B: dog", which the official code does not recognise
        return found.group(1) if found else ""
    return max(places, key=lambda letter: places[letter])


def open_is_right(answer: str, references: Sequence[str]) -> bool:
    """Return whether a generated answer contains one of the reference answers."""
    wanted = [value for reference in references for value in _values(reference)]
    for given in _read(answer):
        if any(value in given if isinstance(value, str) and isinstance(given, str) else value == given for value in wanted):
            return True
    return False


def _read(answer: str) -> list[Value]:
    """Extract the texts and numbers from an answer to an open question."""
    whole = answer.strip().strip(".").lower()
    parts = [part for sentence, is_last in _sentences(whole) if (part := _end(sentence, is_last=is_last))] or [whole]
    texts = parts + [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return [value for text in texts for value in _values(text)]


def _sentences(text: str) -> list[tuple[str, bool]]:
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    return [(sentence, number == len(sentences) - 1) for number, sentence in enumerate(sentences)]


def _end(sentence: str, *, is_last: bool) -> str:
    """Return the shortest end of a sentence that follows a word announcing an answer; empty if there is none."""
    shortest = ""
    for mark in (*_INDICATORS, "=") if is_last else _INDICATORS:
        end = sentence.split(mark)[-1].strip()
        if mark in sentence and (not shortest or len(end) < len(shortest)):
            shortest = end
    return "" if shortest in (":", ",", ".", "!", "?", ";", "'") else shortest


def _values(text: str) -> list[Value]:
    """Normalise a text for comparison: a number is rounded to two decimals; other text is in lower case, and a single letter gets a space
    before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_scores(answered: Sequence[Answered]) -> dict[str, float]:
    """Accuracy in percent: of all questions, of multiple-choice ones, of open ones, and by subject."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for one in answered:
        example = one.example
        right = one.answer in example.answers if example.choices else open_is_right(one.answer, example.answers)
        for name in ("score", "multiple choice" if example.choices else "open", example.category):
            groups[name].append(right)
    scores = {name: 100 * sum(values) / len(values) for name, values in groups.items() if name}
    return scores | of_mean([100 * value for value in groups["score"]])
