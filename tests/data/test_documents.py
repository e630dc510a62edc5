"""Parsing of a document's bytes, and the reasons for which documents are refused."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from megatron_mm.data.sources.source import Kind
from megatron_mm.data.text.documents import parse_document
from megatron_mm.data.text.items import BadDocument, ImageReference, Item, Text


def interleaved(fields: Any) -> list[Item]:
    return parse_document("interleaved", json.dumps(fields).encode(), is_json=True)


@pytest.mark.parametrize(
    ("data", "is_json"),
    [
        (b"  a red circle\n", False),
        (b'{"caption": "a red circle", "width": 3}', True),
        (b'{"text": " a red circle"}', True),
        (b'{"text": "a red circle", "caption": "another"}', True),
        (b'\xef\xbb\xbf{"text": "a red circle"}', True),  # a byte order mark
        (b'{"caption": "a red circle"}', False),
    ],
)
def test_captions_in_every_form(data: bytes, is_json: bool) -> None:
    assert parse_document("pairs", data, is_json=is_json) == [Text("a red circle")]
    assert parse_document("pairs", data, is_json=False) == [Text("a red circle")], "a run reads what was indexed, without the name"


@pytest.mark.parametrize("data", [b"{red} ball", b"[1, 2] are numbers", b'{"a": 1}', b'"quoted"'])
def test_a_text_file_may_begin_as_json_does(data: bytes) -> None:
    assert parse_document("text", data, is_json=False) == [Text(data.decode())]


@pytest.mark.parametrize(
    "fields",
    [
        {"items": [{"text": "one"}, {"image": "0.JPG"}, {"text": "two", "image": None}, {"text": " "}]},
        {"texts": ["one", None, "two"], "images": [None, "0.jpg", None]},
        {"text_list": ["one", None, "two"], "image_list": [None, "0.jpg", None]},
        {"text_list": ["one", "two"], "image_info": [{"image_name": "0.jpg", "matched_text_index": 1, "matched_sim": 0.3}]},
    ],
    ids=["items", "obelics", "infimm", "mmc4"],
)
def test_interleaved_documents_in_every_form(fields: dict[str, Any]) -> None:
    assert interleaved(fields) == [Text("one"), ImageReference("0.jpg"), Text("two")]


def test_several_images_before_one_sentence_keep_their_order() -> None:
    info = [{"image_name": f"{name}.png", "matched_text_index": place} for name, place in ((2, 0), (0, 1), (1, 0))]
    found = interleaved({"text_list": ["a", "b"], "image_info": info})
    assert found == [ImageReference("2.png"), ImageReference("1.png"), Text("a"), ImageReference("0.png"), Text("b")]


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [
        ("pairs", b"\xff\xfe", "text is not UTF-8"),
        ("pairs", b' {"caption": "  "}', "no text"),
        ("pairs", b'{"caption": 3}', "JSON has no text or caption"),
        ("pairs", b'{"caption": "cut', "malformed JSON"),
        ("text", b'{"text": "half a surrogate pair: \\ud800"}', "text is not UTF-8"),
        ("text", b'{"text": "fine", "n": ' + b"1" * 5000 + b"}", "malformed JSON"),
        ("text", b'{"a": ' * 100_000, "malformed JSON"),
        ("text", b'["a line"]', "JSON is not an object"),
        ("text", b"a line", "malformed JSON"),
        ("interleaved", b'{"url": "x"}', "JSON has no items, texts or text_list"),
        ("interleaved", b'{"items": [{"image": "0.jpg"}]}', "no text"),
        ("interleaved", b'{"items": [{"text": "a", "image": "0.jpg"}]}', "malformed items list"),
        ("interleaved", b'{"items": [{"image": 3}]}', "malformed items list"),
        ("interleaved", b'{"items": ["a"]}', "malformed items list"),
        ("interleaved", b'{"texts": ["a"], "images": []}', "malformed texts list"),
        ("interleaved", b'{"texts": [null, null], "images": [null, "0.jpg"]}', "no text"),
        ("interleaved", b'{"text_list": [3], "image_info": []}', "malformed text_list list"),
        ("interleaved", b'{"text_list": ["a"]}', "malformed text_list list"),
    ],
)
def test_a_bad_document_has_its_reason(kind: Kind, data: bytes, reason: str) -> None:
    with pytest.raises(BadDocument) as caught:
        parse_document(kind, data, is_json=True)
    assert str(caught.value) == reason


@pytest.mark.parametrize("info", [{"image_name": "0.jpg", "matched_text_index": 1}, {"image_name": "0.jpg", "matched_text_index": -1}, {}])
def test_an_image_of_no_sentence_is_dropped_and_counted(info: dict[str, Any]) -> None:
    dropped = Counter[str]()
    data = json.dumps({"text_list": ["a"], "image_info": [{"image_name": None, "matched_text_index": None, **info}]}).encode()
    assert parse_document("interleaved", data, is_json=True, dropped=dropped) == [Text("a")]
    assert dropped == {"image without a name or without a text to belong to": 1}
