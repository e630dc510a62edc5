"""Checks of configuration values, and what a wrong name may have meant."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: the one way a config part rejects a value."""
    if not condition:
        raise ValueError(message)


def require_positive(part: object, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        require(isinstance(value, numbers.Real), f"{name} is {value!r}, but must be a positive number")
        require(value > 0, f"{name} is {value}, but must be positive")


def check_types(part: Any, *, path: str = "") -> None:
    """Raise ValueError that names the field if a value in a config part, or in one of its parts, has another type than the field.

    The command line makes values of the right type; recipes and other Python code may not. An integer may stand for a float, and a list for
    a tuple.

    Args:
        part: a dataclass of the configuration.
        path: the part's own name, for errors.
    """
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f"{path}.{field.name}".lstrip(".")
        require(_has_type(value, hints[field.name]), f"{name} is {value!r}, but must be {_described(hints[field.name])}")
        if dataclasses.is_dataclass(value):
            check_types(value, path=name)


def _has_type(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_has_type(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(kinds) and all(map(_has_type, value, kinds))
    if origin is dict:
        return isinstance(value, dict) and all(_has_type(k, arguments[0]) and _has_type(v, arguments[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _described(hint: Any) -> str:
    """What a field accepts, for an error."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("None" if option is type(None) else _described(option) for option in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    simple = {int: "an integer", float: "a number", bool: "True or False", str: "a text", Path: "a pathlib.Path"}
    if hint in simple:
        return simple[hint]
    if not isinstance(hint, type) or origin is not None:
        return f"of the type {hint}"
    return f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__}"


def nearest(word: str, known: Iterable[str]) -> str:
    """`: did you mean NAME?`, or an empty string if no name is close.

    A few names that contain all parts of the word are closer than one that is spelled like it: num-heads means num-attention-heads.
    """
    names = list(dict.fromkeys(known))
    near = containing(word, names)
    if not 0 < len(near) <= 3:
        near = difflib.get_close_matches(word, names, n=1)
    return f": did you mean {' or '.join(near)}?" if near else ""


def containing(word: str, names: Iterable[str]) -> list[str]:
    """Return the names that contain all parts of a word: peak-lr and min-lr contain lr."""
    parts = set(re.findall("[a-z0-9]+", word.lower()))
    return [name for name in names if parts and parts <= set(re.findall("[a-z0-9]+", name.lower()))]
