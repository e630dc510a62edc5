"""The doctor reports what is installed, never fails on missing parts, and names what is used instead."""

from __future__ import annotations

import importlib.metadata
import re
import resource
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import megatron_mm
from megatron_mm.platform import engines
from megatron_mm.run import doctor
from megatron_mm.run.doctor import Finding, diagnose, report


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose packages take precedence over all others, even loaded ones, and are unloaded at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    loaded = {name: module for name, module in sys.modules.items() if _is_stood_in_for(name)}
    for name in loaded:
        del sys.modules[name]
    yield tmp_path
    for name in [name for name in sys.modules if _is_stood_in_for(name)]:
        del sys.modules[name]
    sys.modules.update(loaded)


def _is_stood_in_for(module: str) -> bool:
    return module.partition(".")[0] in ("transformer_engine", "apex")


def finding(name: str, path: Path = Path(".")) -> Finding:
    (found,) = [finding for finding in diagnose(path) if finding.name == name]
    return found


def package(folder: Path, name: str, text: str = "") -> None:
    path = folder.joinpath(*name.split("."))
    path.mkdir(parents=True, exist_ok=True)
    (path / "__init__.py").write_text(text)


def test_what_is_missing_names_its_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    find = doctor._find
    monkeypatch.setattr(doctor, "_find", lambda module: None if module in ("nvidia.dali", "transformer_engine", "apex") else find(module))
    found = {f.name: f for f in diagnose()}
    assert (found["DALI"].state, found["DALI"].falls_back_to) == ("missing", "Pillow")
    assert found["Transformer Engine"].falls_back_to == "torch layers (--train.layers torch); no FP8"
    assert found["apex (NVIDIA)"].falls_back_to == "torch's fused AdamW"
    assert found["megatron-core"].state == "ok"


def test_a_package_that_does_not_load_is_told_from_a_missing_one(packages: Path) -> None:
    package(packages, "transformer_engine")
    package(packages, "transformer_engine.pytorch", "raise RuntimeError('built for another torch')")
    found = finding("Transformer Engine")
    assert found.state == "warning" and "does not load (RuntimeError: built for another torch)" in found.detail
    assert found.falls_back_to.startswith("torch layers")


@pytest.mark.parametrize(
    ("capability", "version", "state", "detail"),
    [
        (None, "2.8.0", "missing", "needs a GPU"),
        ((8, 0), "2.8.0", "missing", "the GPU has compute capability 8.0, and FP8 products need 8.9"),
        ((9, 0), "2.1.0", "missing", "Transformer Engine 2.1.0 is too old: install 2.2 or later"),
        ((9, 0), "2.10.0", "ok", "for sizes that are multiples of 16"),
    ],
)
def test_fp8_needs_a_gpu_and_a_version_that_have_it(
    packages: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, version: str, state: str, detail: str
) -> None:
    package(packages, "transformer_engine.pytorch")
    monkeypatch.setattr(doctor, "_version", lambda package: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capability)
    monkeypatch.setattr(doctor.engines, "goes_with", lambda core, version: True)
    engine, attention, fp8 = doctor._check_transformer_engine()
    assert engine.state == "ok"
    assert attention.name == "packed attention" and attention.state == ("ok" if capability == (9, 0) else "missing")
    assert (fp8.name, fp8.state) == ("FP8", state) and fp8.detail.startswith(detail)
    assert fp8.falls_back_to == ("" if state == "ok" else "bf16 (--train.precision bf16)")


@pytest.mark.parametrize(
    ("core", "engine", "state", "detail"),
    [
        ("0.16.1", "2.11.0", "ok", "2.11.0"),
        ("0.16.1", "2.20.2", "warning", "2.20.2, but megatron-core 0.16.1 needs >=2.9,<2.12: some kernels would not be used"),
        ("0.19.2", "2.20.2", "ok", "2.20.2"),
        ("0.17.1", "2.20.2", "ok", "2.20.2"),
        ("0.19.2", "2.11.0", "warning", "2.11.0, but megatron-core 0.19.2 needs >=2.20,<2.21: some kernels would not be used"),
    ],
)
def test_versions_that_do_not_go_together_are_said(
    packages: Path, monkeypatch: pytest.MonkeyPatch, core: str, engine: str, state: str, detail: str
) -> None:
    package(packages, "transformer_engine.pytorch")
    monkeypatch.setattr(doctor, "_version", {"megatron-core": core, "transformer-engine": engine}.__getitem__)
    found = next(doctor._check_transformer_engine())
    assert (found.state, found.detail) == (state, detail)


