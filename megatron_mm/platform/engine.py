"""What differs between the supported versions of megatron-core: 0.16 (Python 3.11) and 0.17 to 0.19 (Python 3.12, 3.13).

Each difference is found by looking at what the installed version has, not by its number. `tests/platform/test_engine.py` fails when a
difference is gone from all supported versions.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.language_module import language_module
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import random
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, _DeepepManager
from megatron.core.transformer.spec_utils import ModuleSpec

SAVE_OPTIONS: dict[str, Any] = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)
"""Options of `dist_checkpointing.save` that select megatron-core's own writer, the only one in 0.16. Later versions would otherwise need
nvidia-resiliency-ext."""


def place_of(piece: ShardedTensor) -> tuple[int | slice, ...]:
    """Return the index of a piece in its whole tensor (a method of `ShardedTensor` up to megatron-core 0.19)."""
    stacked = piece.prepend_axis_num
    runs = (slice(begin, begin + size) for begin, size in zip(piece.global_offset[stacked:], piece.local_shape, strict=True))
    return (*piece.global_offset[:stacked], *runs)


def te_experts() -> Any:
    """Transformer Engine's grouped experts, as a part of `MoESubmodules`: inside a ModuleSpec in 0.16, in a functools.partial later."""
    spec: Any = get_moe_module_spec(use_te=True, num_experts=1, moe_grouped_gemm=True)
    submodules = spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules
    return submodules.experts


def gradients_for_norm(optimizer: Any) -> list[torch.Tensor]:
    """Gradients of this process's parameters, so that each parameter is counted by one process of the model. The method's name changed
    after 0.16."""
    before = getattr(optimizer, "get_main_grads_for_grad_norm", None)
    return optimizer.get_grads_for_grad_norm() if before is None else before()


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers in a chained one: that of dense parameters and, if there are experts, that of experts. Any other optimizer by
    itself."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def step_and_gather(optimizer: MegatronOptimizer) -> None:
    """Update all weights, then gather each bucket of them over data parallelism once.

    What upstream lacks: the optimizers of dense parameters and of experts each gather all buckets of the model after their own update,
    including those of the other. A step of a sparse model thus sends twice the bytes, the first time with weights that are still to be
    updated. If gathers overlap with the next forward pass, its hooks do them, once.
    """
    parts = parts_of(optimizer)
    chunks: dict[int, Any] = {}
    for part in parts:
        if isinstance(part, DistributedOptimizer):
            super(DistributedOptimizer, part).step_with_ready_grads()  # without the gathers in its own method
            if not part.ddp_config.overlap_param_gather:
                chunks.update((id(chunk), chunk) for chunk in part.model_chunks)
        else:
            part.step_with_ready_grads()
    for chunk in chunks.values():
        chunk.start_param_sync()


def gather_weights(model: Iterable[DistributedDataParallel]) -> None:
    """Complete the weights of every process after an update. Called by all processes together, before weights are read outside of a forward
    pass.

    If gathers overlap with the next forward pass, an update leaves each data-parallel process with new values for its own share of the
    weights only. If they do not, or if all weights have been gathered since the update, nothing happens.
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                group.finish_param_sync(skip_next_bucket_dispatch=True)


def make_user_buffers(*, tokens: int, width: int, tensor: int, fp8: bool) -> None:
    """Allocate the buffers through which Transformer Engine's layers exchange tensors (`ParallelConfig.overlap_tensor`). Called by all
    processes before a model is built; a later call replaces the buffers.

    Args:
        tokens, width: size of a micro-batch's hidden states, over all tensor-parallel processes.
    """
    module: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    modes = module.UserBufferQuantizationMode
    module.destroy_ub()
    module.initialize_ub(
        [tokens, width], tensor, quantization_modes=[modes.FP8 if fp8 else modes.NONE], dtype=torch.bfloat16, bootstrap_backend="gloo"
    )


def leave_generators_alone(modules: Iterable[torch.nn.Module]) -> None:
    """Keep Transformer Engine's attention, if it has no dropout, from switching the state of the device's generator in each layer of each
    micro-batch. It draws nothing, and each switch takes about ten operations on the host. Without the generators' tracker, it can also be
    captured in a CUDA graph: Transformer Engine refuses to capture with megatron-core's."""
    for module in modules:
        for attention in module.modules():
            if getattr(attention, "attention_dropout", None) == 0.0:
                if hasattr(attention, "rng_states_tracker"):
                    attention.rng_states_tracker = None  # type: ignore[assignment]
                for kernel in attention.children():
                    if hasattr(kernel, "attention_dropout_ctx"):
                        kernel.attention_dropout_ctx = contextlib.nullcontext  # type: ignore[assignment]


