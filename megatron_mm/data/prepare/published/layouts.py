"""Converts records of published data sets to samples: one function per layout.

    pairs      {image, caption}: img2dataset's parquet, Hugging Face parquet, JSON lines with a path; also records made from folders
    obelics    {texts, images}, or {text_list, image_list}: texts and URLs, in reading order
    mmc4       {text_list, image_info: [{image_name, raw_url, matched_text_index}]}: an image is placed before the sentence it matches
    llava      {conversations | messages, image?}: `image` is one path or a list; or the images are parts of turns, or there is one question
               (`chats`)
    tasks      {task, question, answer, image}: made by `annotations` from VQA, caption and choice files
    text       {text}

An image is named by its path or its URL, or contained in the record: as bytes, as Hugging Face's {bytes, path}, or as base64
(`data:image/...`).

A sample is a document in the form that `data.text.documents` reads, and the images that it names.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mm.data.image_formats import IMAGE_EXTENSIONS
from megatron_mm.data.prepare.published.chats import usual_chat
from megatron_mm.data.prepare.published.images import ImageStore, image_extension
from megatron_mm.data.prepare.published.losses import EMPTY, UNANSWERED, Dropped, Record
from megatron_mm.data.prepare.published.records import text_of
from megatron_mm.data.prepare.published.web_documents import lists_of
from megatron_mm.data.text.conversations import ANSWERS, ASKS, SYSTEM, conversation_turns, is_conversation, speaker, task_turns
from megatron_mm.data.text.documents import UNPLACED
from megatron_mm.data.text.items import BadDocument
from megatron_mm.data.text.keys import USUAL, Keys, field_of


class LeftOut(Exception):
    """A record that is left out without being a loss, such as an image that img2dataset could not fetch; the message is the reason."""


@dataclass(frozen=True)
class Context:
    """Everything that layouts need besides a record."""

    images: ImageStore | None = None
    text_keys: tuple[str, ...] = ("text",)
    image_keys: tuple[str, ...] = ()
    keys: Keys = USUAL
    """Names of the fields of conversations."""
    dropped: Dropped = field(default_factory=Dropped)
    """Images and entries that are dropped from documents."""


@dataclass(frozen=True)
class OutSample:
    """A sample to write."""

    document: bytes
    is_json: bool
    images: tuple[tuple[str, bytes], ...] = ()
    """Extension ("0.jpg", "jpg") and contents."""


Layout = Callable[[Record, Context], OutSample]

CAPTION_KEYS = ("caption", "text", "TEXT", "txt", "top_caption", "alt_text")
TEXT_KEYS = ("text", "txt")
_FIRST_IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "image", "image_path", "img", "image_bytes", "file_name")
IMAGE_KEYS = (*_FIRST_IMAGE_KEYS, *(extension for extension in IMAGE_EXTENSIONS if extension not in _FIRST_IMAGE_KEYS))
"""Fields that contain or name an image, in the order in which they are tried. In a tar, a file's extension is its field."""
URL_KEYS = ("url", "URL", "image_url")
"""Fields that name an image if no other field does, in the tables of LAION, COYO and PixMo, whose images are fetched separately."""


def pair(record: Record, context: Context) -> OutSample:
    """Convert an image and its caption. Raises BadDocument, LeftOut."""
    image = _first_image(record, context.image_keys, context)
    if image is None:
        status = record.get("status")
        if isinstance(status, str) and status != "success":
            raise LeftOut(f"not fetched by img2dataset: {status}")
        if context.image_keys == IMAGE_KEYS:
            image = _first_image(record, URL_KEYS, context)
        if image is None:
            raise BadDocument("no image")
    caption = text_of(record, context.text_keys)
    return OutSample(caption.encode(), is_json=False, images=((image_extension(image), image),))


def each_caption(record: Record, keys: Sequence[str]) -> Iterator[Record]:
    """Yield a record once for each caption, if its only text is a list of captions (Flickr30k as parquet, COCO in LAVIS' form)."""
    values = {key: value for key in keys if (value := field_of(record, key)) is not None}
    key = next((key for key, value in values.items() if isinstance(value, list) and all(isinstance(text, str) for text in value)), None)
    if key is None or not values[key] or any(isinstance(value, str | bytes) and value.strip() for value in values.values()):
        yield record
        return
    yield from ({**record, key: text} for text in values[key])


