"""Names of the fields and files of a source's samples, if they differ from the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_mm.data.sources.source import Source


@dataclass(frozen=True)
class Keys:
    """Names that a user gives; None takes the usual ones. Dots lead into objects: "meta.caption"."""

    text: str | None = None
    """Field with the text, or extension of the file with it ("note.txt"); of interleaved documents the list of texts."""
    image: str | None = None
    """Extension of the file with the image of a pair ("photo.jpg"); elsewhere the field that names images."""
    messages: str | None = None
    """Field with the turns of a conversation."""


USUAL = Keys()


def keys_of(source: Source) -> Keys:
    """What the fields of an opened source are called. Sources of other formats need not say."""
    found = getattr(source, "keys", USUAL)
    assert isinstance(found, Keys), "a source's `keys` are Keys"
    return found


def field_of(fields: dict[str, Any], key: str) -> Any:
    """A field by its name, or by the path to it: "meta.caption". None if there is none."""
    if key in fields:
        return fields[key]
    value: Any = fields
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value
