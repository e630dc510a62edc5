"""Options of Transformer Engine's layers, FP8 and Adam, one at a time, on its own Python layers with PyTorch kernels (`te_options.py`)."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from test_te import program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


PRODUCTS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@functools.cache
def found() -> dict[str, Any]:
    return json.loads(program("te_options.py", timeout=880)[-1])


@pytest.mark.parametrize("part", ["core_attn", "mlp", "layernorm", "moe", "moe_act"])
def test_recompute_of_a_part_changes_nothing(part: str) -> None:
    assert found()[part]["losses"] == found()["plain"]["losses"][:3]


@pytest.mark.parametrize("part", ["layernorm", "moe_act"])
def test_recompute_of_a_part_changes_nothing_in_fp8(part: str) -> None:
    assert found()[f"fp8 {part}"]["losses"] == found()["fp8"]["losses"]


@pytest.mark.parametrize(
    ("recipe", "quantizer"),
    [("fp8", "Float8CurrentScalingQuantizer"), ("delayed", "Float8Quantizer"), ("blockwise", "Float8BlockQuantizer")],
)
def test_fp8_takes_the_scales_that_are_asked_for(recipe: str, quantizer: str) -> None:
    """Its losses are close to those of bf16."""
    assert found()[recipe]["quantizers"] == [quantizer]
    assert found()[recipe]["losses"] == pytest.approx(found()["plain"]["losses"][:3], rel=1e-3)
    assert found()[recipe]["losses"] != found()["plain"]["losses"][:3]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_weights_that_are_fp8_themselves_change_nothing(recipe: str) -> None:
    """In each step, bf16 weights are rounded to the same FP8 values. A resume starts from the master weights, whichever kind was saved."""
    losses = found()["fp8 weights"][recipe]
    assert losses["fp8"] == losses["bf16"] and losses["bf16 from fp8"] == losses["bf16"][2:]


def test_fp8_weights_are_gathered_as_bytes() -> None:
    """Also during the next forward pass, as on GPUs: losses are the same, and a resume is exact."""
    of_two = found()["fp8 weights of two"]
    bf16, own = of_two["False False"], of_two["True False"]
    assert own["losses"] == bf16["losses"] == of_two["False True"]["losses"] == of_two["True True"]["losses"]
    assert own["losses"][-1] == own["losses"][-2]
    assert bf16["gathered"].keys() == {"torch.bfloat16"} and own["gathered"].keys() == {"torch.bfloat16", "torch.uint8"}
    assert own["gathered"]["torch.uint8"] > 0.4 * bf16["gathered"]["torch.bfloat16"]


def test_gradients_are_kept_in_bf16() -> None:
    assert found()["bf16 gradients"]["gradients"] == ["torch.bfloat16"] and found()["plain"]["gradients"] == ["torch.float32"]
    assert found()["bf16 gradients"]["losses"] == pytest.approx(found()["plain"]["losses"][:3], rel=1e-4)


def test_moments_are_kept_in_bf16_and_a_resume_is_exact() -> None:
    small = found()["bf16 moments"]
    assert small["exp_avg"] == small["exp_avg_sq"] == ["torch.bfloat16"] and found()["plain"]["exp_avg"] == ["torch.float32"]
    assert small["losses"] == found()["bf16 moments, at once"]["losses"]
    assert small["losses"] == pytest.approx(found()["plain"]["losses"], rel=1e-4)


def test_a_checkpoint_goes_on_with_moments_of_the_other_format() -> None:
    plain, small = found()["plain"]["losses"], found()["bf16 moments"]["losses"]
    to_bf16, to_fp32 = found()["bf16 moments from fp32"], found()["fp32 moments from bf16"]
    assert to_bf16["exp_avg"] == ["torch.bfloat16"] and to_fp32["exp_avg"] == ["torch.float32"]
    assert to_bf16["losses"] == pytest.approx(plain[2:], rel=1e-4) and to_fp32["losses"] == pytest.approx(small[2:], rel=1e-4)


def test_the_routers_kernel_runs() -> None:
    """`test_te.test_losses_are_the_same` compares its results with plain PyTorch's."""
    calls = found()["plain"]["calls"]
    assert calls["fused_topk_with_score_function_fwd"] > 0 and calls["fused_topk_with_score_function_bwd"] > 0


def test_attention_that_drops_nothing_leaves_generators_alone() -> None:
    assert found()["plain"]["calls"]["fused_attn_fwd"] > 0 and "generator states put in place" not in found()["plain"]["calls"]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_layers_exchange_through_user_buffers_of_one_size(precision: str) -> None:
    """All products of both decoder layers use them, and none of the tower, which is not split; the kernels' use of them needs a GPU."""
    seen = found()["user buffers"][precision]
    layers = {f"module.language.decoder.layers.{layer}.{name}" for layer in (0, 1) for name in PRODUCTS}
    assert set(seen["layers"]) == layers and set(seen["layers"].values()) == {"qkv", "proj", "fc1", "fc2"}
    assert {"qkv_fprop", "proj_fprop", "fc1_fprop", "fc2_fprop", "qkv_dgrad", "fc1_dgrad"} <= set(seen["buffers"])
    assert {tuple(shape) for shape, _ in seen["buffers"].values()} == {(96, 64)}, "a micro-batch's tokens and their width"
    assert ("torch.uint8" in {kind for _, kind in seen["buffers"].values()}) == (precision == "fp8")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_exchange_of_experts_beside_another_micro_batch_changes_no_loss(precision: str) -> None:
    """bf16 sums of a layer's two gradients are rounded in another order."""
    plain, beside = (found()["overlap"][f"{name} {precision}"] for name in ("plain", "overlapped"))
    assert beside["losses"] == pytest.approx(plain["losses"], rel=1e-4 if precision == "bf16" else 1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ["delayed", "delayed, not fused,"])
def test_delayed_weight_gradients_change_no_update(precision: str, name: str) -> None:
    """Each is added in the step that it belongs to. The sums of gradients are rounded otherwise if they are not fused."""
    beside, delayed = (found()["overlap"][f"{kind} {precision}"] for kind in ("overlapped", name))
    assert delayed["delayed"] > 0 and beside["delayed"] == 0
    for kind in ("losses", "gradient norms"):
        assert delayed[kind] == (beside[kind] if name == "delayed" else pytest.approx(beside[kind], rel=1e-4))


@pytest.mark.parametrize("name", ["bf16 fused", "bf16 not fused", "fp8 fused", "fp8 not fused"])
def test_graphs_of_a_tower_that_trains_change_no_update(name: str) -> None:
    """Whether Transformer Engine's products add weight gradients to the buffers, or autograd returns them. FP8 is the decoder's alone."""
    plain, graphs = (found()["graphs"][name][kind] for kind in ("plain", "graphs"))
    assert graphs["numbers"] == plain["numbers"] and len(graphs["numbers"]) == 3
    forward, backward = graphs["replays"]
    assert plain["replays"] == [] and forward > backward >= 3
    assert (plain["fused"] > 0) == (graphs["fused"] > 0) == ("not" not in name)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_graphs_of_routers_change_no_update(precision: str) -> None:
    """With Transformer Engine's kernel for the choice of experts inside them."""
    plain, graphs = (found()["graphs of routers"][precision][kind] for kind in ("plain", "graphs"))
    assert graphs["numbers"] == plain["numbers"] and len(graphs["numbers"]) == 3
    forward, backward = graphs["replays"]
    assert plain["replays"] == [] and forward > backward > 3 * 4 <= plain["kernels"] and graphs["kernels"] == 0
