"""Options are checked against the machine, the layout and the model before a run starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.small import small_experiment

from megatron_mm.config import Experiment, KernelConfig, MoEConfig, ParallelConfig, PrecisionConfig
from megatron_mm.families.recipes import RECIPES, get_recipe
from megatron_mm.run.start import check
from megatron_mm.training.options import asked_for, check_options
from megatron_mm.training.options.other import _image_size

OVERLAPPED = ParallelConfig(tensor=2, overlap_tensor=True)
FP8_TRAIN = replace(get_recipe("mono_internvl_2b_s1_1").train, precision="fp8")
OVERLAPPED_EXPERTS = {"expert": 2, "overlap_experts": True}
DELAYED = {**OVERLAPPED_EXPERTS, "delay_weight_gradients": True}
EXPERTS = MoEConfig(num_experts=4, every_n_layers=2)


def experiment(*, sparse: bool = False, parallel: dict[str, Any] | None = None, precision: str = "bf16", **formats: Any) -> Experiment:
    base = small_experiment(parallel=parallel, decoder={"moe": EXPERTS} if sparse else None, precision=precision)
    return replace(base, precision=PrecisionConfig(**formats))


def with_parallel(recipe: str, **parallel: Any) -> Experiment:
    base = get_recipe(recipe)
    return replace(base, parallel=replace(base.parallel, **parallel))


def selective(*modules: str, **others: Any) -> dict[str, Any]:
    return {"recompute": "selective", "recompute_modules": modules, **others}


def test_defaults_ask_for_nothing() -> None:
    assert list(asked_for(experiment(), backend="torch")) == []


@pytest.mark.parametrize(
    ("asked", "backend", "message"),
    [
        (experiment(exp_avg="bf16"), "torch", "precision.exp_avg is bf16, but only Transformer Engine's Adam"),
        (experiment(sparse=True, parallel=selective("moe_act")), "torch", "parallel.recompute_modules is moe_act, but it is part of"),
        (experiment(parallel={"tensor": 2, "overlap_tensor": True}), "torch", "overlap_tensor is True, but user buffers need"),
        (experiment(sparse=True, parallel={"tensor": 2, "overlap_tensor": True}), "te", "layers also exchange other numbers of tokens"),
        (replace(get_recipe("debug_infimm"), parallel=OVERLAPPED), "te", "layers also exchange other numbers of tokens"),
        (experiment(parallel={"tensor": 3, "overlap_tensor": True}), "te", "groups of 3 span several nodes of 8 GPUs"),
        (experiment(parallel={"tensor": 2, "overlap_tensor": True}), "te", "captions of held-out images .*: use --eval.samples 0"),
        (
            experiment(sparse=True, parallel=OVERLAPPED_EXPERTS, precision="fp32"),
            "te",
            "overlap_experts is True, but .* use --train.precision",
        ),
        (experiment(sparse=True, parallel={**OVERLAPPED_EXPERTS, "pipeline": 2}), "te", "use --parallel.virtual 2"),
        (
            experiment(sparse=True, parallel={**OVERLAPPED_EXPERTS, "recompute": "full"}),
            "te",
            "recomputed .*: use --parallel.recompute none",
        ),
        (experiment(sparse=True, parallel={"expert": 2, "expert_dispatch": "deepep"}), "te", "deepep, but its kernels need GPUs"),
        (
            experiment(sparse=True, parallel=selective("moe_act"), precision="fp8", fp8_recipe="delayed"),
            "te",
            "parallel.recompute_modules is moe_act, but FP8 with delayed scaling",
        ),
        (experiment(precision="fp8", fp8_weights=True, fp8_recipe="delayed"), "te", "fp8_weights is True, but weights cannot be kept in"),
        (
            experiment(precision="fp8", fp8_weights=True, parallel={"distributed_optimizer": False}),
            "te",
            "fp8_weights is True, but only the distributed optimizer",
        ),
        (
            replace(get_recipe("mono_internvl_2b_s1_1"), train=FP8_TRAIN, precision=PrecisionConfig(fp8_weights=True)),
            "te",
            "fp8_weights is True, but freeze policy 's1_1' freezes weights of the decoder",
        ),
    ],
)
def test_what_cannot_run_is_refused(asked: Experiment, backend: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mm.platform.device.fp8_recipe_missing", lambda recipe: "")
    with pytest.raises(ValueError, match=message):
        check_options(asked, backend=backend)


@pytest.mark.parametrize(
    ("asked", "backend", "message"),
    [
        (experiment(precision="fp32", gradients="bf16"), "torch", "precision.gradients is bf16 and has no effect: gradients of fp32"),
        (experiment(fp8_weights=True), "te", "precision.fp8_weights is True and has no effect: train.precision is bf16"),
        (experiment(fp8_recipe="blockwise"), "torch", "precision.fp8_recipe is blockwise and has no effect: train.precision is bf16"),
        (experiment(parallel={"recompute_modules": ("mlp",)}), "torch", "has no effect: parallel.recompute is none"),
        (experiment(parallel=selective("moe")), "torch", "parallel.recompute_modules is moe and has no effect: the model has no experts"),
        (experiment(parallel=selective("layernorm")), "te", "layernorm and has no effect: Transformer Engine's layers fuse norms"),
        (
            experiment(sparse=True, parallel=selective("layernorm", recompute_encoder_modules=("layernorm",))),
            "te",
            "parallel.recompute_encoder_modules is layernorm and has no effect",
        ),
        (experiment(parallel={"max_expert_load": 2.0}), "torch", "max_expert_load is 2.0 and has no effect: the model has no experts"),
        (experiment(parallel={"overlap_tensor": True}), "te", "overlap_tensor is True and has no effect: sequences are not split"),
        (experiment(sparse=True, parallel={"expert_dispatch": "deepep"}), "te", "deepep and has no effect: every process has all experts"),
        (experiment(sparse=True, parallel={"expert": 2, "delay_weight_gradients": True}), "te", "use --parallel.overlap-experts True"),
        (experiment(sparse=True, parallel=DELAYED), "torch", "delay_weight_gradients is True and has no effect: only Transformer Engine's"),
        (experiment(sparse=True, parallel={"max_expert_load": 2.0, "expert": 2}), "torch", "one of 2 processes cannot receive more"),
        (experiment(parallel={"sequence": True}), "te", "parallel.sequence is True and has no effect: parallel.tensor is 1"),
        (
            with_parallel("debug_mono_internvl", recompute_encoder="full"),
            "torch",
            "full and has no effect: mono_internvl models have no image",
        ),
        (
            with_parallel("debug_mono_internvl", recompute_encoder_modules=("mlp",)),
            "torch",
            "recompute_encoder_modules is ('mlp',) and has no effect: mono_internvl models have no image tower",
        ),
        (
            with_parallel("debug_infimm", recompute_encoder="full"),
            "torch",
            "recompute_encoder is full and has no effect: EVA towers do not",
        ),
    ],
)
def test_what_has_no_effect_is_said(asked: Experiment, backend: Any, message: str, caplog: pytest.LogCaptureFixture) -> None:
    check_options(asked, backend=backend)
    assert message in caplog.text


def test_recompute_that_saves_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Fused attention stores no intermediate results; PyTorch's does."""
    core = experiment(parallel=selective("core_attn"))
    check_options(core, backend="torch")
    check_options(replace(core, train=replace(core.train, deterministic=True)), backend="te")  # in which attention may be PyTorch's
    assert "saves no memory" not in caplog.text
    check_options(core, backend="te")
    assert "parallel.recompute is selective: it recomputes core_attn, but Transformer Engine's fused attention stores only" in caplog.text
    assert "This saves no memory and takes time: use --parallel.recompute none, full, or selective with other" in caplog.text
    caplog.clear()
    check_options(experiment(parallel={"recompute_encoder": "selective"}), backend="te")
    assert "parallel.recompute_encoder is selective: it recomputes core_attn" in caplog.text