def is_writing(saves: AsyncCallsQueue) -> bool:
    """Whether a process that writes one of these saves is still running; only this process's own writers are checked."""
    writers = (call.async_caller.process for call in saves.async_calls)
    return any(writer is not None and writer.is_alive() for writer in writers)


def mlp_spec(submodules: MLPSubmodules) -> Any:
    """A layer's MLP with these linear layers: a ModuleSpec in 0.16, a function in 0.19, which warns of specs."""
    build = getattr(MLP, "as_mlp_submodule", None)
    return ModuleSpec(module=MLP, submodules=submodules) if build is None else functools.partial(build, submodules=submodules)


EXPLAINED = {
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # its successor, HybridModel, is not in 0.16
    "distributed.distributed_data_parallel": "full_param_layout not provided",  # the layout computed instead is the one we want
    "dist_checkpointing.strategies.torch": "async save is deprecated",  # the other writer is a separate package
}
"""Warnings of megatron-core 0.19 about uses that are intended: module that logs each -> words of its text."""


def install() -> None:
    """Fix errors of the installed megatron-core, and suppress its unnecessary warnings; does nothing when called again."""
    for module, words in EXPLAINED.items():
        log = logging.getLogger(f"megatron.core.{module}")
        if not any(isinstance(known, _Without) for known in log.filters):
            log.addFilter(_Without(words))
    # megatron-core 0.19 passes queries, keys and values as views of one buffer, which Transformer Engine detects by itself.
    warnings.filterwarnings("ignore", message="Relying on pointer-based detection", category=DeprecationWarning)
    if not getattr(_DeepepManager.setup_metadata, "masks_unrouted", False):
        _DeepepManager.setup_metadata = _sending_nothing_nowhere(_DeepepManager.setup_metadata)
    if not getattr(MLP.forward, "copies_bias", False):
        MLP.forward = _with_own_bias(MLP.forward)
    if not getattr(MoEAlltoAllTokenDispatcher.preprocess, "counts_routed_tokens", False):
        MoEAlltoAllTokenDispatcher.preprocess = _counting_routed_tokens(MoEAlltoAllTokenDispatcher.preprocess)
    loss = language_module.te_parallel_cross_entropy
    if loss is not None and not hasattr(loss, "compares_nothing"):
        language_module.te_parallel_cross_entropy = _comparing_nothing(loss)
    if not hasattr(random, "FP8GlobalStateManager") and not getattr(CheckpointWithoutOutput.__init__, "knows_no_fp8", False):
        CheckpointWithoutOutput.__init__ = _without_fp8(CheckpointWithoutOutput.__init__)
    if hasattr(random, "_get_share_storage"):
        random._get_share_storage = lambda: fill_storage


