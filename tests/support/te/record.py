"""Records the interface of Transformer Engine's compiled extension, from its source on PyPI.

    pip download --no-deps --no-build-isolation --no-binary :all: transformer-engine-torch==2.20.2
    tar xf transformer_engine_torch-2.20.2.tar.gz
    python tests/support/te/record.py transformer_engine_torch-2.20.2 > tests/support/te/2.20.2.json

The result lists every function with its parameters (optional ones are marked), and every enumeration with its members: the interface that
Transformer Engine's Python layers use. `tests/models/test_te.py` compares it with a compiled extension if one is installed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)


def cut(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, last = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "(<{[") - (sign in ")>}]")
        if sign == "," and depth == 0:
            parts.append(text[last:place])
            last = place + 1
    return [part.strip() for part in [*parts, text[last:]] if part.strip()]


def closing(text: str, opening: int) -> int:
    """Return the position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError("a bracket is never closed")


def declared(source: Path) -> dict[str, list[str]]:
    """Return the parameter names of the functions that csrc/extensions.h declares."""
    text = re.sub(r"^\s*#.*$", "", without_comments((source / "csrc" / "extensions.h").read_text()), flags=re.M)
    found = {}
    for match in re.finditer(r"[\w>&*]\s+\**&?(\w+)\(", text):
        end = closing(text, match.end() - 1)
        if text[end + 1 :].lstrip().startswith(";"):
            found[match.group(1)] = [re.split(r"[\s&*]", part.split("=")[0].strip())[-1] for part in cut(text[match.end() : end])]
    return found


def functions(source: Path) -> dict[str, list[str] | None]:
    """Return the parameters of each Python function, None if the extension's source does not state them.

    A question mark follows a parameter that may be left out; those after a star are keyword-only.
    """
    known, found = declared(source), {}
    for match in re.finditer(r"\bm\.def\(", text := bindings(source)):
        name, bound, *rest = cut(text[match.end() : closing(text, match.end() - 1)])
        given = [part for part in rest if "py::arg(" in part or "py::kw_only()" in part]
        found[name.strip('"')] = [parameter(part) for part in given] or known.get(re.split(r"::|&", bound)[-1])
    return dict(sorted(found.items()))


def bindings(source: Path) -> str:
    """Return the source that binds functions and enumerations to Python."""
    paths = [source / "common_headers" / "common" / "util" / "pybind_helper.h", source / "csrc" / "extensions" / "pybind.cpp"]
    return "".join(without_comments(path.read_text()) for path in paths).replace("\\\n", " ")


def parameter(part: str) -> str:
    named = re.search(r'py::arg\(\s*"(\w+)"\s*\)(.*)', part, re.S)
    return "*" if named is None else named.group(1) + ("?" if "=" in named.group(2) else "")


def values(source: Path) -> dict[str, int]:
    """Return the members of all enumerations in the headers, with their values."""
    found: dict[str, int] = {}
    for path in sorted((source / "common_headers").rglob("*.h")) + sorted((source / "csrc").rglob("*.h")):
        for match in re.finditer(r"\benum\s+(?:class\s+)?(\w*)\s*(?::\s*\w+\s*)?\{(.*?)\}", without_comments(path.read_text()), re.S):
            value = -1
            for item in (part.strip() for part in match.group(2).split(",")):
                if item:
                    name, _, given = (piece.strip() for piece in item.partition("="))
                    value = (
                        (int(given, 0) if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", given) else found.get(given, value + 1))
                        if given
                        else value + 1
                    )
                    found[f"{match.group(1)}::{name}"] = found[name] = value
    return found


def enumerations(source: Path) -> dict[str, dict[str, int]]:
    known = values(source)
    found = {}
    for match in re.finditer(r'enum_<([\w:]+)>\(\s*m,\s*"(\w+)"([^;]*?);', bindings(source), re.S):
        own = match.group(1).split("::")[-1]
        members = re.findall(r'\.value\(\s*"(\w+)"\s*,\s*([\w:]+)\s*\)', match.group(3))
        found[match.group(2)] = {
            name: known.get(f"{own}::{place.split('::')[-1]}", known.get(place.split("::")[-1], -1)) for name, place in members
        }
    return found


def main() -> None:
    source = Path(sys.argv[1])
    parts = {"functions": functions(source), "enumerations": enumerations(source)}
    lines = [
        f'"{part}": {{\n' + ",\n".join(f" {json.dumps(n)}: {json.dumps(v)}" for n, v in names.items()) + "\n}"
        for part, names in parts.items()
    ]
    print("{" + ",\n".join(lines) + "}")


if __name__ == "__main__":
    main()
