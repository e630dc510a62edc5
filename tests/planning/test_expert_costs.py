"""Costs of experts: dispatchers, CUDA graphs, fusions, and models with unusual experts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_mm.planning.bridge_recipes import SETTINGS, setting_of
from megatron_mm.planning.costs import Costs, Seconds
from megatron_mm.planning.decoder_job import Adapters, decoder_job
from megatron_mm.planning.decoder_shape import DecoderShape, Tokens, Trained
from megatron_mm.planning.hardware import GPUS, MEASURED_GPUS, STACKS, Dispatcher
from megatron_mm.planning.kernels import Message, Stream
from megatron_mm.planning.layer_sections import attention_section, expert_section
from megatron_mm.planning.layout import Layout
from megatron_mm.planning.published_software import software_of

H100 = GPUS["h100-sxm"]
SHAPE = DecoderShape(
    4, 2880, 64, 8, 64, 2880, True, 1000, experts=32, top_k=4, expert_ffn=2880, sparse_layers=(0, 1, 2, 3), expert_biases=True
)


def _exchange(dispatcher: Dispatcher, *, gpus: int, machines: int = 0) -> float:
    network = Layout(gpus, expert=gpus).network(H100, dispatcher=dispatcher)
    return network.seconds(Message("all_to_all", 1e9, "expert", copies=8, machines=machines))


def test_a_row_goes_to_a_gpu_once() -> None:
    """8 copies reach 5.25 of 8 GPUs on average, and as many of 8 machines, unless a router's groups limit them to 4 machines."""
    inside = 1e9 * 7 / 8 / (450e9 * 0.82)
    assert _exchange("alltoall", gpus=8) == pytest.approx(inside, rel=0.01)
    assert _exchange("deepep", gpus=8) == pytest.approx(inside * 5.25 / 8, rel=0.02)
    assert _exchange("hybridep", gpus=64) < 0.7 * _exchange("alltoall", gpus=64)
    assert _exchange("hybridep", gpus=64, machines=4) < _exchange("hybridep", gpus=64)
    assert _exchange("allgather", gpus=8) == pytest.approx(inside, rel=0.01)  # each token to all 8 GPUs: as much as 8 copies


def _layer(dispatcher: Dispatcher = "alltoall", *, shape: DecoderShape = SHAPE, fuses: bool = False) -> Seconds:
    layout = Layout(8, expert=8)
    stack = replace(STACKS["bridge"], dispatcher=dispatcher, fuses_experts=fuses)
    passes = expert_section(shape, layout, Tokens.whole(sequences=1, length=4096), fp8=False, trained=Trained())
    costs = Costs(H100, stack, layout.network(H100, dispatcher=dispatcher))
    return costs.kernels(tuple(passes[0])) + costs.kernels(tuple(passes[1]))


def test_experts_with_biases_cost_passes_over_memory_unless_products_add_them() -> None:
    plain = replace(SHAPE, expert_biases=False)
    assert _layer().moved > 1.5 * _layer(shape=plain).moved
    assert _layer(fuses=True).moved < _layer(shape=plain).moved
    assert _layer("hybridep").moved < _layer("deepep").moved < _layer().moved


def test_rotation_by_separate_kernels_moves_six_times_the_bytes() -> None:
    tokens, layout = Tokens.whole(sequences=1, length=4096), Layout(8, expert=8)
    fused, separate = (
        attention_section(replace(SHAPE, fuses_rotary=fuses), layout, tokens, fp8=False, trained=Trained()) for fuses in (True, False)
    )
    for which, extra in ((0, 20), (1, 16)):  # forward 24 instead of 4 bytes per number, backward 20 instead of 4
        moved = [sum(kernel.bytes for kernel in section[which] if isinstance(kernel, Stream)) for section in (fused, separate)]
        assert moved[1] - moved[0] == extra * 4096 * (64 + 8) * 64


def test_a_window_a_further_prediction_and_frozen_weights_count() -> None:
    def seconds(shape: DecoderShape, *, adapters: Adapters = "none", pipeline: int = 1) -> tuple[float, float]:
        job = decoder_job(
            shape,
            Layout(8 * pipeline, pipeline=pipeline, expert=8),
            H100,
            STACKS["bridge"],
            sequence_length=16384,
            micro_batch_size=1,
            num_micro_batches=1,
            fp8=False,
            recompute=frozenset(),
            adapters=adapters,
        )
        costs = Costs(H100, job.software, job.layout.network(H100))
        blocks = [block for stage in job.kinds[0] for block in stage]
        passes = [costs.block(block, backward=backward) for block in blocks for backward in (False, True)]
        return sum(one.busy for one in passes), sum(one.attention for one in passes)

    plain = seconds(SHAPE)
    assert seconds(replace(SHAPE, window=128))[1] < 0.7 * plain[1]
    assert plain[0] < seconds(replace(SHAPE, predicted_ahead=1))[0] < 1.6 * plain[0]
    assert 0.5 * plain[0] < seconds(SHAPE, adapters="queries")[0] < 0.9 * plain[0]


def test_what_a_row_says_of_its_experts_is_taken() -> None:
    row = {"experts": "128", "ep": "32", "model": "qwen3-235B-A22B", "source": "a paper"}
    assert software_of(row, H100).dispatcher == "alltoall"
    told = software_of({**row, "notes": "DeepEP, 1f1b overlap"}, H100)
    assert told.dispatcher == "deepep" and told.hides_expert_messages > 0.5
    assert software_of({**row, "dispatcher": "AllGather dispatcher"}, H100).dispatcher == "allgather"
    assert software_of({**row, "notes": "token-drop"}, H100).expert_operations < 1


def test_recipes_of_megatron_bridge_are_looked_up_by_release_and_gpu() -> None:
    row = {"experts": "128", "ep": "8", "model": "qwen3-30B-A3B", "precision": "MXFP8"}
    early = software_of({**row, "source": "Megatron-Bridge performance summary 26.04"}, MEASURED_GPUS["gb200"])
    late = software_of({**row, "source": "Megatron-Bridge performance summary 26.06"}, MEASURED_GPUS["gb200"])
    assert early.dispatcher == late.dispatcher == "hybridep"
    assert not early.fuses_experts and late.fuses_experts and late.graphed == 1.0
    other = setting_of(model="a model of tomorrow", gpu="h100-sxm", precision="bf16", release=(27, 1, 0), on_machines=False)
    assert other.dispatcher == "alltoall" and other.graphed == 0.0
    assert all(setting.since < setting.before for setting in SETTINGS)


def test_all_parts_that_a_stack_may_leave_out_are_there() -> None:
    """The layer really has every part that a stack may leave out."""
    kernels = expert_section(SHAPE, Layout(8, expert=8), Tokens.whole(sequences=1, length=4096), fp8=True, trained=Trained())[0]
    parts = {kernel.part for kernel in kernels if isinstance(kernel, Stream)}
    assert {"router", "permutation", "sorting", "expert activation", "expert bias", "expert weight cast"} <= parts
