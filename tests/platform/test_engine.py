"""Differences between versions of megatron-core: each still exists, and its workaround works with the installed version."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.common.language_module import language_module
from megatron.core.tensor_parallel import random
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, checkpoint
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, _DeepepManager
from megatron.core.transformer.spec_utils import ModuleSpec
from support.te.install import FOLDER, python_of_transformer_engine

from megatron_mm.platform import cpu, engine


def test_a_save_is_written_by_megatron_core_itself() -> None:
    known = inspect.signature(dist_checkpointing.save).parameters
    assert engine.SAVE_OPTIONS.keys() <= known.keys()
    if "async_strategy" in known:
        assert known["async_strategy"].default != "mcore", "it is the default now: platform.engine.SAVE_OPTIONS may go"


def test_an_mlp_is_what_the_installed_version_wants() -> None:
    submodules = MLPSubmodules(linear_fc1=torch.nn.Identity, linear_fc2=torch.nn.Identity)
    spec = engine.mlp_spec(submodules)
    if hasattr(MLP, "as_mlp_submodule"):
        assert isinstance(spec, functools.partial) and spec.keywords["submodules"] is submodules
    else:
        assert isinstance(spec, ModuleSpec) and spec.submodules is submodules


def test_rows_after_a_permutation_are_those_of_routed_tokens() -> None:
    """Of 4 tokens with 2 choices each, one is padding: 6 rows remain, in the order of their experts."""
    engine.install()
    routing_map = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    preprocess = MoEAlltoAllTokenDispatcher.preprocess
    state = _dispatcher(routing_map)
    state.num_out_tokens = None
    per_expert = preprocess(state, routing_map)
    assert per_expert.tolist() == [2, 2, 2] and int(state.num_out_tokens) == 6
    tokens = torch.arange(4.0)[:, None]
    rows = moe_utils.permute(tokens, routing_map, num_out_tokens=int(state.num_out_tokens))[0]
    assert rows.flatten().tolist() == [0, 3, 0, 1, 1, 3]


def test_upstream_still_counts_padding_as_routed() -> None:
    engine.install()
    routing_map = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    state = _dispatcher(routing_map)
    inspect.unwrap(MoEAlltoAllTokenDispatcher.preprocess)(state, routing_map)
    assert int(state.num_out_tokens) == 4, "megatron-core counts routed tokens now: platform.engine may leave its dispatcher alone"


def _dispatcher(routing_map: torch.Tensor) -> SimpleNamespace:
    """Return the attributes that `preprocess` reads, for one process with all experts."""
    config = SimpleNamespace(
        moe_expert_capacity_factor=None,
        moe_router_padding_for_quantization=False,
        moe_router_padding_for_fp8=False,
        moe_router_topk=2,
        moe_permute_fusion=False,
    )
    order = {"before_permutation_1": 0, "before_finish": 1, "before_permutation_2": 2, "no_sync": 3}
    return SimpleNamespace(
        config=config,
        drop_and_pad=False,
        ep_size=1,
        tp_size=1,
        num_experts=routing_map.shape[1],
        num_local_experts=routing_map.shape[1],
        cuda_sync_point="no_sync",
        cuda_dtoh_point="before_permutation_1",
        cuda_sync_point_priority=order,
        _maybe_update_cuda_sync_point=lambda point: None,
    )


def test_only_what_is_explained_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    engine.install()
    for module, words in engine.EXPLAINED.items():
        log = logging.getLogger(f"megatron.core.{module}")
        with caplog.at_level(logging.WARNING):
            log.warning(f"something else, and {words}: read the guide")
            log.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"] * len(engine.EXPLAINED)


def test_upstream_still_returns_a_bias_as_an_output_of_its_checkpoint() -> None:
    cpu.install()
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    checkpoint(lambda x: (x @ weight, bias), False, torch.ones(1, 2, requires_grad=True))
    assert not bias.is_leaf, "megatron-core leaves parameters alone now: platform.engine may leave MLP.forward alone"


def test_deepep_sends_padding_nowhere() -> None:
    """One of 2 tokens, with 2 choices of 3 experts each, is padding."""
    routing_map = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    weights = torch.tensor([[0.25, 0.0, 0.75], [0.0, 0.0, 0.0]])
    state = SimpleNamespace(num_experts=3, router_topk=2, capacity_factor=None)
    inspect.unwrap(_DeepepManager.setup_metadata)(state, routing_map, weights)
    assert -1 not in state.token_indices[1], "megatron-core masks it now: platform.engine may leave DeepEP alone"
    engine.install()
    _DeepepManager.setup_metadata(state, routing_map, weights)
    assert state.token_indices.tolist() == [[2, 0], [-1, -1]] and state.token_probs[0].tolist() == [0.75, 0.25]


@pytest.mark.skipif(hasattr(random, "FP8GlobalStateManager"), reason="Transformer Engine is installed, and says whether FP8 is under way")
def test_norms_are_computed_again_without_transformer_engine() -> None:
    cpu.install()
    engine.install()
    x = torch.tensor([3.0], requires_grad=True)
    again = CheckpointWithoutOutput()
    twice = again.checkpoint(lambda x: 2 * x, x)
    squared = twice.square()
    again.discard_output_and_register_recompute(squared)
    squared.sum().backward()
    assert x.grad is not None and x.grad.item() == 24.0
    upstream = CheckpointWithoutOutput.__new__(CheckpointWithoutOutput)
    inspect.unwrap(CheckpointWithoutOutput.__init__)(upstream)
    assert upstream.fp8, "megatron-core knows that nothing is FP8 here: platform.engine may leave its checkpoints alone"


@pytest.mark.skipif(not hasattr(random, "_get_share_storage"), reason="megatron-core 0.16 compiles nothing")
def test_a_recomputed_tensor_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of the discarded tensor, which later layers have kept, get its contents back, too."""
    monkeypatch.setattr(random, "load_inline", None)
    engine.install()
    output = torch.arange(12.0)
    kept, recomputed = output.view(3, 4)[1:], torch.arange(12.0) + 1
    output.untyped_storage().resize_(0)
    random._get_share_storage()(output, recomputed)
    assert torch.equal(output, recomputed) and torch.equal(kept, recomputed.view(3, 4)[1:])


