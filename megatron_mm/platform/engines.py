"""Versions of megatron-core and Transformer Engine that go together. Imports neither, so that asking costs nothing."""

from __future__ import annotations

import re

ENGINES = {(0, 16): ((2, 9), (2, 12)), (0, 19): ((2, 20), (2, 21))}
"""Versions of megatron-core that the tests run on, and of Transformer Engine that go with each: from the first on, before the second. 0.16
declares its own range; with a later one it continues without some kernels and says nothing. 0.19 declares none: the range is what was run.
pyproject.toml says the same to pip."""


def is_supported(megatron_core: str) -> bool:
    return numbers(megatron_core) in ENGINES


def goes_with(megatron_core: str, transformer_engine: str) -> bool:
    """Whether these versions go together; False for an engine that is not supported.

    >>> goes_with("0.16.1", "2.11.0"), goes_with("0.16.1", "2.20.2"), goes_with("0.19.2", "2.20.2")
    (True, False, True)
    """
    bounds = ENGINES.get(numbers(megatron_core))
    return bounds is not None and bounds[0] <= numbers(transformer_engine) < bounds[1]


def range_of(megatron_core: str) -> str:
    """The versions of Transformer Engine that go with an engine, as pip is told them.

    >>> range_of("0.16.1")
    '>=2.9,<2.12'
    """
    first, before = ENGINES[numbers(megatron_core)]
    return f">={first[0]}.{first[1]},<{before[0]}.{before[1]}"


def numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version.

    >>> numbers("2.9.0+70f53666")
    (2, 9)
    """
    major, minor = (int(number) for number in re.findall(r"\d+", version)[:2])
    return major, minor
