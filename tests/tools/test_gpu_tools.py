"""The GPU check and benchmark on a machine without a GPU: what needs none runs, and the rest says so."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def run(program: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / program), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", REPOSITORY / "tools" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@NO_GPU
@pytest.mark.parametrize("program", ["tools/gpu_check.py", "benchmarks/gpu_bench.py", "benchmarks/routed_experts.py"])
def test_without_a_gpu_one_line_says_so(program: str) -> None:
    done = run(program, "--device", "cuda")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{Path(program).stem}: error: torch finds no GPU here: run it on a machine with one, or with --device cpu"
    ]


def test_a_difference_is_relative_to_each_tensor(gpu_check: ModuleType) -> None:
    exact = {"large": torch.full((4,), 100.0), "small": torch.tensor([1.0])}
    found = {"large": torch.full((4,), 101.0), "small": torch.tensor([1.5])}
    assert gpu_check.farthest(found, exact) == pytest.approx(0.5)
    assert gpu_check.together(found, exact) == pytest.approx(math.sqrt(4 * 1 + 0.25) / math.sqrt(4 * 100**2 + 1))


def test_what_is_not_a_number_never_holds(gpu_check: ModuleType) -> None:
    exact = {"a": torch.ones(3), "b": torch.ones(3)}
    broken = {"a": torch.tensor([1.0, math.nan, 1.0]), "b": torch.ones(3)}
    assert not gpu_check.Checked("loss", found=math.nan, allowed=1.0).holds
    assert not gpu_check.Checked("layers", found=gpu_check.farthest(broken, exact), allowed=1.0).holds
    assert gpu_check.Checked("layers", found=1.0, allowed=1.0).holds


def test_layers_of_other_names_are_not_compared(gpu_check: ModuleType) -> None:
    with pytest.raises(AssertionError, match="not the same names"):
        gpu_check.farthest({"a": torch.ones(1)}, {"b": torch.ones(1)})


@pytest.mark.slow
def test_the_check_passes_on_a_cpu() -> None:
    done = run("tools/gpu_check.py", "--device", "cpu", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not checked: needs a GPU" in done.stdout and "FAILED" not in done.stdout
    for recipe in ("debug_mm1", "debug_infimm", "debug_mono_internvl"):
        assert f"{recipe} torch bf16: gradient" in done.stdout and f"{recipe} torch bf16: logits" in done.stdout
    assert "through a checkpoint: loss" in done.stdout


def on_stand_in(tool: str) -> list[str]:
    """Lines that a tool prints of Transformer Engine, from its stand-in."""
    program = REPOSITORY / "tests" / "tools" / "gpu_tools_on_stand_in.py"
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(program), tool], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_check_of_transformer_engine_is_wired_for_every_family() -> None:
    """The stand-in rounds nothing in FP8, so it must be as near as bf16 is; and neither is exact."""
    found = {what: (float(here), float(allowed)) for what, here, allowed in (line.split("; ") for line in on_stand_in("gpu_check"))}
    assert all(here <= allowed for here, allowed in found.values()), found
    for recipe in ("debug_mm1", "debug_infimm", "debug_mono_internvl"):
        for part in ("logits", "worst layer's output", "gradient"):
            bf16, fp8 = found[f"{recipe} te bf16: {part}"][0], found[f"{recipe} te fp8: {part}"][0]
            assert bf16 == fp8 and bf16 > 1e-3


def test_routed_experts_are_compared_on_both_backends_and_in_fp8() -> None:
    """With no image, some and nothing else; what the two ways compute is compared before it is timed."""
    lines = [line.split() for line in on_stand_in("routed_experts")]
    cases = [["torch", "bf16"], ["te", "bf16"], ["te", "fp8"]]
    assert [line[:3] for line in lines] == [[*case, share] for case in cases for share in ("0%", "30%", "100%")]


def test_the_benchmark_of_routed_experts_runs_on_a_cpu() -> None:
    sizes = ("--tokens", "64", "--hidden-size", "64", "--ffn-hidden-size", "128", "--repeats", "1")
    done = run("benchmarks/routed_experts.py", *sizes)
    assert done.returncode == 0, done.stderr
    assert sum(line.split()[:2] == ["torch", "fp32"] for line in done.stdout.splitlines()) == 4


@pytest.mark.slow
def test_the_benchmark_writes_its_table(tmp_path: Path) -> None:
    done = run("benchmarks/gpu_bench.py", "--device", "cpu", "--steps", "1", "--out", str(tmp_path), timeout=280)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("gpu_bench_CPU_*.md")
    models = table.read_text().split("## ")[1:]
    assert [model.splitlines()[0] for model in models] == ["debug_mm1", "debug_infimm", "debug_mono_internvl"]
    for model in models:
        rows = [line for line in model.splitlines() if line.startswith("| torch fp32")]
        assert len(rows) == 3, model
        losses = {row.split("|")[-2].strip() for row in rows}
        assert len(losses) == 1, f"recompute changes the loss: {losses}"
