"""The lists of texts and images of a web document, and the places where OBELICS begins another document.

OBELICS replaces links such as "read more", after which a page usually goes on with another topic, by a mark in its texts, and IDEFICS was
trained with an end-of-text token in place of the mark (arXiv 2306.16527, appendix A.1.2). Here each part becomes a sample:

    texts   "a\\n\\nMARK\\n\\nb"   null    "c"            [a]   and   [b, image, c]
    images  null                1.jpg   null
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_mm.data.prepare.published.losses import Record

MARK = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
_LISTS = (("texts", "images"), ("text_list", "image_list"))
"""Names of the two lists: OBELICS, OmniCorpus, MINT-1T; InfiMM-WebMath."""


def lists_of(record: Record) -> tuple[Any, Any]:
    """Return the lists of texts and images of a document, whatever they are called and whatever they are."""
    names = next((names for names in _LISTS if names[0] in record), _LISTS[0])
    return record.get(names[0]), record.get(names[1])


def separate(record: Record) -> Iterator[Record]:
    """Yield the documents of a record, each with a text. A record without marks, or one that is malformed, is returned unchanged."""
    texts, images = lists_of(record)
    if not (isinstance(texts, list) and isinstance(images, list) and len(texts) == len(images) and _is_marked(texts)):
        yield record
        return
    parts: list[list[tuple[Any, Any]]] = [[]]
    for text, image in zip(texts, images, strict=True):
        first, *rest = text.split(MARK) if isinstance(text, str) and image is None else [text]
        if image is not None or not rest or first.strip():
            parts[-1].append((first.rstrip() if rest else first, image))
        for piece in rest:
            if _has_text(parts[-1]):
                parts.append([])
            if piece.strip():
                parts[-1].append((piece.strip(), None))
    if len(parts) > 1 and not _has_text(parts[-1]):
        without_text = parts.pop()
        parts[-1] += without_text
    others = {key: value for key, value in record.items() if key not in (*_LISTS[0], *_LISTS[1], "metadata")}
    for part in parts:
        yield {**others, "texts": [text for text, _ in part], "images": [image for _, image in part]}


def _is_marked(texts: list[Any]) -> bool:
    return any(isinstance(text, str) and MARK in text for text in texts)


def _has_text(part: list[tuple[Any, Any]]) -> bool:
    return any(isinstance(text, str) and text.strip() for text, _ in part)