def _first_image(record: Record, keys: Sequence[str], context: Context) -> bytes | None:
    return next((found for key in keys if (found := _image_bytes(field_of(record, key), context)) is not None), None)


def _image_bytes(value: Any, context: Context) -> bytes | None:
    """Return the image that a field contains or names; None if the field is empty. Raises BadDocument."""
    if isinstance(value, dict) and isinstance(value.get("image"), dict):  # a list of them in older data sets
        value = value["image"]
    if isinstance(value, dict):  # Hugging Face's image feature
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, list) and len(value) == 1:
        return _image_bytes(value[0], context)
    if isinstance(value, bytes | bytearray):
        if not value:
            raise BadDocument("image is empty")
        return bytes(value)
    if isinstance(value, str) and value.startswith("data:image/"):
        return _of_base64(value.partition(",")[2])
    if isinstance(value, str) and value:
        if context.images is None:
            raise BadDocument("image is named, but no --images folder is given")
        return context.images.read(value.removeprefix("file://"))
    return None


def _of_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadDocument("image is not base64") from None


def obelics(record: Record, context: Context) -> OutSample:
    """Convert a document of texts and of images or their URLs. Images that are not found are dropped. Raises BadDocument."""
    texts, images = lists_of(record)
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise BadDocument("malformed texts list")
    entries: list[tuple[str | None, Any]] = []
    for text, image in zip(texts, images, strict=True):
        image = None if isinstance(image, dict) and not any(image.values()) else image
        if not isinstance(text, str | None) or not isinstance(image, str | bytes | dict | None) or (text is not None and image is not None):
            raise BadDocument("malformed texts list")
        entries.append((text, image))
    return _interleaved(entries, context)


def mmc4(record: Record, context: Context) -> OutSample:
    """Convert a document of sentences and images that each match a sentence. Raises BadDocument."""
    texts, infos = record.get("text_list"), record.get("image_info")
    infos = [] if infos is None else infos
    if not isinstance(texts, list) or not isinstance(infos, list) or not all(isinstance(text, str) for text in texts):
        raise BadDocument("malformed text_list list")
    before: list[list[tuple[str | None, Any]]] = [[] for _ in texts]
    for info in infos:
        index = info.get("matched_text_index") if isinstance(info, dict) else None
        name = _mmc4_image(info, context) if isinstance(info, dict) else None
        if not isinstance(index, int) or not 0 <= index < len(texts) or name is None:
            context.dropped.add(UNPLACED, str(name))
        else:
            before[index].append((None, name))
    return _interleaved([entry for images, text in zip(before, texts, strict=True) for entry in (*images, (text, None))], context)


def _mmc4_image(info: Record, context: Context) -> str | None:
    """Return the image itself if the record contains it (`image_base64`, as OpenFlamingo writes it); otherwise its file name, or its URL if
    the image is found only by that. None if it has neither."""
    if isinstance(encoded := info.get("image_base64"), str) and encoded:
        return encoded if encoded.startswith("data:image/") else f"data:image/unknown;base64,{encoded}"
    names = [info[key] for key in ("image_name", "raw_url") if isinstance(info.get(key), str)]
    for name in names:
        if context.images is None:
            break
        try:
            context.images.read(name)
        except BadDocument:
            continue
        return name
    return names[0] if names else None


def _interleaved(entries: Sequence[tuple[str | None, Any]], context: Context) -> OutSample:
    items: list[dict[str, str]] = []
    images: list[tuple[str, bytes]] = []
    for text, image in entries:
        if image is not None:
            try:
                data = _image_bytes(image, context) or b""
                extension = image_extension(data)
            except BadDocument as reason:
                context.dropped.add(str(reason), _shown(image))
                continue
            name = f"{len(images)}.{extension}"
            images.append((name, data))
            items.append({"image": name})
        elif text is not None and text.strip():
            items.append({"text": text})
        else:
            context.dropped.add(EMPTY)
    if not any("text" in item for item in items):
        raise BadDocument("no text")
    return OutSample(_json({"items": items}), is_json=True, images=tuple(images))