def test_recipes_ask_for_nothing_without_effect() -> None:
    for recipe in RECIPES:
        for backend in ("te", "torch"):
            assert not [option for option in asked_for(get_recipe(recipe), backend=backend) if option.useless or option.impossible]


def test_frozen_weights_of_the_decoder_have_no_gradients_to_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mm.training.options.frozen.trainable_patterns", lambda experiment: ("vision", "connector"))
    with pytest.raises(ValueError, match="delay_weight_gradients is True, but freeze policy 'all' freezes weights of the decoder"):
        check_options(experiment(sparse=True, parallel=DELAYED), backend="te")


def test_what_an_option_costs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check_options(experiment(gradients="bf16"), backend="torch")
    assert "precision.gradients is bf16: every sum of gradients is rounded" in caplog.text


def test_a_warm_up_longer_than_the_schedule_and_pixels_that_no_patch_holds_are_said(caplog: pytest.LogCaptureFixture) -> None:
    debug = get_recipe("debug_mm1")
    for recipe in RECIPES:
        asked = {option.name for option in asked_for(get_recipe(recipe), backend="te")}
        assert not asked & {"optimizer.warmup_steps", "model.vision.image_size"}
    constant = replace(debug, optimizer=replace(debug.optimizer, warmup_steps=400, decay="constant"))
    check_options(constant, backend="torch")
    assert not caplog.text
    cosine = replace(constant, optimizer=replace(constant.optimizer, decay="cosine"))
    check_options(replace(cosine, model=replace(debug.model, vision=replace(debug.model.vision, image_size=35))), backend="torch")
    assert (
        "optimizer.warmup_steps is 400: train.schedule_steps is 400, so the learning rate would fall to min_lr right after" in caplog.text
    )
    assert "model.vision.image_size is 35: it is no multiple of patch_size 4, so the tower never sees the last 3 pixels" in caplog.text


