"""The table of engines has a row for each version, and failures are reported with their error line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "try_engines.py"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("try_engines", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "try_engines", module)
    spec.loader.exec_module(module)
    return module


def test_each_version_has_a_row(program: ModuleType) -> None:
    first = program.Engine(Path("python"), "0.16.0", Path("folder"), Path("out"), {"Python": "3.11.7", "doctor": "ok", "plan": "FAILED"})
    second = program.Engine(Path("python"), "0.20.0", Path("folder"), Path("out"), {"doctor": "ok"})
    assert program.table([first, second]).splitlines() == [
        "megatron-core  Python  torch  doctor  plan",
        "0.16.0         3.11.7         ok      FAILED",
        "0.20.0                        ok",
    ]


def test_a_failure_is_told_with_its_log(program: ModuleType, tmp_path: Path) -> None:
    engine = program.Engine(Path(sys.executable), "0.16.0", tmp_path, tmp_path)
    with pytest.raises(RuntimeError, match=r"^exit code 1: ValueError: no such layer \(see .*broken.log\)$"):
        engine.run("broken", "-c", "raise ValueError('no such layer')")
    assert engine.run("fine", "-c", "print('done')") == "done\n"
