"""The host's times and operation counts: small models that the host limits, published and traced."""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.planning_own_runs import TRAINING_RUNS, TrainingRun
from megatron_mm.families.recipes import get_recipe
from megatron_mm.planning.decoder_shape import DecoderShape, Tokens, Trained
from megatron_mm.planning.hardware import GPUS, OURS
from megatron_mm.planning.kernels import Kernel, Message, Product, Stream
from megatron_mm.planning.layer_sections import expert_section, mlp_section
from megatron_mm.planning.layout import Layout
from megatron_mm.planning.measurements import Measurement, read_measurements
from megatron_mm.planning.recipe_job import plan_recipe
from megatron_mm.planning.step import StepModel
from megatron_mm.planning.tracing.trace import Trace, trace_rank
from megatron_mm.planning.validation import compare

FUNCTIONAL_TESTS = Path(__file__).parents[2] / "benchmarks" / "anchors" / "megatron_ci_memory.csv"


def test_functional_tests_of_megatron_lm_are_within_bounds() -> None:
    """Repeated runs of one test differ by up to a factor of two in time; memory does not differ."""
    rows = [row for row in read_measurements(FUNCTIONAL_TESTS) if isinstance(row, Measurement)]
    assert len(rows) > 150
    compared = compare(rows[::5])
    assert statistics.median(abs(row.memory - 1) for row in compared if row.memory) < 0.08
    assert 0.7 < statistics.median(row.seconds for row in compared if row.seconds) < 1.1


@pytest.mark.parametrize("run", TRAINING_RUNS, ids=lambda run: f"{Path(run.results).name}-{run.decoder}")
def test_own_training_runs_are_met(run: TrainingRun) -> None:
    """Steps on one H200 of a virtual machine with a 1.6 times slower host. Most wait for the host, so the time that kernels run in them is
    compared, too."""
    assert run.predict().seconds == pytest.approx(run.seconds, rel=0.10)
    assert run.busy() == pytest.approx(run.kernels, rel=0.20)


def test_decoding_takes_time_from_the_host_for_each_image() -> None:
    """As much in both directions, on the process of a tensor-parallel group that decodes the image; DALI takes none, but it does not make
    tiles."""

    def launch(decoder: str) -> tuple[float, float]:
        experiment = get_recipe("mm1_30b")
        experiment = replace(experiment, data=replace(experiment.data, decoder=decoder))  # type: ignore[arg-type]
        planned = plan_recipe(experiment, GPUS["h100-sxm"], 512)
        images.append(planned.work.whole.num_images / len(planned.work.micro_batches) / planned.job.layout.data / 4)
        forward, backward = StepModel(planned.job).predict().stage_seconds[0]
        return forward.launch, backward.launch

    images: list[float] = []
    for beside, alone in zip(launch("pillow"), launch("dali"), strict=True):
        assert beside - alone == pytest.approx(images[0] * OURS.image_seconds, rel=0.03)
    blocks = plan_recipe(get_recipe("mono_internvl_2b_s1_1"), GPUS["h100-sxm"], 256).job.kinds[0][0]
    assert sum(block.name == "decoding" for block in blocks) == 1


def _traced(recipe: str) -> Trace:
    experiment = get_recipe(recipe)
    parallel = replace(experiment.parallel, tensor=2, expert=4 if experiment.model.decoder.moe else 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(trace_rank, replace(experiment, parallel=parallel), rank=0, world_size=8).result()


def _operations(kernels: list[Kernel]) -> float:
    return sum(kernel.kernels if isinstance(kernel, Stream) else kernel.count if isinstance(kernel, Product) else 1 for kernel in kernels)


@pytest.mark.slow
def test_experts_ask_as_much_of_the_host_as_is_traced() -> None:
    """A sparse layer's operations beyond a dense one's, forward and backward: the planner counts those traced, and also waits."""
    sparse, dense = _traced("debug_mm1_moe"), _traced("debug_mm1")
    shape = DecoderShape.of(get_recipe("debug_mm1_moe").model.decoder)
    layout, tokens = Layout(8, tensor=2, expert=4), Tokens.whole(sequences=1, length=512)
    experts = expert_section(shape, layout, tokens, fp8=False, trained=Trained())
    plain = mlp_section(shape, layout, tokens, ffn=shape.ffn, fp8=False, trained=Trained())
    labels = ("forward|decoder layers", "backward|decoder layers")
    more = sum(sparse.launches[label] - dense.launches[label] for label in labels) / len(shape.sparse_layers)
    assert more == pytest.approx(106, abs=15)
    assert 0.5 < more / sum(_operations(experts[pass_]) - _operations(plain[pass_]) for pass_ in (0, 1)) < 1


def test_a_ring_over_machines_goes_at_the_rate_of_one_card() -> None:
    network = Layout(32, tensor=2, context=16).network(GPUS["h100-sxm"])
    passed = 1e9
    assert network.seconds(Message("ring", passed, "context")) == pytest.approx(15 * passed / (0.8 * 50e9), rel=0.01)
    near = Layout(8, tensor=2, context=4).network(GPUS["h100-sxm"])
    assert near.seconds(Message("ring", passed, "context")) == pytest.approx(3 * passed / (0.82 * 450e9), rel=0.03)
