"""How each field of a released config.json is handled: one table per family, with which the file is read and checked.

A field is `read` if the recipe's model must have the same value. It has `must_be` values if our model can compute only these. Otherwise it
has a note that says why it has no effect. Fields in no table are named in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConfigField:
    """A field of config.json, or, with `.*` at the end, all fields of a part."""

    path: str
    """Its name; fields of a part have dotted names."""
    kind: type | None = None
    """Type of its values in JSON: int, float (which includes int), bool, str, list or dict; None allows any."""
    read: str = ""
    """Dotted name of the field of the recipe's model that must equal it."""
    convert: Callable[[Any], Any] = lambda value: value
    """Converts the file's value to ours."""
    default: Any = None
    """Default of the authors' code if the file has no such field."""
    must_be: tuple[Any, ...] = ()
    """Values that our model supports."""
    note: str = ""
    """Reason why it is not compared, or explanation of it."""


def nested(part: str, fields: Iterable[ConfigField], *, ours: str) -> tuple[ConfigField, ...]:
    """Turn fields of a part into fields of the whole file.

    Args:
        part: name of the part in the file.
        ours: part of the recipe's model that it describes.
    """
    return tuple(replace(field, path=f"{part}.{field.path}", read=f"{ours}.{field.read}" if field.read else "") for field in fields)


def read_fields(
    document: Mapping[str, Any], fields: Iterable[ConfigField], *, also: Mapping[str, Any] | None = None, file: str = "config.json"
) -> dict[str, Any]:
    """Read the fields of the recipe's model that must be equal, with their values.

    Args:
        also: one more allowed value for each of these paths, because of a decoder variant.
        file: name of the document's file, for the log.

    Raises ValueError that lists every field whose value has the wrong type or is not supported by our model.
    """
    found, wrong, fields = {}, [], tuple(fields)
    for field in fields:
        given = _value(document, field.path)
        value = field.default if given is None else given
        if given is not None and field.kind is not None and not _is(given, field.kind):
            wrong.append(f"{field.path} is {given!r}, but must be {_KINDS[field.kind]}")
            continue
        allowed = (*field.must_be, *([also[field.path]] if also and field.path in also else []))
        if field.must_be and value not in allowed:
            values = " or ".join(repr(option) for option in field.must_be)
            wrong.append(f"{field.path} is {value!r}, but our model computes {values}" + (f" ({field.note})" if field.note else ""))
        if field.read and (given is not None or field.default is not None):
            found[field.read] = field.convert(value)
    if wrong:
        raise ValueError(f"it describes a different model: {'; '.join(wrong)}")
    unknown = unknown_fields(document, fields)
    if unknown:
        logger.warning("%s has unknown fields, which are ignored: %s", file, ", ".join(unknown))
    return found


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def _is(value: Any, kind: type) -> bool:
    """Return whether a JSON value has a type; true and false are not numbers."""
    if kind in (int, float):
        return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, Mapping if kind is dict else list | tuple if kind is list else kind)


def unknown_fields(document: Mapping[str, Any], fields: Iterable[ConfigField]) -> list[str]:
    """Fields that are neither in the table nor among those that transformers writes into every file."""
    names = {field.path for field in fields}
    parts = tuple(name.removesuffix("*") for name in names if name.endswith(".*"))
    return [
        path
        for path in flat(document)
        if path not in names
        and not path.startswith(parts)
        and path.rpartition(".")[2] not in _of_every_file()
        and path.split(".")[0] != "auto_map"
    ]


def flat(document: Mapping[str, Any], *, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields."""
    for name, value in document.items():
        if isinstance(value, Mapping) and name.endswith(("config", "cfg", "visual", "language")):
            yield from flat(value, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def table_lines(fields: Iterable[ConfigField], written: Mapping[str, Any]) -> Iterator[str]:
    """Write the table in Markdown.

    Args:
        written: a config.json of one of our exports.
    """
    ours = set(flat(written))
    yield "| field | read and compared with | must be | written |"
    yield "|---|---|---|---|"
    for field in fields:
        must = " or ".join(f"`{value!r}`" for value in field.must_be)
        read = f"`{field.read}`" if field.read else field.note or "-"
        yield f"| `{field.path}` | {read} | {must or '-'} | {'yes' if field.path in ours else '-'} |"


def part_of(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a part of a configuration. Raises ValueError if it is missing or not an object."""
    part = document.get(name)
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} is {part!r}, but must be an object that describes this part of the model")
    return part


def number_in(document: Mapping[str, Any], name: str, *, where: str, default: float | None = None) -> float | None:
    """Return a number from a part that has no table. Raises ValueError if the value is not a number."""
    value = document.get(name)
    if value is not None and not _is(value, float):
        raise ValueError(f"{where}{name} is {value!r}, but must be {_KINDS[float]}")
    return default if value is None else float(value)


def _value(document: Mapping[str, Any], path: str) -> Any:
    found: Any = document
    for name in path.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


@cache
def _of_every_file() -> frozenset[str]:
    """Fields about saving, generation and training that current or earlier versions of transformers write into every configuration."""
    from transformers import GenerationConfig, PretrainedConfig

    earlier = """_name_or_path _commit_hash add_cross_attention auto_map bad_words_ids cross_attention_hidden_size decoder_start_token_id
    finetuning_task is_decoder prefix problem_type pruned_heads sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder
    tokenizer_class
    tokenizer_type torch_dtype dtype torchscript use_bfloat16 use_cache initializer_range attn_implementation _attn_implementation_autoset
    transformers_version use_return_dict exponential_decay_length_penalty begin_suppress_tokens forced_bos_token_id forced_eos_token_id"""
    return frozenset({*PretrainedConfig().to_dict(), *GenerationConfig().to_dict(), *earlier.split()})
