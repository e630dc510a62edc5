"""Parses a sample's bytes into its items in reading order.

    pairs        an image (`image_formats.IMAGE_EXTENSIONS`) + KEY.txt, or KEY.json with `text` or `caption`. The image comes first.
    interleaved  KEY.json with an ordered list, and images that the list names. Three forms:
                 {"items": [{"text": "..."}, {"image": "0.jpg"}, ...]}
                 {"texts": ["...", null, ...], "images": [null, "1.jpg", ...]}      (OBELICS; or `text_list` and `image_list`)
                 {"text_list": ["..."], "image_info": [{"image_name": "0.png", "matched_text_index": 0}]}    (MMC4;
                 an image is placed before the sentence that it matches)
    text         a line of a .jsonl with `text`, KEY.txt, or KEY.json with `text`
    conversations, tasks   KEY.json and the images that it names, or a line of a .jsonl (`data.text.conversations`). A conversation of one
                 image need not name it, and its KEY.json may be only the list of its turns

If a .txt file contains a JSON object with `text` or `caption`, as some tools write it, that text is used; otherwise the whole file is the
text. The image "NAME" of a document KEY.json is the member KEY.NAME. `Keys` sets other names for fields and files.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from megatron_mm.data.sources.source import CHAT_KINDS, Kind, Source
from megatron_mm.data.text.chat import Rendering, Turn, render, rendering_of
from megatron_mm.data.text.conversations import TASKS, conversation_turns, is_conversation, speaker, task_turns
from megatron_mm.data.text.items import BadDocument, ImageReference, Item, Text
from megatron_mm.data.text.keys import USUAL, Keys, field_of, keys_of

OWN_IMAGE = ""
"""Extension in a reference to the only image of a sample, whatever its real extension."""


def read_items(source: Source, row: int) -> list[Item]:
    """Return the items of a sample. Raises what `parse_document` and `Source.document` raise."""
    return parse_document(source.kind, source.document(row), is_json=False, rendering=rendering_of(source), keys=keys_of(source))


def parse_document(
    kind: Kind,
    data: bytes,
    *,
    is_json: bool,
    rendering: Rendering | None = None,
    keys: Keys = USUAL,
    dropped: Counter[str] | None = None,
) -> list[Item]:
    """Return the items of a document in reading order. For a pair this is only the caption, unless it is rendered with a caption prompt.

    Raises BadDocument with a short reason.

    Args:
        is_json: the document must be JSON, because its name says so. Documents of all kinds but pairs and text always must.
        rendering: how conversations, tasks, and pairs with a caption prompt are rendered as chats.
        keys: names of the fields.
        dropped: if given, incremented for each entry of the document that is left out, by reason.
    """
    try:
        decoded = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadDocument("text is not UTF-8") from None
    dropped = Counter() if dropped is None else dropped
    items = _items(kind, decoded, is_json=is_json, rendering=rendering, keys=keys, dropped=dropped)
    texts = [item.text for item in items if isinstance(item, Text)]
    if not texts:
        raise BadDocument("no text")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise BadDocument("text is not UTF-8") from None
    return items


def _items(kind: Kind, decoded: str, *, is_json: bool, rendering: Rendering | None, keys: Keys, dropped: Counter[str]) -> list[Item]:
    if kind in CHAT_KINDS:
        assert rendering is not None, "conversations need a chat template"
        if kind == "tasks":
            return render(task_turns(_json(decoded)), rendering.template)
        own = ImageReference(OWN_IMAGE, counted=False)
        return render(conversation_turns(_chat(decoded), keys, own=own), rendering.template)
    if kind == "pairs" and rendering is not None and rendering.caption_prompt is not None:
        caption = _plain_text(decoded, is_json=is_json, keys=keys)
        turn = Turn((ImageReference(OWN_IMAGE, counted=False), rendering.caption_prompt), caption)
        return render([turn], rendering.template) if caption else []
    if kind != "interleaved":
        return [Text(text)] if (text := _plain_text(decoded, is_json=is_json, keys=keys)) else []
    items = _interleaved(_json(decoded), keys, dropped)
    found = [item for item in items if item is not None and (not isinstance(item, Text) or item.text.strip())]
    if len(found) < len(items):
        dropped["empty entry"] += len(items) - len(found)
    return found


def document_kind(data: bytes, keys: Keys = USUAL) -> Kind | None:
    """Return the kind of a JSON document (conversations, tasks or interleaved), judging by its fields; None if it is none of these."""
    try:
        fields = _chat(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, BadDocument):
        return None
    if is_conversation(fields, keys):
        return "conversations"
    if isinstance(task := fields.get("task"), str) and task in TASKS:
        return "tasks"
    return "interleaved" if any(isinstance(fields.get(name), list) for name in (*_FORMS, *filter(None, [keys.text]))) else None


_IMAGE_FIELDS = ("image", "images", "image_info")


def names_images(data: bytes, keys: Keys = USUAL) -> bool:
    """Return whether a JSON document names images and therefore is more than its text."""
    if b'"image' not in data and keys.image is None:
        return False
    try:
        fields = _json(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, BadDocument):
        return False
    names = (*_IMAGE_FIELDS, *([keys.image] if keys.image else []))
    return any(isinstance(found := field_of(fields, name), str | list | dict) and bool(found) for name in names)


def _plain_text(decoded: str, *, is_json: bool, keys: Keys) -> str:
    if is_json or decoded.lstrip().startswith("{"):
        try:
            fields = _json(decoded)
            names = ("text", "caption") if keys.text is None else (keys.text,)
            text = next((found for name in names if isinstance(found := field_of(fields, name), str)), None)
            if text is None:
                raise BadDocument(f"JSON has no {' or '.join(names)}")
            return text.strip()
        except BadDocument:
            if is_json:
                raise
    return decoded.strip()


def _json(decoded: str) -> dict[str, Any]:
    fields = _loaded(decoded)
    if not isinstance(fields, dict):
        raise BadDocument("JSON is not an object")
    return fields


def _chat(decoded: str) -> dict[str, Any]:
    """Load a document that may be only the list of turns of a conversation, as Megatron-LM's multimodal example writes it."""
    fields = _loaded(decoded)
    if isinstance(fields, list) and fields and all(speaker(turn) is not None for turn in fields):
        return {"conversations": fields}
    if not isinstance(fields, dict):
        raise BadDocument("JSON is not an object")
    return fields


