"""Converts conversations from the forms of various tools to the form that `layouts.llava` reads: turns and a separate list of images.

OpenAI and others   {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "1.jpg"}},
                                                               {"type": "text", "text": "What is it?"}]}, ...]}
                    also {"type": "image", "image": "1.jpg"}; the image may be a path, a URL, a data: URL, or bytes; LLaMA-Factory writes
                    the text and the image as `value`, Anthropic the image as `source` with `url`, or with `media_type` and `data`
Qwen-VL             {"conversations": [{"from": "user", "value": "Picture 1: <img>1.jpg</img>\\nWhat is it?"}, ...]}
InternLM-XComposer  <ImageHere> in place of <image>
The Cauldron        {"images": [...], "texts": [{"user": "What is it?", "assistant": "A ball."}, ...]}; its images come first
ms-swift            {"conversation": [{"human": "What is it?", "assistant": "A ball."}, ...]}
one question        {"instruction": "What is it?", "input": "", "output": "A ball.", "image": "1.jpg"} (Alpaca, LLaVA's evaluations), or
                    with other names (`_QUESTIONS`); `history` may have earlier pairs of questions and answers

Any of these may have a system prompt in `system` or `system_prompt`.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_mm.data.image_formats import is_image_name
from megatron_mm.data.prepare.published.losses import Record
from megatron_mm.data.prepare.published.tables import rows_in
from megatron_mm.data.text.conversations import ASKS, IMAGE_MARK, IMAGE_PARTS, LOSS_WEIGHTS, SYSTEM, is_conversation, speaker
from megatron_mm.data.text.keys import Keys

_SAID = ("from", "role", "value", "content", *LOSS_WEIGHTS)
"""Fields of a turn that are kept."""
_LISTS = ("conversations", "messages")
_QUESTIONS = (
    *(("instruction", "output"), ("query", "response"), ("question", "answer")),
    *(("prompt", "response"), ("prompt", "completion"), ("instruction", "response")),
)
"""Fields with a question and its answer, in order of preference."""
_PAIRS = (("texts", "user", "assistant"), ("conversation", "human", "assistant"))
"""A field with pairs of questions and answers, and their names in a pair."""
_MAY_BE_COLUMNS = (*_LISTS, *(name for name, *_ in _PAIRS))
_SYSTEM = ("system", "system_prompt")
_QWEN_IMAGE = re.compile(r"<img>([^<>\n]+)</img>")
_XCOMPOSER_MARK = "<ImageHere>"


def usual_chat(record: Record, keys: Keys) -> Record:
    """Return a conversation with its images in `images` and only text in its turns. Other records are returned unchanged."""
    if keys.messages is not None or keys.image is not None:
        return record
    record = {name: rows_in(value) if name in _MAY_BE_COLUMNS else value for name, value in record.items()}
    if not is_conversation(record, keys):
        record = _of_pairs(_named_otherwise(record))
    if not is_conversation(record, keys):
        return record
    found: Record = dict(record)
    images: list[Any] = []
    named = bool(record.get("images") or record.get("image"))
    for name in _LISTS:
        if isinstance(record.get(name), list):
            found[name] = _with_system(record, [_turn(turn, images, named=named) for turn in record[name]])
    if images and not named:
        found["images"] = images
    return found


def _with_system(record: Record, turns: list[Any]) -> list[Any]:
    """Add the system prompt of a record that has it in a field of its own."""
    system = next((value for name in _SYSTEM if isinstance(value := record.get(name), str) and value.strip()), None)
    if system is None or (turns and speaker(turns[0]) == SYSTEM):
        return turns
    return [{"role": SYSTEM, "content": system}, *turns]


def _turn(turn: Any, images: list[Any], *, named: bool) -> Any:
    """Return a turn in which placeholders replace images, and append the images to `images`.

    Args:
        named: the record names its images in a field, so they are not looked for in texts.
    """
    if not isinstance(turn, dict):
        return turn
    said = {key: turn[key] for key in _SAID if key in turn}
    for key in ("value", "content"):
        if isinstance(said.get(key), list):
            said[key] = [_part(part, images) for part in said[key]]
        elif isinstance(said.get(key), str) and speaker(turn) in ASKS:
            said[key] = _marked(said[key], images, named=named)
    return said


def _marked(text: str, images: list[Any], *, named: bool) -> str:
    """Replace the marks of other tools in a question."""
    text = text.replace(_XCOMPOSER_MARK, IMAGE_MARK)
    paths = [path for path in _QWEN_IMAGE.findall(text) if "://" in path or is_image_name(path.rpartition(".")[2].lower())]
    if named or IMAGE_MARK in text:
        return text
    for path in paths:
        text = text.replace(f"<img>{path}</img>", IMAGE_MARK, 1)
    images += paths
    return text


def _part(part: Any, images: list[Any]) -> Any:
    if not isinstance(part, dict):
        return part
    if part.get("type") == "text" and isinstance(part.get("value"), str):  # LLaMA-Factory
        return {"type": "text", "text": part.get("text", part["value"])}
    if part.get("type") not in IMAGE_PARTS:
        return part
    value = next((part[key] for key in (*IMAGE_PARTS, "path", "url", "value") if part.get(key) is not None), None)
    if value is None and isinstance(source := part.get("source"), dict):  # Anthropic
        value = f"data:{source.get('media_type')};base64,{source['data']}" if isinstance(source.get("data"), str) else source
    if isinstance(value, dict) and isinstance(value.get("url"), str):
        value = value["url"]
    if value is not None:
        images.append(value)
    return {"type": "image"}


def _of_pairs(record: Record) -> Record:
    """Convert questions and answers that are fields, or pairs in a list, to a conversation. If images have no place, they come first."""
    if isinstance(record.get("conversations"), list):
        return record
    pairs = _listed_pairs(record) or _asked(record)
    if pairs is None:
        return record
    turns = [{"from": who, "value": said} for pair in pairs for who, said in zip(("human", "gpt"), pair, strict=True)]
    return {**{name: value for name, value in record.items() if name not in ("texts", "conversation")}, "conversations": turns}


def _named_otherwise(record: Record) -> Record:
    """Rename a list of turns that is called `conversation`, as in Mantis-Instruct."""
    turns = record.get("conversation")
    if not (isinstance(turns, list) and turns and all(speaker(turn) is not None for turn in turns)):
        return record
    return {**{name: value for name, value in record.items() if name != "conversation"}, "conversations": turns}


def _listed_pairs(record: Record) -> list[tuple[Any, Any]] | None:
    for name, asks, answers in _PAIRS:
        pairs = record.get(name)
        if isinstance(pairs, list) and pairs and all(isinstance(pair, dict) and {asks, answers} <= pair.keys() for pair in pairs):
            return [(pair[asks], pair[answers]) for pair in pairs]
    return None


def _asked(record: Record) -> list[tuple[Any, Any]] | None:
    names = next((pair for pair in _QUESTIONS if all(isinstance(record.get(name), str) for name in pair)), None)
    history = record.get("history") or []
    if names is None or not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return None
    question, answer = (record[name] for name in names)
    more = record.get("input") if names[0] == "instruction" else None
    if isinstance(more, str) and more.strip():
        question = f"{question}\n{more}"
    return [*((asked, answered) for asked, answered in history), (question, answer)]
