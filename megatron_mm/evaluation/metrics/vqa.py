"""VQA accuracy, as the VQA challenge's own evaluation defines it (Antol et al., arXiv 1505.00468; visualqa.org/evaluation).

    accuracy of an answer = mean over the annotators of min(1, how many of the OTHER annotators gave it / 3)

Suppose that three of ten annotators gave the model's answer. For each of these three, 2 other annotators gave it; for each of the other
seven, 3 did: (3 * 2/3 + 7 * 1) / 10 = 0.9. All answers are normalised before they are compared, as in lmms-eval. (The challenge's own code
does not normalise the references if all annotators gave exactly the same one; then no answer can match "the ball".) The normalisation, in
this order:

1. Line breaks and tabs become spaces; leading and trailing spaces are dropped.
2. A punctuation mark is dropped if it is next to a space anywhere in the text, or if the text has a comma between digits; otherwise it
   becomes a space. A full stop is dropped unless a digit follows.
3. Lower case; number words up to ten become digits ("none" is 0); the articles a, an, the are dropped; contractions get their apostrophe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_mm.evaluation.metrics.spread import of_mean
from megatron_mm.evaluation.tasks.base import Answered

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32
"""The official code passes re.UNICODE (32) to `sub` as the count."""
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_NUMBERS = {
    word: str(number) for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_APOSTROPHES = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll ma'am
    mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
    you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've they'd've
    we'd've who'd've wouldn't've you'd've
"""
_SPECIAL = {
    "somebody'd": "somebodyd",  # as in the official table
    **dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"),
    **dict.fromkeys(("yall'll", "y'allll"), "y'all'll"),
    **dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"),
}


def _contractions() -> dict[str, str]:
    """Contractions without an apostrophe -> with it. (The official table also has some with "I", which no lower-case word matches.)"""
    found = {word.replace("'", ""): word for word in _APOSTROPHES.split()} | _SPECIAL
    for word in _TWO_APOSTROPHES.split():
        first, second, third = word.split("'")
        found |= {f"{first}{second}'{third}": word, f"{first}'{second}{third}": word}
    return found


_CONTRACTIONS = _contractions()


def normalised(answer: str) -> str:
    """Normalise an answer for comparison."""
    text = _plain(answer)
    beside_space = bool(_COMMA_IN_NUMBER.search(text))
    out = text
    for mark in _PUNCTUATION:
        dropped = beside_space or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if dropped else " ")
    out = _FULL_STOP.sub("", out, count=_MOST_STOPS)
    words = [_NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy of an answer, from 0 to 1.

    Args:
        references: the annotators' answers.
    """
    answer = normalised(answer)
    matches = [normalised(reference) == answer for reference in references]
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


def vqa_scores(answered: Sequence[Answered]) -> dict[str, float]:
    """VQA accuracy in percent."""
    return _mean([vqa_accuracy(one.answer, one.example.answers) for one in answered])


def exact_match_scores(answered: Sequence[Answered]) -> dict[str, float]:
    """Percentage of answers that equal a reference, both normalised."""
    return _mean([float(normalised(one.answer) in map(normalised, one.example.answers)) for one in answered])


def _mean(values: Sequence[float]) -> dict[str, float]:
    """The mean of the items' scores in percent, and its standard error."""
    return {"score": 100 * sum(values) / len(values) if values else float("nan"), **of_mean([100 * value for value in values])}
