"""An option that was requested, and the objections to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """An option that was requested, and the objections to it."""

    name: str
    value: Any
    impossible: str = ""
    """Why it cannot run, and the remedy; empty if it can."""
    useless: str = ""
    """Why it has no effect; empty if it has."""
    costs: str = ""
    """Its drawbacks; empty if it has none."""
