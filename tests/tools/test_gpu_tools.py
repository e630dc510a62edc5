"""The GPU check and benchmark on a machine without a GPU: parts that need no GPU run, and the others report that they need one."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.recorded_graph import recorded_graphs
from support.te import python_of_transformer_engine

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))
from benchmarks import gpu_bench, gpu_memory  # noqa: E402
from benchmarks.gpu_cases import CASES, MODELS, PIECES, Case, Seconds  # noqa: E402
from benchmarks.gpu_pieces import time_trained_graph  # noqa: E402
from benchmarks.gpu_steps import Bench  # noqa: E402
from benchmarks.parts import Part, run_parts, short_of_time  # noqa: E402
from megatron_mm.families.recipes import get_recipe  # noqa: E402
from megatron_mm.models.moe import Router  # noqa: E402
from tools import gpu_check_layers, gpu_check_parts  # noqa: E402

NEEDS_TE = pytest.mark.skipif(python_of_transformer_engine() is None, reason="no transformer-engine here: see `make test-te`")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def run(program: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / program), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@NO_GPU
@pytest.mark.parametrize("program", ["tools/gpu_check.py", "benchmarks/gpu_bench.py", "benchmarks/routed_experts.py"])
def test_without_a_gpu_one_line_says_so(program: str) -> None:
    done = run(program, "--device", "cuda")
    assert done.returncode == 2 and done.stdout == ""
    # If Transformer Engine is installed, torch first warns that it finds no CUDA.
    assert done.stderr.splitlines()[-1:] == [
        f"{Path(program).stem}: error: torch finds no GPU here: run it on a machine with one, or with --device cpu"
    ]


def test_a_difference_is_relative_to_each_tensor() -> None:
    exact = {"large": torch.full((4,), 100.0), "small": torch.tensor([1.0])}
    found = {"large": torch.full((4,), 101.0), "small": torch.tensor([1.5])}
    assert gpu_check_layers.farthest(found, exact) == pytest.approx(0.5)
    assert gpu_check_layers.together(found, exact) == pytest.approx(math.sqrt(4 * 1 + 0.25) / math.sqrt(4 * 100**2 + 1))


def test_what_is_not_a_number_never_holds() -> None:
    exact = {"a": torch.ones(3), "b": torch.ones(3)}
    broken = {"a": torch.tensor([1.0, math.nan, 1.0]), "b": torch.ones(3)}
    assert not gpu_check_layers.Checked("loss", found=math.nan, allowed=1.0).holds
    assert not gpu_check_layers.Checked("layers", found=gpu_check_layers.farthest(broken, exact), allowed=1.0).holds
    assert gpu_check_layers.Checked("layers", found=1.0, allowed=1.0).holds


def test_layers_of_other_names_are_not_compared() -> None:
    with pytest.raises(AssertionError, match="not the same names"):
        gpu_check_layers.farthest({"a": torch.ones(1)}, {"b": torch.ones(1)})


@pytest.mark.parametrize("recipe", ["debug_infimm", "debug_mm1"])
def test_replays_of_a_tower_are_compared(recipe: str, tmp_path: Path) -> None:
    """With the tower itself in place of a graph, and with a copy of it, which does not see weights that change later."""

    def itself(forward: Any, pixels: torch.Tensor) -> Any:
        return lambda: forward(pixels)

    def copied(forward: Any, pixels: torch.Tensor) -> Any:
        return partial(copy.deepcopy(forward.__self__).forward, pixels)

    settings = gpu_check_layers.experiment(tmp_path, precision="fp32", layers="torch", recipe=recipe)
    lines = list(gpu_check_parts.compare_replays(settings, capture=itself))
    names = ["replays", "features of no images", "replays with new weights", "features of no images with new weights"]
    assert [line.what.partition(": ")[2] for line in lines] == names
    assert all(line.holds for line in lines)
    if recipe == "debug_infimm":  # modules of megatron-core cannot be copied
        assert [line.holds for line in gpu_check_parts.compare_replays(settings, capture=copied)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("recipe", "kernels", "made"),
    [
        ("debug_infimm", {"tower_graph": gpu_check_parts.GRAPH_IMAGES}, 1),
        ("debug_mm1", {"tower_graph": gpu_check_parts.GRAPH_IMAGES}, 2),
        ("debug_mm1_moe", {"router_graph": True}, 4),  # two routers
    ],
)
def test_training_with_graphs_is_compared(recipe: str, kernels: dict[str, Any], made: int, demo_data: Path) -> None:
    settings = gpu_check_layers.experiment(demo_data, precision="fp32", layers="torch", recipe=recipe)
    with recorded_graphs() as graphs:
        lines = list(gpu_check_parts.compare_training(settings, "graph", **kernels))
        assert len(graphs.made) == made and all(graph.replays > 4 for graph in graphs.made)
    assert all(line.holds for line in lines) and len(lines) == 2


def test_replays_of_routers_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a graph that does not see shares that change later."""
    settings = gpu_check_layers.experiment(tmp_path, precision="bf16", layers="torch", recipe="debug_mm1_moe")
    with recorded_graphs():
        (line,) = gpu_check_parts.compare_routers(settings)
        assert line.holds and line.what == "router graph, debug_mm1 torch bf16: replays of 2 copies"
        losses = Router.losses

        def with_first_shares(self: Router, *arguments: Any, **options: Any) -> Any:
            captured = isinstance(options["token_weight"], torch.Tensor)
            seen = torch.full_like(self.shares, 1 / self.shares.numel()) if captured else self.shares
            with patch.dict(self._buffers, shares=seen):
                return losses(self, *arguments, **options)

        monkeypatch.setattr(Router, "losses", with_first_shares)
        (line,) = gpu_check_parts.compare_routers(settings)
        assert not line.holds


