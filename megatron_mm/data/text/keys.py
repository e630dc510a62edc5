"""Names of the fields and files of a source's samples, if they differ from the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_mm.data.sources.source import Source


@dataclass(frozen=True)
class Keys:
    """Names given by the user; None for the usual ones. A dot leads into a nested object: "meta.caption"."""

    text: str | None = None
    """Field with the text, or extension of the text's file ("note.txt"); in interleaved documents, the field with the list of texts."""
    image: str | None = None
    """Extension of the file with the image of a pair ("photo.jpg"); in all other kinds, the field that names images."""
    messages: str | None = None
    """Field with the turns of a conversation."""


USUAL = Keys()


def keys_of(source: Source) -> Keys:
    """Return the names of an opened source's fields. A source of another format need not have `keys`."""
    found = getattr(source, "keys", USUAL)
    assert isinstance(found, Keys), "a source's `keys` must be Keys"
    return found


def field_of(fields: dict[str, Any], key: str) -> Any:
    """Return a field by its name or by its path ("meta.caption"); None if it does not exist."""
    if key in fields:
        return fields[key]
    value: Any = fields
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value
