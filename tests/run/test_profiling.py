"""A profile names phases, micro-batches and layers, changes no number, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.config import ProfileConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.run.profiling import Profile, profile_hooks, where_it_went
from megatron_mm.run.start import start
from megatron_mm.training.phases import _Named
from megatron_mm.training.trainer import Trainer


def train(data: Path, run_dir: Path, steps: str | None, ranks: tuple[int, ...], parallel: dict[str, Any], batch: int) -> dict[int, int]:
    """Train 4 steps; return the number of hooks and named timers after each."""
    experiment = small_run(data, parallel=parallel, steps=4, schedule_steps=20, global_batch_size=batch)
    seen: dict[int, int] = {}
    one_step = Trainer._one_step

    def counted(self: Trainer) -> Any:
        record = one_step(self)
        modules = [module for chunk in self.model for module in chunk.module.modules()]
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
        seen[record.step] = hooks + sum(isinstance(timer, _Named) for timer in self.clock._timers.values())
        assert any(isinstance(hook, Profile) for hook in self.hooks) == (steps is not None and self.topology.rank in ranks)
        return record

    Trainer._one_step = counted
    try:
        start(replace(experiment, profile=ProfileConfig(steps=steps, ranks=ranks)), run_dir)
    finally:
        Trainer._one_step = one_step
    return seen


def ranges(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Return (begin, end) of each named range of a trace."""
    trace = json.loads(gzip.decompress(path.read_bytes()))
    found: dict[str, list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") == "user_annotation":
            found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_profile_has_named_ranges_and_changes_nothing(demo_data: Path, tmp_path: Path) -> None:
    plain = run_processes(train, 1, demo_data, tmp_path / "plain", None, (0,), {}, 2)[0]
    profiled = run_processes(train, 1, demo_data, tmp_path / "profiled", "2:3", (0,), {}, 2)[0]
    assert losses(tmp_path / "plain") == losses(tmp_path / "profiled")
    assert set(plain.values()) == {0} and profiled[1] == profiled[4] == 0 and profiled[2] > 0 and profiled[3] > 0
    assert not (tmp_path / "plain" / "profile").exists()
    found = ranges(tmp_path / "profiled" / "profile" / "rank_0_steps_2_3.json.gz")
    assert {"step 2", "step 3"} <= set(found) and not {"step 1", "step 4"} & set(found)
    for name in (
        "data",
        "reduce",
        "forward micro-batch 0",
        "backward micro-batch 1",
        "layer 0 forward",
        "layer 3 backward",
        "vision forward",
    ):
        assert name in found, name
    assert len(found["layer 0 forward"]) == len(found["layer 0 backward"]) == 2 * 2, "each micro-batch of each step"
    passes = found["backward micro-batch 0"] + found["backward micro-batch 1"]
    for begin, end in found["layer 2 backward"]:
        assert any(first <= begin and end <= last for first, last in passes)
    between = [sorted(found[f"layer {number} backward"])[0] for number in (3, 2, 1)]
    assert between == sorted(between), "from the last layer to the first"
    text = (tmp_path / "profiled" / "profile" / "rank_0_steps_2_3.txt").read_text()
    assert "forward and backward" in text and "no prediction" in text and "aten::" in text


@pytest.mark.slow
def test_interleaved_stages_name_micro_batch_and_chunk_on_the_given_process(demo_data: Path, tmp_path: Path) -> None:
    run_processes(train, 2, demo_data, tmp_path, "3", (1,), {"pipeline": 2, "virtual": 2}, 2)
    assert [path.name for path in (tmp_path / "profile").glob("*.gz")] == ["rank_1_steps_3_3.json.gz"]
    found = ranges(tmp_path / "profile" / "rank_1_steps_3_3.json.gz")
    passes = {name for name in found if "micro-batch" in name}
    assert passes == {f"{way} micro-batch {m} chunk {c}" for way in ("forward", "backward") for m in (0, 1) for c in (0, 1)}
    for number, chunk in ((1, 0), (3, 1)):  # the second stage has layers 1 and 3
        for begin, end in found[f"layer {number} forward"]:
            assert any(a <= begin and end <= b for m in (0, 1) for a, b in found[f"forward micro-batch {m} chunk {chunk}"])
        for begin, end in found[f"layer {number} backward"]:
            assert any(a <= begin and end <= b for m in (0, 1) for a, b in found[f"backward micro-batch {m} chunk {chunk}"])


def test_a_run_that_does_not_train_the_steps_to_profile_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for done, steps, told in ((4, 20, "from step 5 to step 20"), (0, 1, "from step 1 to step 1")):
        experiment = replace(get_recipe("debug_mm1"), profile=ProfileConfig(steps="2:3"))
        experiment = replace(experiment, train=replace(experiment.train, steps=steps))
        trainer: Any = SimpleNamespace(experiment=experiment, state=SimpleNamespace(step=done), topology=SimpleNamespace(rank=0))
        assert profile_hooks(trainer) == []
        assert f"profile.steps is 2:3, but this run trains {told}: nothing is profiled" in caplog.text
        caplog.clear()
        trainer.topology.rank = 1
        assert profile_hooks(trainer) == [] and not caplog.text, "one rank says it"


def test_measured_stands_beside_predicted() -> None:
    steps = [{"forward": 0.3, "backward": 0.5, "p2p": 0.1, "reduce": 0.05, "optimizer": 0.05, "seconds": 1.0}]
    predicted = {"products": 0.3, "attention": 0.1, "pipeline bubble": 0.1, "gradient reduction": 0.1, "optimizer": 0.05}
    rows = {line[:32].strip(): line[32:].split() for line in where_it_went(steps, predicted)}
    assert rows["forward and backward"] == ["800.0", "ms", "80.0%", "400.0", "ms", "2.00"]
    assert rows["step"] == ["1000.0", "ms", "100.0%", "650.0", "ms", "1.54"]
    assert rows["data"][-1] == "ms", "nothing predicted, so no ratio"


@pytest.mark.parametrize("steps", ["0:3", "5:4", "a:b", "1:2:3", ":", "3:"])
def test_steps_that_are_no_range_are_refused(steps: str) -> None:
    with pytest.raises(ValueError, match=r"profile\.steps is .*must be FIRST:LAST"):
        ProfileConfig(steps=steps)


def test_a_rank_that_is_not_there_is_refused(demo_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile\.ranks is \[0, 7\], but there are 1 processes"):
        start(replace(small_run(demo_data, steps=4, schedule_steps=20), profile=ProfileConfig(steps="1:2", ranks=(0, 7))), tmp_path)


def test_memory_is_not_recorded_any_more_after_a_profile_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").write_text("a file where the run directory should be")
    trainer: Any = SimpleNamespace(
        experiment=SimpleNamespace(profile=ProfileConfig(steps="2:3")),
        state=SimpleNamespace(step=0),
        topology=SimpleNamespace(rank=0, device=torch.device("cuda")),
        clock=SimpleNamespace(name_ranges=lambda new: None),
        run_dir=tmp_path / "run",
    )
    asked: list[str | None] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled: asked.append(enabled))
    profile = Profile(trainer)
    profile._profiler = SimpleNamespace(stop=lambda: None)
    profile._finish(3)
    assert asked == [None]
