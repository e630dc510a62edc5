"""Options of recompute."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config import Experiment
from megatron_mm.models.layers import Backend
from megatron_mm.models.vision import TOWER_MODULES
from megatron_mm.training.options.option import Option


def recompute_options(experiment: Experiment, *, backend: Backend) -> Iterator[Option]:
    """Yield the options of recompute that differ from their defaults."""
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
        return "it is part of Transformer Engine's grouped experts, but layers are plain PyTorch here: use moe instead"
    delayed = experiment.train.precision == "fp8" and experiment.precision.fp8_recipe == "delayed"
    if module in ("layernorm", "moe_act") and delayed:
        return "FP8 with delayed scaling cannot recompute it: use --precision.fp8-recipe tensorwise"
    return ""


def _recompute_useless(module: str, *, part: str, sparse: bool, backend: Backend) -> str:
    if part == "tower" and module not in TOWER_MODULES:
        return "image towers have no experts"
    if module in ("moe", "moe_act") and not sparse:
        return "the model has no experts"
    if module == "layernorm" and backend == "te" and (part == "tower" or not sparse):
        return "Transformer Engine's layers fuse norms with their matrix products and keep no output of the norms"
    return ""
