"""Does for many parameters at once, in a few kernels, what megatron-core does parameter by parameter, in hundreds.

What upstream lacks: in every micro-batch, it adds the gradient of each parameter to its buffer with a separate kernel, and after every
update it copies each master weight to the model in the same way. A model has several hundred vectors (norms and biases). Their kernels take
a GPU almost no time, but the host needs some microseconds to launch each. The sums and copies here are identical, bit for bit.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Pair = tuple[torch.Tensor, torch.Tensor]


class DataParallel(DistributedDataParallel):
    """megatron-core's wrapper, but gradients of vectors are added to their buffers together: at the end of a micro-batch's backward pass,
    or before a complete bucket is reduced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: dict[torch.nn.Parameter, torch.Tensor] = {}
        """Gradients that have not been added to their buffers yet."""
        for group in [*self.bucket_groups, *self.expert_parallel_bucket_groups]:
            group.start_grad_sync = self._adding_first(group.start_grad_sync)

    def zero_grad_buffer(self) -> None:
        self._waiting.clear()  # left over from an interrupted pass
        super().zero_grad_buffer()

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        at_once = super()._make_backward_post_hook(param)
        if param.ndim != 1:
            return at_once

        def hook(*unused: Any) -> None:
            gradient = param.grad
            if gradient is None or param.grad_added_to_main_grad:  # type: ignore[attr-defined]
                at_once(*unused)
                return
            if param in self._waiting:
                self._add_waiting()
            if not self._waiting:
                torch.autograd.Variable._execution_engine.queue_callback(self._add_waiting)
            self._waiting[param] = gradient
            param.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # as far as megatron-core's own hook is concerned
            at_once(*unused)
            param.grad_added_to_main_grad = False  # type: ignore[attr-defined]

        return hook

    def _adding_first(self, start_grad_sync: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(start_grad_sync)
        def start(*args: Any, **kwargs: Any) -> Any:
            self._add_waiting()
            return start_grad_sync(*args, **kwargs)

        return start

    def _add_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        _add((param.main_grad, gradient) for param, gradient in waiting.items())  # type: ignore[attr-defined]

    # ------------------------------------------- what hooks do for modules that autograd sees, for a module that runs as a CUDA graph

    def wait_for_weights(self, module: torch.nn.Module) -> None:
        """Wait until all weights of a module are gathered, if they are gathered while the model runs."""
        if self.use_forward_hook and self.remove_forward_pre_hook_handles:
            wait = self._make_forward_pre_hook()
            for part in module.modules():
                wait(part)

    def add_gradients(self, outputs: torch.Tensor, gradient: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Run the backward pass from `outputs`, whose gradient is `gradient`, to the parameters, and add their gradients to their buffers.
        No reduction begins.

        Raises RuntimeError if the outputs do not depend on one of the parameters.
        """
        for parameter in parameters:
            parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        found = torch.autograd.grad(outputs, parameters, gradient)
        pairs = [
            (parameter, value)
            for parameter, value in zip(parameters, found, strict=True)
            if not parameter.grad_added_to_main_grad or getattr(parameter, "zero_out_wgrad", False)  # type: ignore[attr-defined]
        ]
        for parameter, value in pairs:
            if parameter.ndim != 1:
                parameter.main_grad.add_(value)  # type: ignore[attr-defined]
        _add((parameter.main_grad, value) for parameter, value in pairs if parameter.ndim == 1)  # type: ignore[attr-defined]

    def note_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Note that this micro-batch's gradients of the parameters are in their buffers. In the last one, complete buckets are reduced."""
        if self.ddp_config.overlap_grad_reduce:
            for parameter in parameters:
                self.param_to_bucket_group[parameter].register_grad_ready(parameter, self.force_all_reduce)


def install() -> None:
    """Make distributed optimizers copy their master weights to the model together; does nothing when called again."""
    if not hasattr(DistributedOptimizer._copy_main_params_to_model_params, "one_by_one"):
        DistributedOptimizer._copy_main_params_to_model_params = _copying_together(DistributedOptimizer._copy_main_params_to_model_params)


def _copying_together(one_by_one: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(one_by_one)
    def together(self: Any) -> None:
        ddp = self.ddp_config
        quantized = ddp.fp8_param_gather or getattr(ddp, "fp4_param_gather", False)
        if self.is_stub_optimizer or ddp.use_megatron_fsdp or quantized or self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            one_by_one(self)
            return
        if not hasattr(self, "_copied_together"):
            self._copied_together = _alike(_weights_and_masters(self))  # views, whose memory does not move during a run
        for weights, masters in self._copied_together:
            torch._foreach_copy_(weights, masters)

    together.one_by_one = one_by_one  # type: ignore[attr-defined]
    return together


def _weights_and_masters(optimizer: Any) -> Iterable[Pair]:
    """This process's part of each parameter in the buffer of weights, and its master weights: [elements] each."""
    groups = [
        *zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True),
        *zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True),
    ]
    for parameters, masters in groups:
        for parameter, master in zip(parameters, masters, strict=True):
            run = optimizer._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
            buffer, _, bucket = optimizer.model_param_gbuf_map[parameter]
            weights = optimizer.buffers[buffer].buckets[bucket].param_data.view(-1)[run.start : run.end]
            assert weights.numel() == master.numel()
            yield weights.detach(), master.detach().view(-1)


def _add(pairs: Iterable[Pair]) -> None:
    """Add the second tensor of each pair to the first one, in which the sum stays."""
    for sums, gradients in _alike(pairs):
        if gradients[0].dtype is not sums[0].dtype:
            sizes = [gradient.numel() for gradient in gradients]
            cast = torch.empty(sum(sizes), dtype=sums[0].dtype, device=sums[0].device).split(sizes)
            torch._foreach_copy_(cast, gradients)
            gradients = list(cast)
        torch._foreach_add_(sums, gradients)


def _alike(pairs: Iterable[Pair]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """First and second tensors of the pairs, grouped by their types: one operation takes tensors of the same types."""
    found: dict[tuple[torch.dtype, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for one, other in pairs:
        ones, others = found[one.dtype, other.dtype]
        ones.append(one)
        others.append(other)
    return list(found.values())