def test_a_tower_of_another_family_may_have_no_patches() -> None:
    assert list(_image_size(SimpleNamespace(model=SimpleNamespace(vision=SimpleNamespace(width=8))))) == []


def test_it_is_found_before_data_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only Transformer Engine's Adam"):
        check(experiment(exp_avg="bf16"), tmp_path)


def test_experts_on_several_nodes_are_said_with_what_they_send(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "128")
    check_options(get_recipe("mm1_3b_moe"), backend="te")
    assert "parallel.expert is 32: each expert-parallel group spans 4 nodes of 8 GPUs" in caplog.text
    assert "7.9 GB of tokens and 8.7 GB of gradients and weights" in caplog.text and "--parallel.expert 8 on one node" in caplog.text
    caplog.clear()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "72")
    check_options(get_recipe("mm1_3b_moe"), backend="te")
    assert "spans 2 nodes of 72 GPUs" in caplog.text, "the third group of 32 begins on one and ends on another"
    caplog.clear()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    check_options(get_recipe("mm1_3b_moe"), backend="te")
    assert "spans" not in caplog.text


def test_micro_batches_have_one_size_with_user_buffers() -> None:
    whole = experiment(parallel={"tensor": 2, "overlap_tensor": True})
    assert whole.token_multiple == 96 and experiment(parallel={"tensor": 2}).token_multiple == 16


def graphed(recipe: str, **parallel: Any) -> Experiment:
    base = get_recipe(recipe)
    return replace(base, kernels=KernelConfig(tower_graph=8), parallel=replace(base.parallel, **parallel))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (graphed("debug_mono_internvl"), "mono_internvl models have no image tower apart from the first stage: leave it out"),
        (
            graphed("debug_mm1", pipeline=2, spread_encoder=True),
            "freeze policy 'all' trains the image tower, and --parallel.spread-encoder",
        ),
        (graphed("debug_mm1", recompute="full"), r"the tower is recomputed \(full\), and a graph keeps its activations"),
    ],
)
def test_a_graph_of_a_tower_that_cannot_run_is_refused(asked: Experiment, message: str) -> None:
    with pytest.raises(ValueError, match=rf"kernels\.tower_graph is 8, but {message}"):
        check_options(asked, backend="te")


