"""Metrics against published worked examples, and against the usual libraries if they are installed."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mm.evaluation.metrics import cider
from megatron_mm.evaluation.metrics.choices import accuracy_scores, circular_scores, mme_scores, pope_answer, pope_scores, yes_or_no
from megatron_mm.evaluation.metrics.mmmu import chosen_letter, mmmu_scores, open_is_right
from megatron_mm.evaluation.metrics.vqa import exact_match_scores, normalised, vqa_accuracy, vqa_scores
from megatron_mm.evaluation.tasks.base import Answered, Example, ImageSource


@pytest.mark.parametrize(
    ("given_by", "accuracy"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_is_that_of_the_challenge(given_by: int, accuracy: float) -> None:
    """visualqa.org/evaluation: the average over the ten subsets of nine annotators. With three of ten: (3 * 2/3 + 7 * 1) / 10."""
    assert vqa_accuracy("red", ["red"] * given_by + ["blue"] * (10 - given_by)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The red, ball.", "red ball"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("black/white", "black white"),
        ("yes!", "yes"),
        (" A\nman ", "man"),
    ],
)
def test_answers_are_normalised_as_the_challenge_does(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def test_answers_are_normalised_where_all_annotators_agree_too() -> None:
    assert vqa_accuracy("The ball", ["ball"] * 10) == vqa_accuracy("ball", ["the ball"] * 10) == vqa_accuracy("two", ["2"] * 10) == 1.0
    assert vqa_accuracy("STOP", ["stop"] * 10) == 1.0


WORDS = ("a", "the", "man", "dog", "red", "ball", "on", "with")


def _captions(number: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    rng = random.Random(number)
    made = [[rng.choices(WORDS, k=rng.randint(2, 9)) for _ in range(rng.randint(1, 5))] for _ in range(20)]
    return [rng.choices(WORDS, k=rng.randint(0, 9)) for _ in range(20)], made


def test_cider_d_of_the_only_reference_of_an_image_is_ten() -> None:
    """For two images without common words, every n-gram has weight log 2, and all four cosines are 1."""
    texts = [["a", "red", "ball", "here"], ["some", "blue", "dog", "there"]]
    assert cider.cider_d(texts, [[text] for text in texts]) == pytest.approx([10.0, 10.0])
    # Half of the words match: 1-grams 1/2, 2-grams 1/3, longer ones 0; the lengths are equal.
    half = ["a", "red", "cat", "sat"]
    assert cider.cider_d([half, texts[1]], [[text] for text in texts])[0] == pytest.approx(10 * (1 / 2 + 1 / 3) / 4)


def test_cider_d_is_that_of_pycocoevalcap() -> None:
    library = pytest.importorskip("pycocoevalcap.cider.cider")
    candidates, references = _captions(1)
    wanted = {number: [" ".join(text) for text in texts] for number, texts in enumerate(references)}
    given = {number: [" ".join(text)] for number, text in enumerate(candidates)}
    _, scores = library.Cider().compute_score(wanted, given)
    assert cider.cider_d(candidates, references) == pytest.approx(list(scores), abs=1e-9)


def test_cider_d_of_a_sample_is_that_of_a_list_of_its_images() -> None:
    """An image that is drawn twice occurs twice among those that determine the weights."""
    candidates, references = _captions(2)
    sampled = cider.cider_d_spread(candidates, references)
    drawn = random.Random(0).choices(range(20), k=20)
    for rows in (list(range(20)), drawn):
        scores = cider.cider_d([candidates[row] for row in rows], [references[row] for row in rows])
        times = np.bincount(rows, minlength=20)
        assert sampled.score(times) == pytest.approx(sum(scores) / len(scores), abs=1e-9)


PENN = {
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    "Two dogs' toys aren't on the floor, it's messy!": "two dogs toys are n't on the floor it 's messy",
    'a black-and-white cat (sleeping) on a "couch"': "a black-and-white cat -lrb- sleeping -rrb- on a couch",
    "cannot you see 1,000 birds?": "can not you see 1,000 birds",
    "a woman's hand holding a $5 bill & a half-eaten hot-dog": "a woman 's hand holding a $ 5 bill & a half-eaten hot-dog",
}
"""Captions, and the output of Stanford's PTBTokenizer for them."""


@pytest.mark.parametrize("caption", PENN)
def test_words_are_those_of_the_penn_treebank_tokenizer(caption: str) -> None:
    assert " ".join(cider.penn_words(caption)) == PENN[caption]


def test_the_official_tokenizer_is_used_where_it_is() -> None:
    if not cider.has_official_tokenizer():
        pytest.skip("no pycocoevalcap, or no Java")
    assert [" ".join(words) for words in cider.tokenized(list(PENN))] == list(PENN.values())


def _yes_no(pairs: list[tuple[str, str]], category: str) -> list[Answered]:
    return [Answered(Example(f"{category}/{n}", answers=(true,), category=category), said) for n, (said, true) in enumerate(pairs)]


def test_pope_is_the_f1_of_yes() -> None:
    """Two of three "yes" found and one false positive: precision 2/3, recall 2/3."""
    found = pope_scores(_yes_no([("Yes.", "yes"), ("yes, there is", "yes"), ("No", "yes"), ("Yes", "no"), ("not here", "no")], "random"))
    assert found["score"] == pytest.approx(200 / 3) and found["accuracy"] == 60.0
    assert pope_answer("There is no dog. Yes") == "no" and pope_answer("Not here") == "yes", "as its evaluation spells them"


