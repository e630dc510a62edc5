"""The table of tensors that Transformer Engine saves for the backward pass, against its source."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from support.te.install import FOLDER

from megatron_mm.planning.tracing.te_saves import RELEASE, TE_SAVES


def _source() -> Path:
    folder = FOLDER / RELEASE / "transformer_engine" / "pytorch"
    if not folder.is_dir():
        found = importlib.util.find_spec("transformer_engine")
        folder = Path(found.submodule_search_locations[0]) / "pytorch" if found and found.submodule_search_locations else folder
    if not folder.is_dir():
        pytest.skip(f"no source of Transformer Engine {RELEASE} here: `make install` fetches it")
    return folder


@pytest.mark.parametrize("module", TE_SAVES)
def test_the_source_keeps_what_the_table_says(module: str) -> None:
    saved = TE_SAVES[module]
    tree = ast.parse((_source() / saved.file).read_text())
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.lineno == saved.line and "sav" in ast.unparse(node.func).rpartition(".")[2]
    ]
    assert len(calls) == 1, f"{saved.file}:{saved.line} keeps nothing"
    assert tuple(ast.unparse(argument).removeprefix("*") for argument in calls[0].args) == saved.names
