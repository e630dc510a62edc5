"""Options of recompute."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config import EvaConfig, Experiment
from megatron_mm.families.registry import family_of
from megatron_mm.models.layers import Backend
from megatron_mm.models.vision import TOWER_MODULES
from megatron_mm.training.machine import Machine
from megatron_mm.training.options.option import Option


def recompute_options(experiment: Experiment, *, backend: Backend, machine: Machine) -> Iterator[Option]:
    """Yield the options of recompute that differ from their defaults."""
    parallel, moe = experiment.parallel, experiment.model.decoder.moe
    yield from _attention_core(experiment, backend=backend, machine=machine)
    yield from _no_tower(experiment)
    for part, kind, modules in (
        ("decoder", parallel.recompute, parallel.recompute_modules),
        ("tower", parallel.recompute_encoder or parallel.recompute, parallel.recompute_encoder_modules or ()),
    ):
        name = "parallel.recompute_modules" if part == "decoder" else "parallel.recompute_encoder_modules"
        if modules in ((), ("core_attn",)):
            continue
        if part == "tower" and (missing := _tower_missing(experiment)):
            yield Option(name, modules, useless=missing)
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


def _attention_core(experiment: Experiment, *, backend: Backend, machine: Machine) -> Iterator[Option]:
    """Yield selective recompute of the attention core where attention is fused. Deterministic runs may attend in PyTorch."""
    parallel = experiment.parallel
    if backend != "te" or (experiment.train.deterministic and not machine.has("flash_attn")):
        return
    costs = (
        "it recomputes core_attn, but Transformer Engine's fused attention stores only its inputs, output and a statistic. This saves no "
        "memory and takes time: "
    )
    if parallel.recompute == "selective" and "core_attn" in parallel.recompute_modules:
        remedy = "use --parallel.recompute none, full, or selective with other --parallel.recompute-modules"
        yield Option("parallel.recompute", "selective", costs=costs + remedy)
    if parallel.recompute_encoder == "selective" and not _tower_missing(experiment):
        modules = parallel.recompute_encoder_modules or parallel.recompute_modules
        if "core_attn" in modules:
            remedy = "use --parallel.recompute-encoder none, full, or selective with other --parallel.recompute-encoder-modules"
            yield Option("parallel.recompute_encoder", "selective", costs=costs + remedy)


def _no_tower(experiment: Experiment) -> Iterator[Option]:
    kind, missing = experiment.parallel.recompute_encoder, _tower_missing(experiment)
    if kind not in (None, "none") and missing:
        yield Option("parallel.recompute_encoder", kind, useless=missing)


def _tower_missing(experiment: Experiment) -> str:
    """Return why nothing of an image tower can be recomputed; empty if it can."""
    family, tower = family_of(experiment.model), getattr(experiment.model, "vision", None)
    if tower is None and not family.spreads_encoder:
        return f"{family.name} models have no image tower"
    return "EVA towers do not train and keep no activations" if isinstance(tower, EvaConfig) else ""


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