def test_mme_adds_accuracy_and_accuracy_of_whole_images() -> None:
    """Both questions are right for one image, one of two for the other: 75 + 50."""
    answers = [("a#0", "Yes", "yes"), ("a#1", "no", "no"), ("b#0", "yes.", "yes"), ("b#1", "Yes", "no")]
    found = mme_scores([Answered(Example(f"count/{key}", answers=(true,), category="count"), said) for key, said, true in answers])
    assert found["perception"] == 125.0 and found["cognition"] == 0.0
    assert [yes_or_no(text) for text in ("Y", "No, it", "maybe", "")] == ["yes", "no", "other", "other"]


def test_mmbench_counts_a_question_that_is_right_in_every_order() -> None:
    rows = [("1", "A", "A"), ("1000001", "B", "B"), ("2", "A", "A"), ("1000002", "A", "C")]
    found = circular_scores([Answered(Example(key, answers=(true,)), said) for key, said, true in rows])
    assert found["score"] == 50.0 and found["each order"] == 75.0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is C.", "C"),
        ("(B) because A is wrong", "B"),  # brackets come first
        ("A or D", "D"),  # the last of several
        ("I think that what is shown here is the dog", "B"),  # more than five words: the text of a choice
        ("B: dog", "B"),
        ("the dog", ""),
        ("", ""),
        ("E", ""),
    ],
)
def test_letters_are_read_as_mmmu_does(answer: str, letter: str) -> None:
    """Results of the official `parse_multi_choice_response`, except for the last four, where it draws a letter at random."""
    assert chosen_letter(answer, ["cat", "dog", "cow", "bird"]) == letter


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("The mean is 3.333.", ["3.33"], True),
        ("so x = 1,200", ["1200"], True),
        ("about 1e3", ["1000"], True),
        ("It is a Gothic church", ["gothic church"], True),
        ("gothic", ["gothic church"], False),
        ("the result is x", ["x"], True),
        ("the result is xy", ["x"], False),  # a single letter must be next to a space
        ("12", ["2"], False),
        ("$6,000", ["$6,000"], True),
        ("", ["3"], False),
        ("24/7", ["24/7", "3.429"], True),
    ],
)
def test_open_answers_are_read_as_mmmu_does(answer: str, references: list[str], right: bool) -> None:
    """Results of the official `eval_open` on the official `parse_open_response`."""
    assert open_is_right(answer, references) is right


def test_mmmu_counts_all_questions() -> None:
    choice = Example("1", answers=("B",), choices=("cat", "dog"), category="Art")
    free = Example("2", answers=("3.5",), category="Math")
    assert mmmu_scores([Answered(choice, "B"), Answered(choice, "A"), Answered(free, "3.50"), Answered(free, "about 3.5")]) == {
        "score": 75.0,
        "multiple choice": 50.0,
        "open": 100.0,
        "Art": 50.0,
        "Math": 100.0,
        "stderr": pytest.approx(25.0),
    }


def _right_and_wrong(right: int, wrong: int) -> list[Answered]:
    example = Example("1", answers=("A",), choices=("cat", "dog"))
    return [Answered(example, "A")] * right + [Answered(example, "B")] * wrong


def test_the_standard_error_of_a_percentage_is_that_of_a_share() -> None:
    """sqrt(p (1 - p) / (n - 1)); a single item has none."""
    assert accuracy_scores(_right_and_wrong(30, 70))["stderr"] == pytest.approx(100 * (0.3 * 0.7 / 99) ** 0.5)
    assert exact_match_scores(_right_and_wrong(30, 70))["stderr"] == pytest.approx(100 * (0.3 * 0.7 / 99) ** 0.5)
    assert "stderr" not in accuracy_scores(_right_and_wrong(1, 0))
    assert "stderr" not in vqa_scores([]) and "stderr" not in accuracy_scores([])


def test_the_standard_errors_of_composite_scores_are_those_of_repeated_evaluations() -> None:
    """Benchmarks drawn again and again: the standard deviation of their scores is what the standard error of one says."""

    def drawn(rng: random.Random, number: int) -> list[Answered]:
        found = []
        for image in range(60):
            hard = rng.random()  # questions about one image are right or wrong together
            for question in range(2):
                wanted = ("yes", "no")[question]
                said = wanted if rng.random() < hard else ("no", "yes")[question]
                source = (ImageSource(Path(f"{image}.jpg")),)
                found.append(Answered(Example(f"{number}/{image}#{question}", source, answers=(wanted,), category="count"), said))
        return found

    rng = random.Random(0)
    every = [drawn(rng, number) for number in range(100)]
    for score in (pope_scores, mme_scores):
        true = statistics.stdev(score(one)["score"] for one in every)
        said = statistics.mean(score(one)["stderr"] for one in every[:5])
        assert said == pytest.approx(true, rel=0.2)
    assert pope_scores(every[0]) == pope_scores(every[0]), "the seed is fixed"
    questions = [Answered(replace(one.example, key=str(n // 2 + 1_000_000 * (n % 2))), one.answer) for n, one in enumerate(every[0])]
    scores = circular_scores(questions)
    assert scores["stderr"] == pytest.approx((scores["score"] * (100 - scores["score"]) / 59) ** 0.5), "of the questions, not the orders"


def test_the_standard_error_of_cider_d_is_that_of_other_images() -> None:
    rng = random.Random(0)
    scores = []
    for number in range(60):
        candidates, references = _captions(rng.randrange(10**6))
        answered = [
            Answered(Example(str(n), answers=tuple(map(" ".join, texts))), " ".join(words))
            for n, (words, texts) in enumerate(zip(candidates, references, strict=True))
        ]
        scores.append(
            cider.caption_scores(answered) if number < 6 else {"score": 100 * statistics.mean(cider.cider_d(candidates, references))}
        )
    true = statistics.stdev(one["score"] for one in scores)
    assert statistics.mean(one["stderr"] for one in scores[:6]) == pytest.approx(true, rel=0.35)
