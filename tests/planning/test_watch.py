"""A run and its prediction: a layout that cannot fit is refused, and predicted and measured times are logged together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_mm.families.recipes import get_recipe
from megatron_mm.planning.hardware import GPUS
from megatron_mm.planning.watch import WINDOW, PlanRatio, check_fits, predict


def test_a_layout_that_cannot_fit_is_refused() -> None:
    experiment = get_recipe("mm1_30b")
    check_fits(experiment, world_size=512, gpu=GPUS["h100-sxm"])
    alone = replace(experiment.parallel, tensor=1, pipeline=1, virtual=1, stage_layers=None)
    whole = replace(experiment, parallel=alone, train=replace(experiment.train, micro_batch_size=1))
    with pytest.raises(ValueError, match=r"would need .* GB, but a .* has 85 GB: .* --force"):
        check_fits(whole, world_size=512, gpu=GPUS["h100-sxm"])


def test_measured_stands_next_to_predicted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiment, gpu = get_recipe("mm1_7b"), GPUS["h100-sxm"]
    expected = predict(experiment, world_size=64, gpu=gpu).seconds
    logged: list[dict[str, float]] = []
    topology = SimpleNamespace(is_main=True, world_size=64, pipeline_rank=0)
    trainer = SimpleNamespace(experiment=experiment, topology=topology, run_dir=tmp_path, state=SimpleNamespace(step=0))
    monitor = SimpleNamespace(log_values=lambda step, values: logged.append(values))
    hook = PlanRatio(cast(Any, trainer), cast(Any, monitor), gpu=gpu)
    with caplog.at_level("WARNING", logger="megatron_mm"):
        for step in range(1, WINDOW + 5):
            hook.after_step(cast(Any, SimpleNamespace(step=step, seconds=1.5 * expected)))
    hook.close(failed=False)
    assert [record for record in caplog.records if "beyond the error band" in record.message][1:] == []
    assert "1.50 times" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    assert lines[-1]["plan/ratio"] == pytest.approx(1.5) and logged[-1]["plan/seconds"] == pytest.approx(expected)


def test_a_machine_without_dali_decodes_with_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes time from the host; a machine with DALI is predicted as by `plan`."""

    def launch(installed: bool) -> float:
        monkeypatch.setattr("megatron_mm.planning.watch.has_dali", lambda: installed)
        (passes, *_) = predict(get_recipe("mm1_1b"), world_size=64, gpu=GPUS["h100-sxm"]).stage_seconds
        return passes[0].launch

    assert launch(installed=False) > launch(installed=True)


def test_a_run_without_a_known_gpu_has_no_prediction(tmp_path: Path) -> None:
    trainer = SimpleNamespace(experiment=get_recipe("debug_mm1"), topology=SimpleNamespace(is_main=True), run_dir=tmp_path)
    hook = PlanRatio(cast(Any, trainer), cast(Any, None), gpu=None)
    hook.after_step(cast(Any, SimpleNamespace(step=1, seconds=1.0)))
    hook.close(failed=False)
    assert not list(tmp_path.iterdir())