@pytest.mark.parametrize("backward", [lambda loss, gradient, is_cg_capturable=False: None, lambda loss, gradient: None])
def test_the_loss_does_not_ask_for_the_value_of_its_gradient(monkeypatch: pytest.MonkeyPatch, backward: Any) -> None:
    """Up to Transformer Engine 2.11 an option leaves the question out; later versions do not ask, and warn of the option."""
    options = []
    monkeypatch.setattr(language_module, "te_parallel_cross_entropy", lambda logits, labels, group, option: options.append(option))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.triton.cross_entropy", SimpleNamespace(cross_entropy_backward=backward))
    monkeypatch.setattr(engine, "_overwriting_loss", lambda: None)
    engine._compares_gradients.cache_clear()
    engine.install()
    engine.install()  # changes nothing
    language_module.te_parallel_cross_entropy(torch.zeros(1), torch.zeros(1), None, False)
    engine._compares_gradients.cache_clear()
    assert options == ["is_cg_capturable" in inspect.signature(backward).parameters]


def test_the_gradient_of_the_loss_overwrites_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Transformer Engine must be told so; earlier versions always do it."""
    calls: list[Any] = []
    later = SimpleNamespace(
        parallel_cross_entropy=lambda inp, target, *, dist_process_group, overwrite_input: calls.append(overwrite_input)
    )
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.cross_entropy", later)
    monkeypatch.setattr(language_module, "te_parallel_cross_entropy", lambda logits, labels, group, option: calls.append("copies"))
    monkeypatch.setattr(engine, "_compares_gradients", lambda: False)
    engine._overwriting_loss.cache_clear()
    engine.install()
    logits = torch.zeros(2, 1, 3)
    language_module.te_parallel_cross_entropy(logits, torch.zeros(2, 1), None)
    language_module.te_parallel_cross_entropy(logits.transpose(0, 2), torch.zeros(3, 1), None)  # it refuses these
    engine._overwriting_loss.cache_clear()
    assert calls == [True, "copies"]


def test_transformer_engine_up_to_2_11_asks_for_it() -> None:
    version, installed = python_of_transformer_engine(), importlib.util.find_spec("transformer_engine")
    if version is None:
        pytest.skip("no transformer-engine here: see `make test-te`")
    package = FOLDER / version / "transformer_engine" if installed is None else Path(str(installed.origin)).parent
    text = (package / "pytorch" / "triton" / "cross_entropy.py").read_text()
    assert ("torch.equal(" in text) == ("is_cg_capturable" in text), "platform.engine may leave the loss alone"
