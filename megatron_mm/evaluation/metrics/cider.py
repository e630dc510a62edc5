"""CIDEr-D (Vedantam et al., arXiv 1411.5726, section 6), as the COCO caption evaluation computes it.

A caption is represented by the counts of its 1- to 4-grams, weighted by how rare they are among the references (tf-idf: an n-gram in the
references of df of N images has the weight log N - log max(1, df)). The score of an image is a cosine similarity whose counts are clipped
at the reference's, times exp(-(difference in length)^2 / (2 * 6^2)), times 10, averaged over n and over the references. The score of a data
set is the mean over images; papers report 100 times this mean. The idf is computed from the references of the images that are scored, so
scores of part of a data set (`--limit`) cannot be compared with scores of the whole.

Captions are tokenized as in the COCO evaluation: by Stanford's PTBTokenizer, in lower case, without punctuation. PTBTokenizer is a Java
program contained in the package pycocoevalcap (`pip install 'megatron_mm[eval]'`). If the package or Java is missing, `penn_words` finds
nearly the same words, and a warning is logged.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence

from megatron_mm.evaluation.metrics.cider_spread import ResampledCider, cider_stderr
from megatron_mm.evaluation.tasks.base import Answered

logger = logging.getLogger(__name__)

_LONGEST = 4
_SIGMA = 6.0
Counts = Counter[tuple[str, ...]]


@functools.cache
def has_official_tokenizer() -> bool:
    """Return whether pycocoevalcap and Java are installed; warn if not."""
    found = importlib.util.find_spec("pycocoevalcap") is not None and shutil.which("java") is not None
    if not found and os.environ.get("RANK", "0") == "0":  # once, not on every process
        logger.warning(
            "captions are tokenized almost, but not exactly, as in the COCO evaluation: install pycocoevalcap (pip install "
            "'megatron_mm[eval]') and Java for publishable scores"
        )
    return found


def tokenized(captions: Sequence[str]) -> list[list[str]]:
    """Return the words of each caption."""
    if not has_official_tokenizer():
        return [penn_words(caption) for caption in captions]
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = PTBTokenizer().tokenize({0: [{"caption": " ".join(caption.split())} for caption in captions]})[0]
    return [caption.split() for caption in found]


_CLITICS = re.compile(r"(?<=\w)('s|'re|'ve|'d|'m|'ll|n't)\b")
_WORD = re.compile(r"\w+(?:[-'.,/&]\w+)*|'\w+|[$&%#*=@/()]")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-"}


def penn_words(caption: str) -> list[str]:
    """Split a caption like PTBTokenizer: lower case, clitics split off ("it's": it 's), no punctuation. For ordinary captions the words
    differ only where a full stop belongs to an abbreviation ("mr.")."""
    apart = _CLITICS.sub(r" \1", caption.lower().replace("cannot", "can not"))
    return [_BRACKETS.get(word, word) for word in _WORD.findall(apart)]


def _counts(words: Sequence[str]) -> Counts:
    return Counter(tuple(words[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(words) - n + 1))


class _Weights:
    """Computes tf-idf vectors, with the idf of a data set's references."""

    def __init__(self, references: Sequence[Sequence[Counts]]) -> None:
        self.images_with: Counter[tuple[str, ...]] = Counter()
        for of_image in references:
            self.images_with.update(set().union(*of_image))
        self.log_images = math.log(len(references))

    def vector(self, counts: Counts) -> dict[tuple[str, ...], float]:
        return {gram: count * (self.log_images - math.log(max(1, self.images_with[gram]))) for gram, count in counts.items()}


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """Return the score of each image, 0 to 10.

    Args:
        candidates: for each image, the words of its generated caption.
        references: for each image, the words of each reference.
    """
    counted = [[_counts(words) for words in of_image] for of_image in references]
    weights = _Weights(counted)
    scores = []
    for words, of_image, texts in zip(candidates, counted, references, strict=True):
        vector = weights.vector(_counts(words))
        similar = [
            _similarity(vector, weights.vector(counts), lengths=(len(words), len(text)))
            for counts, text in zip(of_image, texts, strict=True)
        ]
        scores.append(10 * sum(similar) / len(similar))
    return scores


def _similarity(one: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float], *, lengths: tuple[int, int]) -> float:
    products, norms = [0.0] * _LONGEST, [[0.0] * _LONGEST, [0.0] * _LONGEST]
    for number, vector in enumerate((one, other)):
        for gram, weight in vector.items():
            norms[number][len(gram) - 1] += weight**2
    for gram, weight in one.items():
        if gram in other:
            products[len(gram) - 1] += min(weight, other[gram]) * other[gram]
    cosines = [p / math.sqrt(a * b) if a and b else p for p, a, b in zip(products, *norms, strict=True)]
    return sum(cosines) / _LONGEST * _penalty(*lengths)


def _penalty(candidate: int, reference: int) -> float:
    """Factor for captions of different lengths, in words."""
    difference = max(0, candidate - 1) - max(0, reference - 1)  # the official code measures length in 2-grams, one fewer than words
    return math.exp(-(difference**2) / (2 * _SIGMA**2))


def cider_d_spread(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> ResampledCider:
    """CIDEr-D of samples of the images. Arguments as of `cider_d`."""
    counted = [[_counts(words) for words in of_image] for of_image in references]
    penalties = [[_penalty(len(one), len(text)) for text in of_image] for one, of_image in zip(candidates, references, strict=True)]
    return ResampledCider([_counts(words) for words in candidates], counted, penalties, longest=_LONGEST)


def caption_scores(answered: Sequence[Answered]) -> dict[str, float]:
    """CIDEr-D times 100 of all images with its standard error, and of each category if examples have categories."""
    texts = [text for one in answered for text in (one.answer, *one.example.answers)]
    words = iter(tokenized(texts))
    candidates, references = [], []
    for one in answered:
        candidates.append(next(words))
        references.append([next(words) for _ in one.example.answers])
    scores = cider_d(candidates, references)
    found = {"score": 100 * sum(scores) / len(scores) if scores else math.nan}
    if len(scores) > 1:
        found["stderr"] = 100 * cider_stderr(cider_d_spread(candidates, references), num_images=len(scores))
    for category in sorted({one.example.category for one in answered} - {""}):
        own = [score for score, one in zip(scores, answered, strict=True) if one.example.category == category]
        found[category] = 100 * sum(own) / len(own)
    return found
