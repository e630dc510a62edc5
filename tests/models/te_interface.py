"""Differences between Transformer Engine's compiled extension and the interface recorded in `support.te`, one per line.

    python te_interface.py

It is a separate program because it loads the real extension, which other tests replace. Prints `not compiled` if none is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from support.te.extension import recorded
from support.te.record import cut


def parameters(function: Any) -> list[str]:
    """Return the parameters that pybind11 writes into the docstring; unnamed ones are arg0, arg1, ..."""
    line = function.__doc__.splitlines()[0]
    inside = line[line.index("(") + 1 : line.rindex(") ->")]
    return [part.split(":")[0] + ("?" if "=" in part else "") for part in cut(inside)]


def differences(extension: Any, written: dict[str, Any]) -> list[str]:
    found = []
    for name, members in written["enumerations"].items():
        here = {member: int(value) for member, value in getattr(extension, name).__members__.items()}
        if here != members:
            found.append(f"{name}: {here}, written down as {members}")
    functions = {name for name in dir(extension) if type(getattr(extension, name)).__name__ == "builtin_function_or_method"}
    found += [f"{name} is on one side only" for name in sorted(functions ^ written["functions"].keys())]
    for name in sorted(functions & written["functions"].keys()):
        here, known = parameters(getattr(extension, name)), written["functions"][name]
        if known is not None and (
            len(here) != len(known) or any(a != b for a, b in zip(here, known, strict=True) if not a.startswith("arg"))
        ):
            found.append(f"{name} takes {here}, written down as {known}")
    return found


def main() -> None:
    try:
        version = importlib.metadata.version("transformer-engine-torch")
    except importlib.metadata.PackageNotFoundError:
        print("not compiled")
        return
    import torch  # noqa: F401  the extension needs its libraries
    import transformer_engine.pytorch  # noqa: F401  loads the extension

    extension = importlib.import_module("transformer_engine_torch")
    print(*differences(extension, recorded(version)), sep="\n", end="")


if __name__ == "__main__":
    main()