def _loaded(decoded: str) -> Any:
    try:
        return json.loads(decoded, object_pairs_hook=object_of)
    except BadDocument:
        raise
    except (ValueError, RecursionError):  # a number with thousands of digits raises a plain ValueError
        raise BadDocument("malformed JSON") from None


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises BadDocument if a key occurs twice with different values, because one would be lost silently."""
    found = dict(pairs)
    if len(found) < len(pairs) and any(found[key] != value for key, value in pairs):
        raise BadDocument("JSON has a duplicate key")
    return found


def _interleaved(fields: dict[str, Any], keys: Keys, dropped: Counter[str]) -> list[Item | None]:
    if keys.text is not None or keys.image is not None:
        fields = {"texts": field_of(fields, keys.text or "texts"), "images": field_of(fields, keys.image or "images")}
    if isinstance(fields.get("image_list"), list) and "image_info" not in fields:  # InfiMM-WebMath
        fields = {"texts": fields.get("text_list"), "images": fields["image_list"]}
    for name, parse in _FORMS.items():
        if isinstance(fields.get(name), list):
            try:
                return parse(fields, dropped)
            except (KeyError, TypeError, AttributeError):
                raise BadDocument(f"malformed {name} list") from None
    raise BadDocument("JSON has no items, texts or text_list" if keys == USUAL else f"JSON has no list {keys.text or 'texts'}")


def _item(text: object, image: object) -> Item | None:
    """Return an entry of a list as an item; None if it is empty, for example because an image was lost earlier."""
    if text is None and image is None:
        return None
    if isinstance(text, str) and image is None:
        return Text(text)
    if isinstance(image, str) and text is None:
        return ImageReference(image.lower())
    raise TypeError("an item must be a text or an image")


def _own(fields: dict[str, Any], dropped: Counter[str]) -> list[Item | None]:
    return [_item(item.get("text"), item.get("image")) for item in fields["items"]]


def _obelics(fields: dict[str, Any], dropped: Counter[str]) -> list[Item | None]:
    if len(fields["texts"]) != len(fields["images"]):
        raise TypeError("lists of texts and images differ in length")
    return [_item(text, image) for text, image in zip(fields["texts"], fields["images"], strict=True)]


def _mmc4(fields: dict[str, Any], dropped: Counter[str]) -> list[Item | None]:
    texts = [_item(text, None) for text in fields["text_list"]]
    before: list[list[Item | None]] = [[] for _ in texts]
    for info in fields["image_info"] or []:
        if info["matched_text_index"] not in range(len(texts)) or not isinstance(info["image_name"], str):
            dropped[UNPLACED] += 1
        else:
            before[info["matched_text_index"]].append(_item(None, info["image_name"]))
    return [item for images, text in zip(before, texts, strict=True) for item in (*images, text)]


UNPLACED = "image without a name or without a text to belong to"
_FORMS = {"items": _own, "texts": _obelics, "text_list": _mmc4}