def test_a_graph_of_a_tower_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"kernels\.tower_graph is 8, but CUDA graphs need a GPU: leave it out"):
        check_options(graphed("debug_infimm"), backend="torch")


@pytest.mark.usefixtures("gpus")
def test_a_graph_of_a_recomputed_tower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mm.families.base.Family.trainable", lambda family, policy: lambda name: name.startswith("connector."))
    check_options(graphed("debug_mm1"), backend="torch")
    with pytest.raises(ValueError, match=r"the tower is recomputed \(full\), .*: use --parallel.recompute-encoder none"):
        check_options(graphed("debug_mm1", recompute="full"), backend="torch")
    check_options(graphed("debug_mm1", recompute="full", recompute_encoder="none"), backend="torch")


@pytest.mark.usefixtures("gpus")
def test_what_a_graph_of_a_tower_costs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check_options(graphed("debug_infimm", recompute="full"), backend="te")
    assert "kernels.tower_graph is 8: each process fills up the images of a micro-batch with blank ones to a multiple of 8" in caplog.text
    caplog.clear()
    check_options(graphed("debug_mm1", pipeline=2), backend="te")
    assert "with blank ones to 8; the computation" in caplog.text and "Activations of 8 images are kept for 2 micro-batches" in caplog.text


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("connections", "refused"), [("1", True), ("8", False), ("32", False), (None, False)])
def test_streams_that_wait_for_each_other_cannot_overlap(connections: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's default is 8 work queues."""
    if connections is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    else:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    asked = experiment(sparse=True, parallel=OVERLAPPED_EXPERTS)
    if not refused:
        check_options(asked, backend="te")
        return
    with pytest.raises(ValueError, match=r"overlap_experts is True, but CUDA_DEVICE_MAX_CONNECTIONS is 1, .*: set it to 32"):
        check_options(asked, backend="te")


def routed(recipe: str = "debug_mm1_moe", *, capacity_factor: float | None = None, **parallel: Any) -> Experiment:
    """An experiment that asks for graphs of routers."""
    base = get_recipe(recipe)
    moe = base.model.decoder.moe
    if moe is not None:
        decoder = replace(base.model.decoder, moe=replace(moe, capacity_factor=capacity_factor))
        base = replace(base, model=replace(base.model, decoder=decoder))  # type: ignore[arg-type]
    return replace(base, kernels=KernelConfig(router_graph=True), parallel=replace(base.parallel, **parallel))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (routed(capacity_factor=2.0), r"capacity \(moe.capacity_factor 2.0\) depends on each micro-batch's tokens: leave one of them out"),
        (routed(recompute="full"), "layers with experts are recomputed"),
        (routed(**selective("moe")), "layers with experts are recomputed"),
    ],
)
def test_a_graph_of_a_router_that_cannot_run_is_refused(asked: Experiment, message: str) -> None:
    with pytest.raises(ValueError, match=rf"kernels\.router_graph is True, but .*{message}"):
        check_options(asked, backend="te")


def test_a_graph_of_a_router_needs_a_gpu_and_experts(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"kernels\.router_graph is True, but CUDA graphs need a GPU: leave it out"):
        check_options(routed(), backend="torch")
    check_options(routed("debug_mm1"), backend="torch")
    assert "kernels.router_graph is True and has no effect: the model has no experts" in caplog.text


@pytest.mark.usefixtures("gpus")
def test_what_a_graph_of_a_router_costs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check_options(routed(**selective("core_attn")), backend="te")
    assert "kernels.router_graph is True: each router keeps memory for every micro-batch that waits" in caplog.text


def test_a_value_of_a_wrong_type_from_another_program_is_named(tmp_path: Path) -> None:
    base = get_recipe("debug_mm1")
    with pytest.raises(ValueError, match=r"data.path is '/nowhere', but must be a pathlib.Path"):
        check(replace(base, data=replace(base.data, path="/nowhere")), tmp_path)  # type: ignore[arg-type]
