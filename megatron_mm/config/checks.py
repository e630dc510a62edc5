"""Checks of configuration values, and what a wrong name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: the one way a config part rejects a value."""
    if not condition:
        raise ValueError(message)


def require_positive(part: object, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        require(value > 0, f"{name} is {value}, but must be positive")


def nearest(word: str, known: Iterable[str]) -> str:
    """`: did you mean NAME?`, or an empty string if no name is close."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""
