"""AdamW over the chunks of this process, the learning-rate schedule, and one guarded update."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, clip_grads, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_mm.config import Experiment, OptimizerConfig, PrecisionConfig
from megatron_mm.parallel.topology import replicated_groups
from megatron_mm.platform import adam, engine, multi_tensor
from megatron_mm.training.spread_encoder import spread_encoder


@dataclass(frozen=True)
class Update:
    """The result of one optimizer step."""

    grad_norm: float
    """Norm of the whole gradient before clipping; not finite if the step was skipped."""
    skipped: bool
    """True if the gradient was not finite, so no weight changed on any process."""


def learning_rate(step: int, config: OptimizerConfig, *, schedule_steps: int) -> float:
    """Return the learning rate of step 1, 2, ...: linear warm-up to the peak, then cosine to min_lr at schedule_steps, or constant.

    >>> config = OptimizerConfig(peak_lr=1.0, min_lr=0.1, warmup_steps=10)
    >>> [round(learning_rate(s, config, schedule_steps=110), 3) for s in (1, 10, 60, 110, 500)]
    [0.1, 1.0, 0.55, 0.1, 0.1]
    """
    if step <= config.warmup_steps:
        return config.peak_lr * step / config.warmup_steps
    if config.decay == "constant":
        return config.peak_lr
    done = min(1.0, (step - config.warmup_steps) / max(1, schedule_steps - config.warmup_steps))
    return config.min_lr + 0.5 * (config.peak_lr - config.min_lr) * (1.0 + math.cos(math.pi * done))


def build_optimizer(experiment: Experiment, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build megatron-core's optimizer, with fp32 master weights, sharded over data parallelism if the experiment requests it."""
    adam.install()
    multi_tensor.install()
    config = experiment.optimizer
    low_precision = experiment.train.precision != "fp32"
    settings = MegatronOptimizerConfig(
        **_moments(experiment.precision),
        optimizer="adam",
        lr=config.peak_lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad_norm,
        bf16=low_precision,
        params_dtype=torch.bfloat16 if low_precision else torch.float32,
        use_distributed_optimizer=experiment.parallel.distributed_optimizer,
        overlap_param_gather=model[0].ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(settings, model, use_gloo_process_groups=False)
    spread = spread_encoder(model)
    if spread is None or not spread.trained:
        return optimizer
    encoder = get_megatron_optimizer(
        replace(settings, overlap_param_gather=False), [spread.wrapped], use_gloo_process_groups=False, pg_collection=replicated_groups()
    )
    beside = engine.parts_of(encoder)
    for part in beside:
        part.beside_pipeline = True  # read by training.checkpoint.optimizer_state
    return ChainedOptimizer([*engine.parts_of(optimizer), *beside])


def _moments(precision: PrecisionConfig) -> dict[str, Any]:
    """Return megatron-core's options for the formats of Adam's moments; empty if both are fp32.

    Setting `fp8_recipe`, to any value, makes megatron-core keep the master weights itself and leave gradients in place. Otherwise
    Transformer Engine's Adam would keep 16-bit remainders of weights in its own state, from which no other optimizer could resume.
    """
    if not precision.low_precision_moments:
        return {}
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": formats[precision.exp_avg],
        "exp_avg_sq_dtype": formats[precision.exp_avg_sq],
        "fp8_recipe": "tensorwise",
    }


@torch.no_grad()
def initialize_state(optimizer: MegatronOptimizer) -> None:
    """Create the state (zeros) of an optimizer that has not stepped yet, so that it can be written to a checkpoint of step 0.

    The first step creates the state, so this takes a step with a learning rate of 0, which changes no weight.
    """
    for part in engine.parts_of(optimizer):
        groups = part.optimizer.param_groups
        before = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            group["lr"] = group["weight_decay"] = 0.0
            for parameter in group["params"]:
                if parameter.numel():
                    parameter.grad = torch.zeros_like(parameter)
        part.optimizer.step()
        part.optimizer.zero_grad()
        for group, (lr, weight_decay) in zip(groups, before, strict=True):
            group["lr"], group["weight_decay"], group["step"] = lr, weight_decay, 0


@torch.no_grad()
def squared_grad_norm(optimizer: MegatronOptimizer, *, device: torch.device) -> torch.Tensor:
    """Return this process's part of the squared gradient norm, [] float64 on its device; the sum over all processes is the whole.

    If several processes have the same gradients (data parallelism without a distributed optimizer), each counts its share. Nothing here
    waits for the device.
    """
    optimizer.prepare_grads()
    total = torch.zeros([], dtype=torch.float64, device=device)
    for part in engine.parts_of(optimizer):
        grads = engine.gradients_for_norm(part)
        if grads:
            overflow = torch.zeros(1, dtype=torch.int, device=grads[0].device)
            norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [grads], False)
            copies = dist.get_world_size() // part.get_grad_stats_parallel_group().size()
            total += norm.double().square().reshape([]) / copies
    return total


@torch.no_grad()
def update(optimizer: MegatronOptimizer, *, grad_norm: float, lr: float, weight_decay: float, clip_grad_norm: float) -> Update:
    """Clip and step, or skip the step on all processes if the gradient is not finite on any of them.

    Args:
        grad_norm: norm of the whole gradient, the same on all processes; a single NaN or infinity makes it not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["wd_mult"]
    if not math.isfinite(grad_norm):
        return Update(grad_norm=grad_norm, skipped=True)
    if clip_grad_norm > 0:
        for part in engine.parts_of(optimizer):
            parameters = part.get_parameters()
            if parameters:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, torch.tensor(grad_norm))
    engine.step_and_gather(optimizer)
    return Update(grad_norm=grad_norm, skipped=False)