def _shown(image: Any) -> str:
    """Return the name of an image for a list of losses."""
    name = image.get("path") if isinstance(image, dict) else image
    return name if isinstance(name, str) and not name.startswith("data:") else "without a name"


def llava(record: Record, context: Context) -> OutSample:
    """Convert a conversation with its images. Raises BadDocument."""
    record = usual_chat(record, context.keys)
    if not is_conversation(record, context.keys):
        raise BadDocument(_LIST_OF_SETS if _is_list_of_sets(record) else f"JSON has no {context.keys.messages or 'conversations'}")
    if any(record.get(field) for field in _NOT_READ):
        raise BadDocument("conversation about a video or a sound")
    named = _named_images(record) if context.keys.image is None else field_of(record, context.keys.image)
    values = [] if named in (None, "") else named if isinstance(named, list) else [named]
    images = []
    for number, value in enumerate(values):
        data = _image_bytes(value, context)
        if data is None:
            raise BadDocument("no image")
        images.append((f"{number}.{image_extension(data)}", data))
    if context.keys.messages is None:
        fields = {key: _answered(record[key], context) for key in ("conversations", "messages") if isinstance(record.get(key), list)}
    else:
        fields = {"conversations": _answered(field_of(record, context.keys.messages), context)}
    fields["images"] = [name for name, _ in images]
    conversation_turns(fields)  # raises here rather than when it is indexed
    return OutSample(_json(fields), is_json=True, images=tuple(images))


_LIST_OF_SETS = "a list of data sets: convert the `annotation` of each, with its `root` as --images"


def _is_list_of_sets(record: Record) -> bool:
    """Return whether a record is InternVL's list of data sets, {NAME: {"root", "annotation", "repeat_time", ...}}."""
    return bool(record) and all(isinstance(entry, dict) and "annotation" in entry for entry in record.values())


def _named_images(record: Record) -> Any:
    """Return the images of a conversation: the single file next to it in a tar, whatever path it names; its field; or its URL."""
    named = record.get("images", record.get("image"))
    inside = [record[key] for key in IMAGE_KEYS if isinstance(record.get(key), bytes)]
    if not isinstance(named, list) and len(inside) == 1:
        return inside[0]
    return named if named is not None else record.get("image_url")


_NOT_READ = ("video", "videos", "audio", "audios")
"""Fields of media that no model here can use."""


def _answered(turns: list[Any], context: Context) -> list[Any]:
    """Return the turns without an answer that precedes all questions, which LLaVA's own loader also removes, and without an unanswered last
    question."""
    kept, first = list(turns), 1 if turns and speaker(turns[0]) == SYSTEM else 0
    if speaker(kept[first] if len(kept) > first else None) in ANSWERS:
        del kept[first]
    if kept and speaker(kept[-1]) in ASKS:
        del kept[-1]
    for _ in range(len(turns) - len(kept)):
        context.dropped.add(UNANSWERED)
    return kept


def task(record: Record, context: Context) -> OutSample:
    """Convert a question with its answer. Raises BadDocument."""
    data = _image_bytes(record.get("image"), context)
    images = () if data is None else ((f"0.{image_extension(data)}", data),)
    fields = {key: value for key, value in record.items() if key != "image" and value not in (None, "")}
    fields["images"] = [name for name, _ in images]
    task_turns(fields)  # raises here rather than when it is indexed
    return OutSample(_json(fields), is_json=True, images=images)


def text(record: Record, context: Context) -> OutSample:
    """Convert a text. Raises BadDocument."""
    return OutSample(_json({"text": text_of(record, context.text_keys)}), is_json=True)


def _json(fields: dict[str, Any]) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadDocument("text is not UTF-8") from None
    except (TypeError, ValueError):
        raise BadDocument("record has values that JSON cannot represent") from None


LAYOUTS: dict[str, Layout] = {"pairs": pair, "obelics": obelics, "mmc4": mmc4, "llava": llava, "tasks": task, "text": text}
WITH_KEYS = ("pairs", "llava", "text")
"""Layouts whose commands have options for the names of fields."""
