"""Options that only some machines, layouts or models can take, held against what is there before a run starts.

An option that cannot run is an error. One that would change nothing is said in a warning, and so is one that costs a property of the run.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_mm.config import Experiment
from megatron_mm.models.layers import Backend
from megatron_mm.models.vision import TOWER_MODULES
from megatron_mm.platform.device import fp8_recipe_missing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Option:
    """An option that was asked for, and what is against it."""

    name: str
    value: Any
    impossible: str = ""
    """Why it cannot run here, and what to do; empty where it can."""
    useless: str = ""
    """Why it changes nothing here; empty where it does."""
    costs: str = ""
    """What is lost with it; empty where nothing is."""


def check_options(experiment: Experiment, *, backend: Backend, warn: bool = True) -> None:
    """Raise ValueError for an option that cannot run on this layer backend; warn of one without effect, and of what one costs."""
    options = list(asked_for(experiment, backend=backend))
    for option in options:
        if option.impossible:
            raise ValueError(f"{option.name} is {option.value}, but {option.impossible}")
    for option in options if warn else ():
        if option.useless:
            logger.warning("%s is %s and has no effect: %s", option.name, option.value, option.useless)
        elif option.costs:
            logger.warning("%s is %s: %s", option.name, option.value, option.costs)


def asked_for(experiment: Experiment, *, backend: Backend) -> Iterator[Option]:
    """The options that differ from their defaults, in the order of the configuration."""
    yield from _recompute(experiment, backend=backend)
    yield from _experts(experiment)
    yield from _precision(experiment, backend=backend)


def _recompute(experiment: Experiment, *, backend: Backend) -> Iterator[Option]:
    parallel, moe = experiment.parallel, experiment.model.decoder.moe
    for part, kind, modules in (
        ("decoder", parallel.recompute, parallel.recompute_modules),
        ("tower", parallel.recompute_encoder or parallel.recompute, parallel.recompute_encoder_modules or ()),
    ):
        name = "parallel.recompute_modules" if part == "decoder" else "parallel.recompute_encoder_modules"
        if modules in ((), ("core_attn",)):
            continue
        kind_name = "parallel.recompute" if part == "decoder" else "parallel.recompute_encoder"
        if kind != "selective":
            yield Option(name, modules, useless=f"{kind_name} is {kind}: set it to selective")
            continue
        for module in modules:
            yield Option(
                name,
                module,
                impossible=_recompute_impossible(experiment, module, backend=backend) if part == "decoder" else "",
                useless=_recompute_useless(module, part=part, sparse=moe is not None, backend=backend),
            )


def _recompute_impossible(experiment: Experiment, module: str, *, backend: Backend) -> str:
    if module == "moe_act" and experiment.model.decoder.moe is not None and backend != "te":
        return "it is a part of Transformer Engine's grouped experts, and layers are plain PyTorch here: name moe in its place"
    delayed = experiment.train.precision == "fp8" and experiment.precision.fp8_recipe == "delayed"
    if module in ("layernorm", "moe_act") and delayed:
        return "FP8 with delayed scales cannot compute it again: use --precision.fp8-recipe tensorwise"
    return ""


def _recompute_useless(module: str, *, part: str, sparse: bool, backend: Backend) -> str:
    if part == "tower" and module not in TOWER_MODULES:
        return "image towers have no experts"
    if module in ("moe", "moe_act") and not sparse:
        return "the model has no experts"
    if module == "layernorm" and backend == "te" and (part == "tower" or not sparse):
        return "Transformer Engine's layers compute norms inside their matrix products and keep no output of them"
    return ""


def _experts(experiment: Experiment) -> Iterator[Option]:
    parallel = experiment.parallel
    if parallel.max_expert_load is not None:
        useless = ""
        if experiment.model.decoder.moe is None:
            useless = "the model has no experts"
        elif parallel.expert == 1:
            useless = "every process has all experts, and works on as many choices whatever the router does"
        elif parallel.max_expert_load >= parallel.expert:
            useless = f"one of {parallel.expert} processes cannot receive more than {parallel.expert} equal shares"
        yield Option("parallel.max_expert_load", parallel.max_expert_load, useless=useless)


def _precision(experiment: Experiment, *, backend: Backend) -> Iterator[Option]:
    precision, train = experiment.precision, experiment.train
    if precision.gradients == "bf16":
        useless = "gradients of fp32 weights are fp32" if train.precision == "fp32" else ""
        yield Option(
            "precision.gradients",
            "bf16",
            useless=useless,
            costs="every sum of gradients is rounded to 8 bits; compare a loss curve with fp32",
        )
    for name in ("exp_avg", "exp_avg_sq"):
        if getattr(precision, name) == "bf16":
            yield Option(f"precision.{name}", "bf16", impossible=_moments_impossible(experiment, backend=backend))
    if precision.fp8_recipe != "tensorwise":
        yield Option(
            "precision.fp8_recipe",
            precision.fp8_recipe,
            impossible=fp8_recipe_missing(precision.fp8_recipe) if backend == "te" and train.precision == "fp8" else "",
            useless="" if train.precision == "fp8" else f"train.precision is {train.precision}",
            costs="checkpoints hold no scales of earlier steps, so a resume is not bit-identical"
            if precision.fp8_recipe == "delayed"
            else "",
        )


def _moments_impossible(experiment: Experiment, *, backend: Backend) -> str:
    if backend != "te" or importlib.util.find_spec("transformer_engine") is None:
        return "only Transformer Engine's Adam keeps moments in bf16, and layers are plain PyTorch here: leave it out"
    if not experiment.parallel.distributed_optimizer:
        return "only the distributed optimizer keeps moments in bf16: use --parallel.distributed-optimizer True"
    return ""
