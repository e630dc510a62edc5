"""Packing a window: documents stay whole if they fit and are cut if not; nothing is lost or ordered by length."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.packing import Window, document_images, document_lengths, pack_window, supervised_tokens
from megatron_mm.data.plan.stream import samples_of
from megatron_mm.data.sources.index import ITEM, SAMPLE, SourceIndex


def source(documents: list[list[int | None]]) -> SourceIndex:
    """Return an index of documents, each a list of items: the number of tokens of a text, or None for an image."""
    samples = np.zeros(len(documents), SAMPLE)
    items = np.zeros(sum(map(len, documents)), ITEM)
    first = 0
    for row, document in zip(samples, documents, strict=True):
        row["first_item"], row["num_items"] = first, len(document)
        row["text_tokens"] = sum(tokens or 0 for tokens in document)
        row["num_images"] = document.count(None)
        for item, tokens in zip(items[first : first + len(document)], document, strict=True):
            item["is_image"], item["tokens"] = tokens is None, tokens or 0
        first += len(document)
    return SourceIndex("made", "interleaved", Path("made"), ("0.tar",), "", {}, samples, items)


def image_of(tokens: int, **fields: Any) -> ImageInput:
    """Return an image input of `tokens` feature tokens."""
    return ImageInput(size=8, fill=(0, 0, 0), tokens=tokens, **fields)


def pack(index: SourceIndex, rows: np.ndarray, limits: Limits, image: ImageInput, **options: int) -> Window:
    """Pack the samples `rows` into a window."""
    return pack_window(index, samples_of(index, rows, image), limits, image, **options)


def pieces(window: Window) -> list[tuple[int, int, int]]:
    """Return the pieces (sample, begin, end), sorted."""
    return sorted(zip(window.sample.tolist(), window.begin.tolist(), window.end.tolist(), strict=True))


def test_places_of_images_in_a_document() -> None:
    """BOS, 3 tokens, an image of 4, 2 tokens, an image, EOS: images start at 4 and 10; 15 tokens in all."""
    index = source([[3, None, 2, None]])
    images = document_images(index, 0, image_of(4))
    assert images.starts.tolist() == [4, 10] and images.ends.tolist() == [8, 14] and images.length == 15
    assert document_lengths(samples_of(index, np.array([0]), image_of(4)), image_of(4)).tolist() == [15]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ([8], [(0, 10)]),  # just fits
        ([9], [(0, 10), (10, 11)]),
        ([30], [(0, 10), (10, 20), (20, 30), (30, 32)]),
        ([7, None], [(0, 8), (8, 13)]),  # the image, at 8 to 12, would be split
        ([2, None, None, 1], [(0, 7), (7, 13)]),  # so would the second one, at 7 to 11
        ([None] * 3 + [1], [(0, 9), (9, 15)]),  # two images to a sequence
        ([20, None], [(0, 10), (10, 20), (20, 26)]),  # an image just after a cut
    ],
)
def test_long_documents_are_cut_beside_images(document: list[Any], expected: list[Any]) -> None:
    window = pack(source([document]), np.array([0]), Limits(10, 2), image_of(4), seed=0)
    assert [(begin, end) for _, begin, end in pieces(window)] == expected
    assert max(window.tokens) <= 10 and max(window.images_of) <= 2
    assert sum(window.images_of) == document.count(None)


def test_too_many_images_are_cut_even_where_tokens_fit() -> None:
    window = pack(source([[1, None, None, None]]), np.array([0]), Limits(100, 2), image_of(4), seed=0)
    assert pieces(window) == [(0, 0, 10), (0, 10, 15)]
    assert sorted(window.images_of) == [1, 2]


def test_nothing_is_lost_and_the_limits_hold() -> None:
    rng = np.random.default_rng(0)
    documents = [[None if rng.random() < 0.4 else int(rng.integers(1, 60)) for _ in range(rng.integers(1, 9))] for _ in range(300)]
    index = source(documents)
    samples = rng.permutation(300)
    window = pack(index, samples, Limits(128, 3), image_of(16), seed=1)
    assert max(window.tokens) <= 128 and max(window.images_of) <= 3
    assert window.starts[0] == 0 and window.starts[-1] == len(window.sample) and (np.diff(window.starts) > 0).all()
    assert sum(window.images_of) == int(index.sample_rows["num_images"].sum())
    for sample, group in itertools.groupby(pieces(window), key=lambda piece: piece[0]):
        bounds = [(begin, end) for _, begin, end in group]
        images = document_images(index, sample, image_of(16))
        assert bounds[0][0] == 0 and bounds[-1][1] == images.length
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
        assert not any(start < begin < start + 16 for start in images.starts for begin, _ in bounds)
    again = pack(index, samples, Limits(128, 3), image_of(16), seed=1)
    assert pieces(again) == pieces(window) and (again.sample == window.sample).all() and (again.starts == window.starts).all()
    assert (pack(index, samples, Limits(128, 3), image_of(16), seed=2).sample != window.sample).any()


def test_a_sample_that_comes_twice_is_packed_twice() -> None:
    window = pack(source([[5], [6]]), np.array([0, 1, 0]), Limits(10, 1), image_of(4), seed=0)
    assert pieces(window) == [(0, 0, 7), (0, 0, 7), (1, 0, 8)]


def test_long_and_short_documents_come_at_all_times() -> None:
    """Filling starts with the long documents, but the sequences of a window are shuffled."""
    rng = np.random.default_rng(0)
    index = source([[int(tokens)] for tokens in rng.integers(1, 200, 2000)])
    window = pack(index, np.arange(2000), Limits(256, 1), image_of(16), seed=0)
    longest = np.maximum.reduceat(window.end - window.begin, window.starts[:-1])
    quarters = [part.mean() for part in np.array_split(longest, 4)]
    assert max(quarters) - min(quarters) < 0.1 * longest.mean()


def test_an_image_longer_than_a_sequence_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"an image takes 16 tokens, more than data.sequence_length 12"):
        pack(source([[1, None]]), np.array([0]), Limits(12, 1), image_of(16), seed=0)


def test_what_stands_around_an_image_is_never_cut_off() -> None:
    """8 tokens and an image of 1 + 2 + 1 tokens, at 9 to 12, in sequences of 10."""
    image = image_of(2, before=("<img>",), after=("</img>",))
    window = pack(source([[8, None, 1]]), np.array([0]), Limits(10, 2), image, seed=0)
    assert pieces(window) == [(0, 0, 9), (0, 9, 15)]
    with pytest.raises(ValueError, match=r"an image takes 4 tokens, more than data.sequence_length 3"):
        pack(source([[None]]), np.array([0]), Limits(3, 2), image, seed=0)


def test_a_document_with_more_images_than_one_may_have_is_cut() -> None:
    """Its pieces may still share a sequence, and documents with fewer are left whole."""
    index = source([[None, 1, None, 1, None, 1], [None, 1, None]])
    window = pack(index, np.array([0, 1]), Limits(100, 8, max_images_per_document=2), image_of(4), seed=0)
    assert pieces(window) == [(0, 0, 11), (0, 11, 17), (1, 0, 11)]
    assert window.num_sequences == 1 and window.images_of == [5]
    assert len(pieces(pack(index, np.array([0, 1]), Limits(100, 8), image_of(4), seed=0))) == 2


def test_places_that_count_are_those_of_counted_items() -> None:
    """BOS, 2 tokens, an image of 4, 3 tokens, EOS: EOS is supervised if the last item is, BOS never."""
    index = source([[2, None, 3]])
    for counted in itertools.product((0, 1), repeat=3):
        index.item_rows["counted"] = counted
        text, image, last = map(bool, counted)
        assert supervised_tokens(index, 0, image_of(4)).tolist() == [False, *[text] * 2, *[image] * 4, *[last] * 3, last]


def test_pieces_know_their_place_in_the_stream() -> None:
    """All pieces of a cut document have the same position; a repeated document has another one."""
    window = pack(source([[5], [30]]), np.array([1, 0, 0]), Limits(20, 1), image_of(4), seed=0, first_position=70)
    found = sorted(zip(window.sample.tolist(), window.begin.tolist(), window.position.tolist(), strict=True))
    assert found == [(0, 0, 71), (0, 0, 72), (1, 0, 70), (1, 20, 70)]