def test_a_step_with_graphs_of_routers_is_timed() -> None:
    base = get_recipe("debug_mm1_moe")
    base = replace(base, model=replace(base.model, decoder=replace(base.model.decoder, num_layers=2)))
    losses = {}
    for graph in (False, True):
        with recorded_graphs() as graphs:
            bench = Bench(base, Case("torch", "bf16", router_graph=graph))
            losses[graph] = bench.step(micro_batches=1)[1]
            assert [one.replays > 3 for one in graphs.made] == [True, True] * graph
            bench.close()
    assert losses[True] == losses[False]


def test_the_benchmark_fits_in_its_time_with_every_family() -> None:
    parts = gpu_bench.parts_of("cuda", everything=False)
    assert sum(gpu_bench.estimate(name, everything=False) for name in parts) < 420 < 60 * gpu_bench.MINUTES
    assert sum(gpu_bench.estimate(name, everything=True) for name in gpu_bench.parts_of("cuda")) < 60 * gpu_bench.MINUTES_OF_ALL
    assert set(gpu_bench.parts_of("cuda")) == {*MODELS, *PIECES}
    assert {type(MODELS[name].experiment().model).__name__ for name in parts if name in MODELS} == {
        "MM1Config",
        "InfiMMConfig",
        "MonoInternVLConfig",
    }
    assert all(set(model.first_cases) <= {*model.cases} for model in MODELS.values()) and len(CASES) == 10


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks" / "results").glob("*/gpu_bench_*.jsonl")), ids=lambda path: path.stem)
def test_parts_took_no_longer_than_estimated(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    checked = 0
    for part in {row["part"] for row in rows if row.get("ended", 0) is not None}:
        taken = [row["at"] for row in rows if row["part"] == part and "at" in row]
        ended = [row["seconds"] for row in rows if row["part"] == part and row.get("ended", -1) == 0]
        seconds: Seconds | None = MODELS[part].seconds if part in MODELS else PIECES.get(part)
        assert seconds is not None
        whole = seconds.of(len(taken) if part in MODELS else 1)
        assert max([*taken, *ended]) <= whole, part
        checked += 1
    assert checked


def test_parts_without_time_are_named_and_are_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["gpu_bench.py", "--device", "cpu", "--part", "debug_mm1", "--minutes", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        gpu_bench.main()
    assert ended.value.code == 0
    assert "debug_mm1: no time left (--part 'debug_mm1' measures it alone)" in capsys.readouterr().out.splitlines()
    assert not gpu_bench.failed({"part": "a", "ended": -9, "why": "killed: no time left"})
    assert gpu_bench.failed({"part": "a", "ended": 1, "why": "RuntimeError: no luck"})
    assert gpu_bench.failed({"part": "a", "case": "te fp8", "failed": "RuntimeError: no luck"})


def test_without_dali_its_part_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_bench, "has_dali", lambda: False)
    (row,) = gpu_bench.decoding(torch.device("cpu"))
    gpu_bench.show({"part": "decoding", **row})
    assert capsys.readouterr().out == "decoding | DALI | skipped nvidia-dali-cuda130 is not installed\n"
    assert not gpu_bench.failed(row)


def test_routed_experts_are_a_part_of_the_benchmark() -> None:
    rows = list(gpu_bench.compared_experts(torch.device("cpu")))
    assert [row["case"].split(", ")[0] for row in rows] == ["torch fp32"] * 4
    assert all(row["both_masked_ms"] > 0 and row["routed_ms"] > 0 for row in rows)


def test_a_tower_that_trains_is_timed_as_graphs() -> None:
    """Graphs of fewer images than a micro-batch has are left out, as training runs them without a graph."""
    with recorded_graphs() as graphs:
        rows = list(time_trained_graph(get_recipe("debug_mm1"), [("torch", "fp32")], images=[1, 3], at_once=[2, 4], repeats=1))
        assert [graph.replays > 0 for graph in graphs.made] == [True] * 4  # the two passes of each size
    ways = {1: ("no graph", "graph of 2", "graph of 4"), 3: ("no graph", "graph of 4")}
    names = [f"tower that trains, {count} images, {way}: torch fp32" for count, some in ways.items() for way in some]
    assert [row["case"] for row in rows] == names
    assert [row["images_computed"] for row in rows] == [1, 2, 4, 3, 4]
    assert all(row["ms"] > 0 for row in rows)


def test_memory_is_shown_beside_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are kept are counted on a GPU alone: here, each look at the allocator finds one GiB more."""
    bench = Bench(get_recipe("debug_mm1"), Case("torch", "bf16"))
    bench.step(micro_batches=1)
    rows = {row["case"]: row for row in gpu_memory.memory_rows(bench)}
    looks = itertools.count(0, 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(looks))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(looks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(bench, "finish", lambda: None)
    monkeypatch.setattr(bench, "on_gpu", True)
    on_gpu = {row["case"]: row for row in gpu_memory.memory_rows(bench)}
    monkeypatch.setattr(bench, "on_gpu", False)
    bench.close()
    parts = ["image tower", "connector", "embedding", "decoder layers", "the rest"]
    assert list(rows) == [*(f"weights, {part}" for part in parts), "gradients", "optimizer state"]
    kept = {part: on_gpu[f"kept for the backward pass, {part}"] for part in parts}
    # tower, connector, embedding and each of four layers are looked at twice; what is between them is the rest
    assert [kept[part]["gib"] for part in parts] == [1, 1, 1, 4, 8]
    assert on_gpu["kept for the backward pass, in all"]["gib"] == 15
    assert all(kept[part]["planned_gib"] > 0 for part in ("image tower", "connector", "decoder layers"))
    assert list(on_gpu)[: len(rows)] == list(rows) and {"peak of a step", "peak of the backward pass above that"} <= set(on_gpu)
    for case in ("weights, decoder layers", "weights, embedding", "gradients", "optimizer state"):
        assert rows[case]["planned_gib"] == pytest.approx(rows[case]["gib"], rel=0.1)


@pytest.mark.slow
def test_the_check_passes_on_a_cpu() -> None:
    done = run("tools/gpu_check.py", "--device", "cpu", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not checked: needs a GPU" in done.stdout and "FAILED" not in done.stdout
    for recipe in ("debug_mm1", "debug_mm1_moe", "debug_infimm", "debug_mono_internvl"):
        assert f"{recipe} torch bf16: gradient" in done.stdout and f"{recipe} torch bf16: logits" in done.stdout
    assert "through a checkpoint: loss" in done.stdout


def on_cpu(tool: str) -> list[str]:
    """Run a tool with Transformer Engine on kernels written in PyTorch; return the lines that it prints."""
    program = REPOSITORY / "tests" / "tools" / "gpu_tools_on_cpu.py"
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(program), tool], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@NEEDS_TE
@pytest.mark.slow
def test_the_check_of_transformer_engine_is_wired_for_every_family() -> None:
    """Everything is within its limits, and FP8 differs more than bf16."""
    found = {what: (float(here), float(allowed)) for what, here, allowed in (line.split("; ") for line in on_cpu("gpu_check"))}
    assert all(here <= allowed for here, allowed in found.values()), found
    for recipe in ("debug_mm1", "debug_mm1_moe", "debug_infimm", "debug_mono_internvl"):
        for part in ("logits", "worst layer's output", "gradient"):
            bf16, fp8 = found[f"{recipe} te bf16: {part}"][0], found[f"{recipe} te fp8: {part}"][0]
            assert 1e-3 < bf16 < fp8


@NEEDS_TE
@pytest.mark.slow
def test_routed_experts_are_compared_on_both_backends_and_in_fp8() -> None:
    """With no, some and only image tokens; the results of both ways are compared before they are timed."""
    lines = [line.split() for line in on_cpu("routed_experts")]
    cases = [["torch", "bf16"], ["te", "bf16"], ["te", "fp8"]]
    assert [line[:3] for line in lines] == [
        [layers, f"{precision},", share] for layers, precision in cases for share in ("0%", "30%", "100%")
    ]


@pytest.mark.slow
def test_the_benchmark_of_routed_experts_runs_on_a_cpu() -> None:
    sizes = ("--tokens", "64", "--hidden-size", "64", "--ffn-hidden-size", "128", "--repeats", "1")
    done = run("benchmarks/routed_experts.py", *sizes)
    assert done.returncode == 0, done.stderr
    assert sum(line.split()[:2] == ["torch", "fp32,"] for line in done.stdout.splitlines()) == 4


@pytest.mark.slow
def test_the_benchmark_writes_its_table(tmp_path: Path) -> None:
    done = run("benchmarks/gpu_bench.py", "--device", "cpu", "--steps", "1", "--out", str(tmp_path), timeout=470)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("gpu_bench_CPU_*.md")
    parts = dict(part.split("\n", 1) for part in table.read_text().split("## ")[1:])
    assert list(parts) == run("benchmarks/gpu_bench.py", "--device", "cpu", "--list").stdout.splitlines()
    (record,) = tmp_path.glob("gpu_bench_CPU_*.jsonl")
    rows = [json.loads(line) for line in record.read_text().splitlines()[1:]]
    assert [row["part"] for row in rows if row.get("ended") == 0] == list(parts)
    for model in ("debug_mm1", "debug_mm1_moe", "debug_infimm", "debug_mono_internvl"):
        losses = [row["last_loss"] for row in rows if row["part"] == model and "case" in row]
        assert len(losses) == 3 and len(set(losses)) == 1, f"recompute changes the loss: {losses}"
        assert parts[model].count("| torch fp32") == 3


def test_parts_pass_on_what_they_print_and_the_rest_goes_on(tmp_path: Path) -> None:
    """One part dies after a result, one is killed at the deadline, and one never begins."""
    say = "import sys; sys.stdin.readline(); print('{\"value\": 1}', flush=True); "
    parts = [
        Part("dies", ["-c", say + "raise RuntimeError('no luck')"]),
        Part("hangs", ["-c", say + "import time; time.sleep(60)"]),
        Part("never", ["-c", say]),
    ]
    record = tmp_path / "record.jsonl"
    found = list(run_parts(parts, at_once=1, deadline=time.monotonic() + 4, record=record))
    assert [json.loads(line) for line in record.read_text().splitlines()] == found
    assert [row["part"] for row in found if row.get("value") == 1] == ["dies", "hangs"]
    ends = {row["part"]: row for row in found if "ended" in row}
    assert ends["dies"]["ended"] == 1 and ends["dies"]["why"] == "RuntimeError: no luck"
    assert ends["hangs"]["ended"] == -9 and "no time left" in ends["hangs"]["why"]
    assert ends["never"]["ended"] is None and "no time left" in ends["never"]["why"]
    assert [short_of_time(ends[name]) for name in ("dies", "hangs", "never")] == [False, True, True]
