"""How values of each type of field are written on the command line.

int, float, str, Path    one word
Literal["a", "b"]        one of the words
bool                     True or False; no word means True
tuple[int, ...]          words: --parallel.stage-layers 6 8 8 6; numbers also with commas, 6,8,8,6
dict[str, float]         NAME=VALUE words
... | None               None, or a value of the type
"""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mm.config.checks import nearest


def without_none(hint: Any) -> Any:
    """`int` for `int | None`; a type that does not allow None is returned unchanged."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        assert len(kinds) == 1, f"{hint} has no meaning on the command line"
        return kinds[0]
    return hint


def takes_none(hint: Any) -> bool:
    return without_none(hint) is not hint


_KINDS: dict[Any, tuple[str, str]] = {
    None: ("None", "None, which removes it (to change it, use the options of its fields)"),
    int: ("INTEGER", "an integer"),
    float: ("NUMBER", "a number"),
    str: ("TEXT", "a text"),
    Path: ("PATH", "a path"),
}
"""For each simple type: the placeholder in the help, and the description in an error."""


def placeholder(hint: Any) -> str:
    """The placeholder for a value in the help."""
    kind, arguments = without_none(hint), typing.get_args(without_none(hint))
    if typing.get_origin(kind) is typing.Literal:
        found = "{" + ",".join(map(str, arguments)) + "}"
    elif typing.get_origin(kind) is tuple:
        several = len(arguments) == 2 and arguments[1] is Ellipsis
        found = f"{placeholder(arguments[0])} ..." if several else " ".join(map(placeholder, arguments))
    elif typing.get_origin(kind) is dict:
        found = f"NAME={placeholder(arguments[1])} ..."
    elif kind is bool:
        return "[{True,False,None}]" if takes_none(hint) else ""
    else:
        found = _KINDS[kind][0]
    return f"{found}|None" if takes_none(hint) else found


def expected(hint: Any) -> str:
    """The values that an option accepts, for an error."""
    kind, arguments = without_none(hint), typing.get_args(without_none(hint))
    if typing.get_origin(kind) is typing.Literal:
        found = "one of " + ", ".join(map(str, arguments))
    elif typing.get_origin(kind) is tuple:
        found = f"words like {placeholder(kind)}"
    elif typing.get_origin(kind) is dict:
        found = f"{placeholder(kind).removesuffix(' ...')}, for example pairs=0.5"
    elif kind is bool:
        found = "True or False"
    else:
        found = _KINDS[kind][1]
    return f"{found} or None" if takes_none(hint) else found


def parse_words(name: str, hint: Any, words: Sequence[str]) -> Any:
    """The value of an option, from its words. Raises ValueError that names the option, the words and what the option accepts.

    Args:
        name: the option's name.
        hint: the field's type.
    """
    kind, arguments = without_none(hint), typing.get_args(without_none(hint))
    if (kind is None or takes_none(hint)) and [word.lower() for word in words] == ["none"]:
        return None
    if kind is bool and not words:
        return True
    if typing.get_origin(kind) is dict:
        pairs = [word.partition("=") for word in words]
        wrong = [word for word, (key, equals, _) in zip(words, pairs, strict=True) if not key or not equals]
        if wrong or not words:
            raise ValueError(f"{name} takes {expected(hint)}, not {' '.join(wrong)!r}")
        return {key: parse_words(f"{name} {key}", arguments[1], [value]) for key, _, value in pairs}
    if typing.get_origin(kind) is tuple:
        several = len(arguments) == 2 and arguments[1] is Ellipsis
        if arguments[0] in (int, float):
            words = [part for word in words for part in word.split(",") if part]
        if not several and len(words) != len(arguments):
            raise ValueError(f"{name} takes {len(arguments)} values ({placeholder(hint)}), but got {len(words)}: {' '.join(words)!r}")
        kinds = [arguments[0]] * len(words) if several else arguments
        return tuple(parse_words(name, kind, [word]) for kind, word in zip(kinds, words, strict=True))
    if len(words) != 1:
        written = " ".join(words)
        raise ValueError(f"{name} takes {expected(hint)}, but got {f'{len(words)} values: {written!r}' if words else 'no value'}")
    return _parse_word(name, hint, kind, words[0])


def _parse_word(name: str, hint: Any, kind: Any, word: str) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        allowed = {str(value): value for value in typing.get_args(kind)}
        if word in allowed:
            return allowed[word]
        raise ValueError(f"{name} is {word!r}, but takes {expected(hint)}{nearest(word, allowed)}")
    if kind is bool and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if kind in (int, float, str, Path):
        with contextlib.suppress(ValueError):
            return kind(word)
    raise ValueError(f"{name} is {word!r}, but takes {expected(hint)}")


def written(value: Any) -> str:
    """A value in the form in which it is written on the command line."""
    if isinstance(value, dict):
        return " ".join(f"{key}={written(item)}" for key, item in value.items())
    return " ".join(map(written, value)) if isinstance(value, tuple) else str(value)