def fill_storage(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Give the discarded memory of a tensor, and of all its views, the contents of the recomputed one, as megatron-core 0.16 does.

    What upstream lacks: later versions let both share one memory, with C++ code that each process compiles in the user's home at the first
    recomputation. That needs a compiler, and a process that is killed meanwhile leaves a lock, for which all later ones wait without end.
    """
    output.untyped_storage().resize_(recomputed.untyped_storage().size())
    output.untyped_storage().copy_(recomputed.untyped_storage())


def _sending_nothing_nowhere(setup_metadata: Any) -> Any:
    """`_DeepepManager.setup_metadata`, for tokens that go to fewer than top-k experts.

    What upstream lacks: without a capacity factor, it sends a token to its top-k experts by weight, even if a weight is 0, and padding,
    which has no weights, to the first experts. HybridEP and all-to-all read which experts are chosen.
    """

    @functools.wraps(setup_metadata)
    def masking(self: Any, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        setup_metadata(self, routing_map, probs)
        self.token_indices = self.token_indices.masked_fill(self.token_probs == 0, -1)

    masking.masks_unrouted = True  # type: ignore[attr-defined]
    return masking


def _with_own_bias(forward: Any) -> Any:
    """`MLP.forward`, whose second output is the last layer's bias, for MLPs that are recomputed in the backward pass.

    What upstream lacks: the checkpoint function returns the bias parameter itself. The parameter thereby becomes an output of the
    checkpoint, whose backward pass then calls itself without end. A copy is an ordinary output.
    """

    @functools.wraps(forward)
    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, bias = forward(self, *args, **kwargs)
        recomputed = self.config.recompute_granularity == "selective" and "mlp" in self.config.recompute_modules
        return out, bias.clone() if recomputed and isinstance(bias, torch.nn.Parameter) else bias

    own.copies_bias = True  # type: ignore[attr-defined]
    return own


def _without_fp8(init: Any) -> Any:
    """`CheckpointWithoutOutput.__init__`, which is used to recompute norms, for when Transformer Engine is not installed.

    What upstream lacks: it assumes that every checkpoint may be in FP8, and asks Transformer Engine whether FP8 is active.
    """

    @functools.wraps(init)
    def plain(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.fp8 = False

    plain.knows_no_fp8 = True  # type: ignore[attr-defined]
    return plain


def _comparing_nothing(cross_entropy: Any) -> Any:
    """`te_parallel_cross_entropy`, for losses of single tokens.

    What upstream lacks: up to Transformer Engine 2.11, its backward pass asks whether the gradient is the number 1, in order to save a
    multiplication. Making that number on the GPU stops the host until the GPU has finished the forward pass, and the answer is always no,
    because each token has a gradient of its own. The option for CUDA graphs leaves the question out. Later versions copy the logits unless
    they are told that the gradient may overwrite them, as it did before; nothing else reads them here.
    """

    @functools.wraps(cross_entropy)
    def loss(logits: torch.Tensor, labels: torch.Tensor, tp_group: Any, is_cg_capturable: bool = False) -> torch.Tensor:
        overwriting = _overwriting_loss()
        if overwriting is not None and logits.is_contiguous():
            return overwriting(logits, labels, dist_process_group=tp_group, overwrite_input=True)
        return cross_entropy(logits, labels, tp_group, is_cg_capturable or _compares_gradients())

    loss.compares_nothing = True  # type: ignore[attr-defined]
    return loss


@functools.cache
def _overwriting_loss() -> Any:
    """Transformer Engine's loss if it can be told to overwrite the logits; otherwise None."""
    loss = importlib.import_module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy
    return loss if "overwrite_input" in inspect.signature(loss).parameters else None


@functools.cache
def _compares_gradients() -> bool:
    kernels = importlib.import_module("transformer_engine.pytorch.triton.cross_entropy")
    return "is_cg_capturable" in inspect.signature(kernels.cross_entropy_backward).parameters


class _Without(logging.Filter):
    """Drops messages that contain these words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()


def _counting_routed_tokens(preprocess: Any) -> Any:
    """`MoEAlltoAllTokenDispatcher.preprocess`, for tokens that go to fewer than top-k experts.

    What upstream lacks: without a capacity factor, it assumes that there are tokens times top-k rows after the permutation. Padding goes to
    no expert here, so there are fewer. 0.16 selects rows by mask and never reads the number. From 0.17 on, that many rows of a sort are
    taken; the rows after the routed ones are garbage, and the splits of the all-to-all do not add up to the number.
    """

    @functools.wraps(preprocess)
    def counting(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        tokens_per_expert = preprocess(self, routing_map)
        if not self.drop_and_pad:
            self.num_out_tokens = routing_map.sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")  # the number stays on the GPU until then
        return tokens_per_expert

    counting.counts_routed_tokens = True  # type: ignore[attr-defined]
    return counting