def test_an_engine_that_no_test_runs_on_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "0.20.0")
    (found,) = doctor._check_engine()
    assert found.state == "warning" and found.detail == (
        "megatron-core 0.20.0 is untested with megatron_mm, which is tested on 0.16 to 0.19: pip install 'megatron-core>=0.16,<0.20'"
    )


def test_apex_adds_little_to_transformer_engine(packages: Path) -> None:
    package(packages, "transformer_engine.pytorch")
    package(packages, "apex.optimizers")
    (packages / "apex" / "optimizers" / "fused_adam.py").touch()
    package(packages, "amp_C")
    found = finding("apex (NVIDIA)")
    assert (found.state, found.detail) == (
        "ok",
        "with fused kernels; beside Transformer Engine it only fuses the output layer's weight gradient, which is not used here",
    )


def test_the_unrelated_package_apex_is_recognised(packages: Path) -> None:
    package(packages, "apex")
    found = finding("apex (NVIDIA)")
    assert found.state == "warning" and "unrelated package of the same name" in found.detail


def test_every_required_package_has_a_line() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    required = {re.split("[<>=;]", line)[0] for line in project["dependencies"]}
    lines = [found.name for found in diagnose()]
    assert {"pyarrow", "zstandard", "fsspec", "psutil", "matplotlib", "torch"} <= required <= set(lines) and len(lines) == len(set(lines))


def test_missing_packages_are_named_with_their_versions_and_hide_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("transformers", "zstandard", "pyarrow", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)
    found = {f.name: f for f in doctor._check_packages()}
    for name, wanted in {"transformers": "transformers>=4.50", "zstandard": "zstandard", "pyarrow": "pyarrow", "pillow": "pillow"}.items():
        assert found[name] == Finding(name, "missing", f"not installed: pip install '{wanted}'", "nothing: it is required")
    assert all(found[name].state == "ok" for name in ("numpy", "safetensors", "sentencepiece", "fsspec", "psutil", "matplotlib"))


def test_packages_that_are_too_old_or_broken_are_told_apart(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "installed", lambda package: "4.40.0" if package == "transformers" else "1.0")
    package(packages, "amiss", "import nothing_of_this_name")
    (old,) = (doctor._package(wanted) for wanted in doctor._requirements() if wanted.name == "transformers")
    assert (old.state, old.detail) == ("warning", "4.40.0, but >=4.50 is required: pip install 'transformers>=4.50'")
    broken = doctor._package(Requirement("amiss"))
    assert broken.state == "warning" and broken.detail.startswith(
        "installed but does not load (ModuleNotFoundError: No module named 'nothing"
    )


def test_without_its_sources_the_installed_metadata_says_what_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_mm, "__file__", str(tmp_path / "megatron_mm" / "__init__.py"))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", "absent; python_version < '3'", "s3fs; extra == 's3'"])
    assert [str(wanted) for wanted in doctor._requirements()] == ["numpy"]


def test_limits_that_are_too_low_come_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    disk, files = finding("disk space", tmp_path), finding("open files")
    assert disk.state == "warning" and disk.detail.startswith(f"1.0 GiB free in {tmp_path}, which is little: ")
    assert files.state == "warning" and files.detail == "256: raise it with ulimit -n 4096"


def test_a_check_that_fails_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def _check_moon() -> Iterator[Finding]:
        raise OSError("no moon\nand a long story")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (_check_moon,))
    found = finding("moon")
    assert (found.state, found.detail) == ("warning", "the check failed: OSError: no moon")


def test_the_report_is_a_table_with_a_mark_for_each_line() -> None:
    findings = [Finding("torch", "ok", "2.13"), Finding("GPU", "missing", "none", "CPU"), Finding("disk", "warning", "1 GiB: buy one")]
    lines = report(findings).splitlines()
    assert [line[:2] for line in lines[2:]] == ["ok", "no", "!!"]
    assert lines[3].split() == ["no", "GPU", "none", "CPU"]
    assert lines[0].index("used instead") == lines[3].index("CPU")
