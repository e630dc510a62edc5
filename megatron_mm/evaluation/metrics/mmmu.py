"""MMMU's accuracy (Yue et al., arXiv 2311.16502), as its own evaluation reads answers (github.com/MMMU-Benchmark/MMMU, eval_utils).

A question of multiple choice is right where the letter is. A generated answer chooses the last letter in brackets; where there is none, the
last one between spaces; and in an answer of more than five words without either, the last choice whose text stands in it. (Where it finds
none, the official code draws a letter at random; here such an answer is wrong, but for a letter beside punctuation, "B: dog".)

An open question is right where one of its answers is in the generated one: as a text in what follows "is", "so", "answer" and the like in
each of its sentences, or as one of the numbers there, rounded to two decimals.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

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
    """The letter that a generated answer chooses; empty if none can be found."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer, letters = f" {answer} ", LETTERS[: len(choices)]
    places = {letter: answer.rfind(f"({letter})") for letter in letters}
    if max(places.values(), default=-1) < 0:
        places = {letter: answer.rfind(f" {letter} ") for letter in letters}
    if max(places.values(), default=-1) < 0 and len(answer.split()) > 5:
        places = {letter: answer.lower().rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=True)}
    if max(places.values(), default=-1) < 0:
        found = re.search(rf"\b([{letters}])\b", answer) if letters else None  # "B: dog", which the official code does not know
        return found.group(1) if found else ""
    return max(places, key=lambda letter: places[letter])


def open_is_right(answer: str, references: Sequence[str]) -> bool:
    """Whether a generated answer has one of the reference answers in it."""
    wanted = [value for reference in references for value in _values(reference)]
    for given in _read(answer):
        if any(value in given if isinstance(value, str) and isinstance(given, str) else value == given for value in wanted):
            return True
    return False


def _read(answer: str) -> list[Value]:
    """The texts and numbers that an answer to an open question gives."""
    whole = answer.strip().strip(".").lower()
    parts = [part for sentence, is_last in _sentences(whole) if (part := _end(sentence, is_last=is_last))] or [whole]
    texts = parts + [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return [value for text in texts for value in _values(text)]


def _sentences(text: str) -> list[tuple[str, bool]]:
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    return [(sentence, number == len(sentences) - 1) for number, sentence in enumerate(sentences)]


def _end(sentence: str, *, is_last: bool) -> str:
    """What a sentence ends with after the word that announces an answer, the shortest such end; empty if there is none."""
    shortest = ""
    for mark in (*_INDICATORS, "=") if is_last else _INDICATORS:
        end = sentence.split(mark)[-1].strip()
        if mark in sentence and (not shortest or len(end) < len(shortest)):
            shortest = end
    return "" if shortest in (":", ",", ".", "!", "?", ";", "'") else shortest


def _values(text: str) -> list[Value]:
    """A text as it is compared: a number rounded to two decimals, or in lower case, of one letter with a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_scores(answered: Sequence[Answered]) -> dict[str, float]:
    """Accuracy of all questions, of those with choices, of open ones, and by subject; percent."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for one in answered:
        example = one.example
        right = one.answer in example.answers if example.choices else open_is_right(one.answer, example.answers)
        for name in ("score", "multiple choice" if example.choices else "open", example.category):
            groups[name].append(right)
    return {name: 100 * sum(values) / len(values) for name, values in groups.items() if name}
