"""Converts conversations from the forms of various tools to the form that `layouts.llava` reads: turns and a separate list of images.

OpenAI and others   {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "1.jpg"}},
                                                               {"type": "text", "text": "What is it?"}]}, ...]}
                    also {"type": "image", "image": "1.jpg"}; the image may be a path, a URL, a data: URL, or bytes
The Cauldron        {"images": [...], "texts": [{"user": "What is it?", "assistant": "A ball."}, ...]}; its images come first
"""

from __future__ import annotations

from typing import Any

from megatron_mm.data.prepare.published.losses import Record
from megatron_mm.data.text.conversations import IMAGE_MARK, IMAGE_PARTS, is_conversation
from megatron_mm.data.text.keys import Keys

_SAID = ("from", "role", "value", "content")
"""Fields of a turn that are kept."""
_LISTS = ("conversations", "messages")


def usual_chat(record: Record, keys: Keys) -> Record:
    """Return a conversation with its images in `images` and only text in its turns. Other records are returned unchanged."""
    if keys.messages is not None or keys.image is not None:
        return record
    if not is_conversation(record, keys):
        return _of_pairs(record)
    found: Record = dict(record)
    images: list[Any] = []
    for name in _LISTS:
        if isinstance(record.get(name), list):
            found[name] = [_turn(turn, images) for turn in record[name]]
    if images and not record.get("images") and not record.get("image"):
        found["images"] = images
    return found


def _turn(turn: Any, images: list[Any]) -> Any:
    """Return a turn in which placeholders replace images, and append the images to `images`."""
    if not isinstance(turn, dict):
        return turn
    said = {key: turn[key] for key in _SAID if key in turn}
    for key in ("value", "content"):
        if isinstance(said.get(key), list):
            said[key] = [_part(part, images) for part in said[key]]
    return said


def _part(part: Any, images: list[Any]) -> Any:
    if not isinstance(part, dict) or part.get("type") not in IMAGE_PARTS:
        return part
    value = next((part[key] for key in (*IMAGE_PARTS, "path", "url") if part.get(key) is not None), None)
    if isinstance(value, dict) and isinstance(value.get("url"), str):
        value = value["url"]
    if value is not None:
        images.append(value)
    return {"type": "image"}


def _of_pairs(record: Record) -> Record:
    """Convert The Cauldron's pairs of questions and answers to a conversation."""
    pairs = record.get("texts")
    if (
        not isinstance(pairs, list)
        or not pairs
        or not all(isinstance(pair, dict) and {"user", "assistant"} <= pair.keys() for pair in pairs)
    ):
        return record
    images = record.get("images")
    marks = f"{IMAGE_MARK}\n" * len(images) if isinstance(images, list) else ""
    turns = [{"from": who, "value": pair[name]} for pair in pairs for who, name in (("human", "user"), ("gpt", "assistant"))]
    if isinstance(turns[0]["value"], str):
        turns[0]["value"] = marks + turns[0]["value"]
    return {"conversations": turns, "images": images or []}
