"""Runs commands that must fail."""

from __future__ import annotations

from collections.abc import Callable

Fails = Callable[..., str]
"""Function that runs a command in this process, which must exit with code 2 and one line of error; returns the line. With `prints=True` the
command may also write to standard output."""
