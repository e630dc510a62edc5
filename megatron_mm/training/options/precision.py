"""Options of number formats."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config import Experiment
from megatron_mm.models.layers import Backend
from megatron_mm.training.machine import Machine
from megatron_mm.training.options.frozen import frozen_in_decoder
from megatron_mm.training.options.option import Option

FP8_WEIGHT_RECIPES = ("tensorwise", "blockwise")
"""FP8 recipes with which weights may be stored in FP8. The others are excluded: scales of earlier steps (delayed) are in no checkpoint, and
scales per 32 values (mxfp8) would need another way of gathering weights."""


def precision_options(experiment: Experiment, *, backend: Backend, machine: Machine) -> Iterator[Option]:
    """Yield the options of number formats that differ from their defaults."""
    precision, train = experiment.precision, experiment.train
    if precision.gradients == "bf16":
        useless = "gradients of fp32 weights are fp32" if train.precision == "fp32" else ""
        yield Option(
            "precision.gradients",
            "bf16",
            useless=useless,
            costs="every sum of gradients is rounded to 8 significant bits; compare a loss curve with fp32",
        )
    for name in ("exp_avg", "exp_avg_sq"):
        if getattr(precision, name) == "bf16":
            yield Option(f"precision.{name}", "bf16", impossible=_moments_impossible(experiment, backend=backend, machine=machine))
    if precision.fp8_weights:
        yield Option(
            "precision.fp8_weights",
            True,
            impossible=_fp8_weights_impossible(experiment) if train.precision == "fp8" else "",
            useless="" if train.precision == "fp8" else f"train.precision is {train.precision}",
            costs="checkpoints hold the rounded weights in addition to the master weights: a resume is exact, an export has rounded ones",
        )
    if precision.fp8_recipe != "tensorwise":
        yield Option(
            "precision.fp8_recipe",
            precision.fp8_recipe,
            impossible=machine.fp8_recipe_missing(precision.fp8_recipe) if backend == "te" and train.precision == "fp8" else "",
            useless="" if train.precision == "fp8" else f"train.precision is {train.precision}",
            costs="checkpoints do not hold the scales of earlier steps, so a resume is not bit-identical"
            if precision.fp8_recipe == "delayed"
            else "",
        )


def _fp8_weights_impossible(experiment: Experiment) -> str:
    if not experiment.parallel.distributed_optimizer:
        return "only the distributed optimizer can make FP8 weights from its master weights: use --parallel.distributed-optimizer True"
    if experiment.precision.fp8_recipe not in FP8_WEIGHT_RECIPES:
        return f"weights cannot be kept in the recipe {experiment.precision.fp8_recipe}: use --precision.fp8-recipe tensorwise"
    return frozen_in_decoder(experiment, "for which the optimizer has no master weights to save: leave it out")


def _moments_impossible(experiment: Experiment, *, backend: Backend, machine: Machine) -> str:
    if backend != "te" or not machine.has("transformer_engine"):
        return "only Transformer Engine's Adam keeps moments in bf16, but layers are plain PyTorch here: leave it out"
    if not experiment.parallel.distributed_optimizer:
        return "only the distributed optimizer keeps moments in bf16: use --parallel.distributed-optimizer True"
    return ""
