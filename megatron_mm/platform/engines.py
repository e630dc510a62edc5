"""Versions of megatron-core and Transformer Engine that go together. Imports neither, so that checks take no time."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

ENGINES = {(0, 16): ((2, 9), (2, 12)), (0, 17): ((2, 20), (2, 21)), (0, 18): ((2, 20), (2, 21)), (0, 19): ((2, 20), (2, 21))}
"""Versions of megatron-core that the tests run on -> versions of Transformer Engine that go with each: from the first, before the second.
0.16 declares its own range; with a later one it silently continues without some kernels. Later versions declare none: the range is what was
run. pyproject.toml has the same ranges for pip; docs/gpu.md lists which combinations were run."""


def is_supported(megatron_core: str) -> bool:
    return numbers(megatron_core) in ENGINES


def goes_with(megatron_core: str, transformer_engine: str) -> bool:
    """Whether these versions go together; False for a megatron-core that is not supported.

    >>> goes_with("0.16.1", "2.11.0"), goes_with("0.16.1", "2.20.2"), goes_with("0.19.2", "2.20.2")
    (True, False, True)
    """
    bounds = ENGINES.get(numbers(megatron_core))
    return bounds is not None and bounds[0] <= numbers(transformer_engine) < bounds[1]


def range_of(megatron_core: str) -> str:
    """The versions of Transformer Engine that go with a megatron-core, in pip's notation.

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


def mismatch(megatron_core: str, transformer_engine: str) -> str:
    """What is wrong with a pair of versions; empty if they go together, or if this megatron-core is not supported."""
    if not is_supported(megatron_core) or goes_with(megatron_core, transformer_engine):
        return ""
    wanted = range_of(megatron_core)
    return f"{transformer_engine}, but megatron-core {megatron_core} needs {wanted}: some kernels would not be used"


def installed(package: str = "megatron-core") -> str | None:
    """The installed version; None if there is none. For megatron-core, the version that an import would find, which may be a checkout on
    PYTHONPATH that pip does not know."""
    if package == "megatron-core" and (version := _in_sources()) is not None:
        return version
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _in_sources() -> str | None:
    """The version that megatron-core's sources state, without importing them; None if there are none."""
    spec = importlib.util.find_spec("megatron")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "core" / "package_info.py"
        if path.is_file():
            parts = dict(re.findall(r"""^(MAJOR|MINOR|PATCH|PRE_RELEASE) *= *['"]?([\w.]*)""", path.read_text(), re.MULTILINE))
            if {"MAJOR", "MINOR", "PATCH"} <= parts.keys():
                return f"{parts['MAJOR']}.{parts['MINOR']}.{parts['PATCH']}{parts.get('PRE_RELEASE', '')}"
            return None
    return None


def check(version: str | None) -> None:
    """Raise ValueError for a megatron-core that is too old. A version newer than all tested ones is allowed: `check_parts` checks whether
    it has everything that is used, and `remark` says that it is untested."""
    if version is not None and numbers(version) < min(ENGINES):
        raise ValueError(f"megatron-core {version} is too old for megatron_mm, which supports {_SPAN}: pip install '{WANTED}'")


def check_parts(version: str | None) -> None:
    """Raise ValueError if megatron-core is not installed, or lacks something that is used."""
    if version is None:
        raise ValueError(f"megatron-core is not installed: pip install '{WANTED}'")
    from megatron_mm.platform import engine_parts

    if lacking := engine_parts.missing():
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ValueError(
            f"megatron-core {version} lacks {', '.join(lacking[:3])}{more}, which megatron_mm uses; "
            f"versions {_SPAN} are supported: pip install '{WANTED}'"
        )


def remark(version: str | None) -> str:
    """Remark about an untested version; empty for tested ones."""
    if version is None or is_supported(version):
        return ""
    return f"megatron-core {version} is untested with megatron_mm, which is tested on {_SPAN}: pip install '{WANTED}'"


_SPAN = f"{'.'.join(map(str, min(ENGINES)))} to {'.'.join(map(str, max(ENGINES)))}"
WANTED = f"megatron-core>={'.'.join(map(str, min(ENGINES)))},<{max(ENGINES)[0]}.{max(ENGINES)[1] + 1}"
