"""Scores of questions with given answers: accuracy, POPE's F1, MME's sums, MMBench's circular accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_mm.evaluation.metrics.spread import Array, of_counts, of_mean, of_sum
from megatron_mm.evaluation.tasks.base import Answered

MME_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def _is_right(one: Answered) -> bool:
    return one.answer in one.example.answers


def accuracy_scores(answered: Sequence[Answered]) -> dict[str, float]:
    """Percentage of right answers, in total and by category."""
    right = [_is_right(one) for one in answered]
    found = {"score": _percent(right), **of_mean([100 * ok for ok in right])}
    for category in sorted({one.example.category for one in answered} - {""}):
        found[category] = _percent([_is_right(one) for one in answered if one.example.category == category])
    return found


def yes_or_no(answer: str) -> str:
    """Read an answer as yes, no or other. As in MME's evaluation, it is the word itself or has the word in its first four letters."""
    plain = answer.lower().strip().replace(".", "")
    if plain in ("yes", "y"):
        return "yes"
    if plain in ("no", "n"):
        return "no"
    begin = plain[:4] if len(plain) > 1 else ""
    return "yes" if "yes" in begin else "no" if "no" in begin else "other"


def pope_scores(answered: Sequence[Answered]) -> dict[str, float]:
    """POPE (arXiv 2305.10355): F1 of "yes", accuracy, precision, recall and fraction of "yes", each the mean over the three samplings, in
    percent; and the F1 of each sampling.

    As in POPE's own evaluation, an answer is no if its first sentence contains the word no or not, and yes otherwise.
    """
    by_sampling: dict[str, list[Answered]] = defaultdict(list)
    for one in answered:
        by_sampling[one.example.category].append(one)
    found: dict[str, list[float]] = defaultdict(list)
    scores: dict[str, float] = {}
    for sampling, group in sorted(by_sampling.items()):
        pairs = [(pope_answer(one.answer), one.example.answers[0]) for one in group]
        both, said = sum(pair == ("yes", "yes") for pair in pairs), sum(given == "yes" for given, _ in pairs)
        true = sum(wanted == "yes" for _, wanted in pairs)
        precision, recall = both / said if said else 0.0, both / true if true else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        right = sum(given == wanted for given, wanted in pairs) / len(pairs)
        for name, value in (("score", f1), ("accuracy", right), ("precision", precision), ("recall", recall), ("yes", said / len(pairs))):
            found[name].append(100 * value)
        scores[sampling or "all"] = 100 * f1
    return {name: sum(values) / len(values) for name, values in found.items()} | scores | _f1_spread(by_sampling)


def _f1_spread(by_sampling: Mapping[str, Sequence[Answered]]) -> dict[str, float]:
    """Standard error of the mean F1, over the images: the samplings ask several questions about the same images."""
    units: dict[object, int] = {}
    groups = [
        [(units.setdefault(one.example.images or one.example.key, len(units)), one) for one in found] for found in by_sampling.values()
    ]
    counts = np.zeros((len(units), len(groups), 4))
    for place, group in enumerate(groups):
        for unit, one in group:
            said, true = pope_answer(one.answer) == "yes", one.example.answers[0] == "yes"
            counts[unit, place] += (said and true, said, true, 1)

    def score(sums: Array) -> Array:
        both, said, true, items = np.moveaxis(sums, -1, 0)  # each [samples, samplings]
        f1 = 100 * 2 * both / np.maximum(said + true, 1)
        found: Array = f1.sum(axis=1) / np.maximum((items > 0).sum(axis=1), 1)
        return found

    return of_counts(counts, score)


def pope_answer(answer: str) -> str:
    """Read an answer as yes or no, as POPE's evaluation does."""
    words = answer.split(".")[0].replace(",", "").split()
    return "no" if any(word in ("No", "no", "not") for word in words) else "yes"


def mme_scores(answered: Sequence[Answered]) -> dict[str, float]:
    """MME (arXiv 2306.13394): accuracy + accuracy+ (both questions of an image right) of each category, in percent, up to 200. Perception
    and cognition are sums over their categories, and the score is the sum of both."""
    images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for one in answered:
        images[one.example.category][one.example.key.rpartition("#")[0]].append(yes_or_no(one.answer) == one.example.answers[0])
    by_category = {
        category: _percent([right for pair in pairs.values() for right in pair]) + _percent([all(pair) for pair in pairs.values()])
        for category, pairs in images.items()
    }
    known = {*MME_PERCEPTION, *MME_COGNITION}
    of_images = [[100 * (sum(pair) / len(pair) + all(pair)) for pair in pairs.values()] for name, pairs in images.items() if name in known]
    perception = sum(value for category, value in by_category.items() if category in MME_PERCEPTION)
    cognition = sum(value for category, value in by_category.items() if category in MME_COGNITION)
    return {"score": perception + cognition, **of_sum(of_images), "perception": perception, "cognition": cognition, **by_category}


def circular_scores(answered: Sequence[Answered]) -> dict[str, float]:
    """MMBench (arXiv 2307.06281): percentage of questions answered correctly with their choices in every order that the file has."""
    questions: dict[int, list[Answered]] = defaultdict(list)
    for one in answered:
        questions[int(one.example.key.partition("~")[0]) % 1_000_000].append(one)
    right = [(all(map(_is_right, group)), group[0].example.category) for group in questions.values()]
    found = {"score": _percent([ok for ok, _ in right]), **of_mean([100 * ok for ok, _ in right])}
    found["each order"] = _percent([_is_right(one) for one in answered])
    for category in sorted({category for _, category in right} - {""}):
        found[category] = _percent([ok for ok, own in right if own == category])
    return found


def _percent(values: Sequence[bool]) -> float:
    return 100 * sum(values) / len(values) if values else float("nan")
