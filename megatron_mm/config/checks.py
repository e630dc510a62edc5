"""Checks of configuration values."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: the one way a config part rejects a value."""
    if not condition:
        raise ValueError(message)


def require_positive(part: object, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        require(value > 0, f"{name} is {value}, but must be positive")
