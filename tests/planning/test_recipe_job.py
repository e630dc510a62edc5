"""Recipes as jobs: their FLOPs are those that `flops` counts, and plans report them correctly."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mm.cli.main import main
from megatron_mm.config import ParallelConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.flops import StepWork
from megatron_mm.planning.drawing import draw_timeline
from megatron_mm.planning.hardware import GPUS, OURS, with_host
from megatron_mm.planning.kernels import Attention, Block, Product
from megatron_mm.planning.recipe_job import plan_recipe
from megatron_mm.planning.step import Prediction, StepModel
from megatron_mm.planning.workload import MicroBatch, Workload


def _flops(block: Block) -> float:
    kernels = [kernel for kernel in (*block.forward, *block.backward) if isinstance(kernel, Product | Attention)]
    # Fused attention recomputes the scores in its backward pass, which `flops` does not count: 2.5 times the forward instead of 2.
    return sum(kernel.flops * (0.8 if isinstance(kernel, Attention) and kernel.backward else 1.0) for kernel in kernels)


@pytest.mark.parametrize(
    "recipe", ["mm1_1b", "mm1_3b_moe", "infimm_zephyr_7b_pt", "infimm_llama_13b_ift", "mono_internvl_2b_s1_1", "mono_internvl_2b_s2"]
)
def test_products_are_those_that_are_counted(recipe: str) -> None:
    """With one process and one micro-batch, the planner's kernels have the FLOPs of the trainer's MFU, to 1.5% (7% with experts).

    The differences are the connector's depthwise convolutions and pooling, and the fullest experts.
    """
    experiment = get_recipe(recipe)
    length = experiment.data.sequence_length
    parallel = replace(experiment.parallel, tensor=1, pipeline=1, virtual=1, expert=1, stage_layers=None, recompute="none")
    train = replace(experiment.train, global_batch_size=1, micro_batch_size=1)
    experiment = replace(experiment, parallel=parallel, train=train)
    work = StepWork(num_tokens=length, sum_squared_lengths=length * length // 2, num_images=4)
    micro = MicroBatch(tokens=length, real_tokens=length, sum_squared_lengths=work.sum_squared_lengths, images=4)
    planned = plan_recipe(experiment, GPUS["h200"], 1, work=Workload((micro,), work, drawn=True))
    counted = sum(_flops(block) for stage in planned.job.kinds[0] for block in stage)
    tolerance = 0.07 if "moe" in recipe else 0.015
    assert counted == pytest.approx(planned.flops, rel=tolerance)


def test_a_layout_that_cannot_fit_is_said_to_be_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "mm1_30b", "--num-gpus", "8", "--parallel.pipeline", "1", "--parallel.tensor", "1", "--parallel.virtual", "1",
              "--parallel.stage-layers", "None"])  # fmt: skip
    assert "fits     NO" in capsys.readouterr().out


def test_the_plan_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, trace = tmp_path / "step.png", tmp_path / "step.json"
    main(["plan", "mm1_7b", "--num-gpus", "64", "--price", "2", "--timeline", str(picture), "--chrome-trace", str(trace)])
    printed = capsys.readouterr().out
    for word in ("fits     yes", "step  ", "error band", "GPU-hours", "limit"):
        assert word in printed
    assert picture.stat().st_size > 1000 and '"traceEvents"' in trace.read_text()


def test_the_plan_of_a_small_run_has_units_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "debug_mm1", "--num-gpus", "4"])
    printed = capsys.readouterr().out
    assert not re.search(r"\b0\.0+( |e9)(s|ms|GB|days|hours|PFLOP|initial)", printed), printed
    assert "besides matrix products, pauses of the GPU (the CPU launches kernels more slowly than they run) take the most time" in printed


def test_a_timeline_has_a_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    job = plan_recipe(get_recipe("mm1_30b"), GPUS["h100-sxm"], 512).job
    draw_timeline(StepModel(job).predict(keep_events=True).pipeline, tmp_path / "step.png", title="mm1_30b")
    (legend,) = figures[0].legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named[0] == "forward pass of a micro-batch, chunk 0 of the rank" and named[-1] == "waiting (pipeline bubble)" and len(named) == 5


def test_parts_add_up_to_the_step() -> None:
    prediction = StepModel(plan_recipe(get_recipe("mm1_30b"), GPUS["h100-sxm"], 512).job).predict()
    assert sum(prediction.parts.values()) == pytest.approx(prediction.seconds, rel=0.02)


def test_directions_are_right() -> None:
    """More GPUs, FP8, no recomputation and a faster GPU are predicted to be faster, with a host that is fast enough."""

    def seconds(gpus: int = 64, gpu: str = "h100-sxm", **changes: str) -> float:
        experiment = get_recipe("mm1_7b")
        experiment = replace(
            experiment,
            train=replace(experiment.train, precision=changes.get("precision", "bf16")),  # type: ignore[arg-type]
            parallel=replace(experiment.parallel, recompute=changes.get("recompute", "none")),  # type: ignore[arg-type]
        )
        return StepModel(plan_recipe(experiment, GPUS[gpu], gpus, software=with_host(OURS, 0.1)).job).predict().seconds

    assert seconds(128) < seconds(64)
    assert seconds(precision="fp8") < seconds() < seconds(recompute="full")
    assert seconds(gpu="b200") < seconds(gpu="h200") < seconds(gpu="a100-80g")


def test_an_encoder_on_every_rank_takes_the_load_off_the_first() -> None:
    """With the same work, the step no longer waits for the tower, and memory is more even; its weights are on every rank."""
    base = get_recipe("mm1_30b")
    layout = ParallelConfig(tensor=4, pipeline=4, virtual=2)
    plain = replace(base, parallel=layout, train=replace(base.train, micro_batch_size=1))
    spread = replace(plain, parallel=replace(plain.parallel, spread_encoder=True))
    before, after = (StepModel(plan_recipe(one, GPUS["h100-sxm"], 512).job).predict() for one in (plain, spread))
    assert after.seconds < before.seconds
    assert after.peak_bytes < before.peak_bytes and after.memory[-1].weights > before.memory[-1].weights
    assert after.parts["products"] < before.parts["products"]
    assert sum(after.parts.values()) == pytest.approx(after.seconds, rel=1e-6)


def test_an_exchange_beside_another_micro_batch_takes_time_for_memory() -> None:
    base = get_recipe("mm1_3b_moe")
    beside = replace(base, parallel=replace(base.parallel, overlap_experts=True))
    before, after = (StepModel(plan_recipe(one, GPUS["h100-sxm"], 128).job).predict() for one in (base, beside))
    assert after.seconds < before.seconds and after.peak_bytes > before.peak_bytes


def test_formats_of_gradients_moments_and_weights_count() -> None:
    """They change memory by their bytes per parameter (config/precision.py), and the messages of data parallelism."""
    experiment = get_recipe("mm1_7b")
    experiment = replace(experiment, train=replace(experiment.train, precision="fp8"))

    def predict(**formats: Any) -> Prediction:
        one = replace(experiment, precision=replace(experiment.precision, **formats))
        return StepModel(plan_recipe(one, GPUS["h100-sxm"], 128).job).predict()

    plain, gradients = predict(), predict(gradients="bf16")
    moments, weights = predict(exp_avg="bf16", exp_avg_sq="bf16"), predict(fp8_weights=True)
    assert gradients.memory[0].gradients == plain.memory[0].gradients / 2
    assert gradients.memory[0].update == plain.memory[0].optimizer / 3 and plain.memory[0].update == 0
    assert moments.memory[0].optimizer == plain.memory[0].optimizer * 8 / 12
    assert weights.memory[0].weights < 0.6 * plain.memory[0].weights
    assert gradients.seconds < plain.seconds and moments.seconds < plain.seconds and weights.seconds <= plain.seconds
