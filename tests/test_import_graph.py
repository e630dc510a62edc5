"""No top-level package ("room") imports one above it, and no modules import each other in a circle; imports inside functions count, too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_mm"
ROOMS = (
    "platform",
    "config",
    "flops",
    "parallel",
    "data",
    "hf",
    "models",
    "families",
    "training",
    "evaluation",
    "reporting",
    "conversion",
    "run",
    "planning",
    "cli",
)
"""From bottom to top: a room imports only rooms before it, as docs/architecture.md states."""
CARRIED = "/hf_code/"
"""Code that is exported with models: transformers imports it, our modules do not."""


def modules() -> dict[str, Path]:
    """Return every module of the package by its name in the package, such as `training.trainer`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if CARRIED not in path.as_posix():
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """Yield each of the package's modules that a module imports, and True if only for type checking."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            # `from package import module` names a module, `from module import thing` a thing of one.
            targets = [
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}".removeprefix("megatron_mm.") in known else str(node.module)
                for alias in node.names
            ]
        for target in targets:
            inner = target.removeprefix("megatron_mm.")
            if target.startswith("megatron_mm.") and inner in known and inner != name:
                yield inner, id(node) in for_types


def room_of(module: str) -> str:
    return module.partition(".")[0]


def graph(*, types: bool) -> dict[str, set[str]]:
    """Return the modules that each module imports; imports for type checking are included if `types`."""
    known = modules()
    return {
        name: {target for target, for_types in imports(name, path, known) if types or not for_types} for name, path in known.items() if name
    }


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in edges.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def arrows_up(edges: dict[str, set[str]]) -> list[str]:
    order = {room: number for number, room in enumerate(ROOMS)}
    return [
        f"{name} imports {target}: {room_of(target)} stands above {room_of(name)}"
        for name, targets in sorted(edges.items())
        for target in sorted(targets)
        if order[room_of(target)] > order[room_of(name)]
    ]


def test_every_module_stands_in_a_room() -> None:
    assert {room_of(name) for name in modules() if name not in ("", "__main__")} == set(ROOMS)


def test_no_arrow_runs_up() -> None:
    edges = graph(types=True)
    edges.pop("__main__")
    assert not arrows_up(edges), "\n".join(arrows_up(edges))


def test_no_circle() -> None:
    """Between modules. (There is none between rooms if no import goes up.)"""
    assert circles(graph(types=True)) == []


@pytest.mark.parametrize(
    ("edges", "up", "round"),
    [
        ({"config.run": {"training.step"}}, ["config.run imports training.step: training stands above config"], []),
        ({"data.a": {"data.b"}, "data.b": {"data.c"}, "data.c": {"data.a"}}, [], [["data.a", "data.b", "data.c"]]),
        ({"training.step": {"config.run"}, "config.run": set()}, [], []),
    ],
)
def test_a_wrong_arrow_and_a_circle_are_found(edges: dict[str, set[str]], up: list[str], round: list[list[str]]) -> None:
    assert arrows_up(edges) == up and circles(edges) == round
