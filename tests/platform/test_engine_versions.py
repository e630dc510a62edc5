"""Versions that work together, and messages about others."""

from __future__ import annotations

import doctest
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_mm.cli import main as program
from megatron_mm.platform import engine_parts, engines

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_examples() -> None:
    assert doctest.testmod(engines).failed == 0


def test_an_engine_that_is_too_old_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The error is raised before any part of megatron-core is imported."""
    monkeypatch.setattr(engines, "installed", lambda package="megatron-core": "0.14.0")
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        program.main(["train", "debug_mm1"])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "megatron-mm: error: megatron-core 0.14.0 is too old for megatron_mm, which supports 0.16 to 0.19: "
        "pip install 'megatron-core>=0.16,<0.20'\n"
    )


def test_what_fails_on_an_engine_that_is_newer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer version is tried; any error may be caused by it."""

    def fail(*unused: object, **also_unused: object) -> None:
        raise ImportError("cannot import name 'GPTModel'")

    monkeypatch.setattr(engines, "installed", lambda package="megatron-core": "0.21.3")
    monkeypatch.setattr(program, "run", fail)
    with pytest.raises(ImportError, match="GPTModel") as error:
        program.main(["train", "debug_mm1"])
    (note,) = error.value.__notes__
    assert note.startswith("megatron-mm: megatron-core 0.21.3 is untested") and note.endswith("'megatron-core>=0.16,<0.20'")
    assert engines.remark("0.18.2") == engines.remark(None) == ""


def test_what_an_engine_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its version."""

    def fail(*unused: object, **also_unused: object) -> None:
        raise TypeError("save() got an unexpected keyword argument")

    monkeypatch.setattr(engines, "installed", lambda package="megatron-core": "0.21.3")
    monkeypatch.setattr(engine_parts, "missing", lambda: [f"megatron.core.part{number}" for number in range(5)])
    monkeypatch.setattr(program, "run", fail)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        program.main(["train", "debug_mm1"])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "megatron-mm: error: megatron-core 0.21.3 lacks megatron.core.part0, megatron.core.part1, megatron.core.part2 and 2 more, "
        "which megatron_mm uses; versions 0.16 to 0.19 are supported: pip install 'megatron-core>=0.16,<0.20'\n"
    )


def test_no_engine_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*unused: object, **also_unused: object) -> None:
        raise ModuleNotFoundError("No module named 'megatron.core'", name="megatron.core")

    monkeypatch.setattr(engines, "installed", lambda package="megatron-core": None)
    monkeypatch.setattr(program, "run", fail)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit):
        program.main(["train", "debug_mm1"])
    assert capsys.readouterr().err == "megatron-mm: error: megatron-core is not installed: pip install 'megatron-core>=0.16,<0.20'\n"


def test_a_checkout_before_the_installed_engine_is_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an import finds it; pip does not know about it."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 21\nPATCH = 3\nPRE_RELEASE = 'rc1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    assert engines.installed() == "0.21.3rc1"


def test_pip_is_told_the_same() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    cores = [line for line in project["dependencies"] if line.startswith("megatron-core")]
    first, last = min(engines.ENGINES), max(engines.ENGINES)
    assert any(f">={first[0]}.{first[1]}" in core for core in cores) and any(f"<{last[0]}.{last[1] + 1};" in core for core in cores)
    ranges = {line.partition("]")[2].partition(";")[0] for line in project["optional-dependencies"]["gpu"] if "transformer" in line}
    assert ranges == {engines.range_of(f"{major}.{minor}") for major, minor in engines.ENGINES}
