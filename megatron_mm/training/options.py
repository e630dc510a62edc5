"""Checks, before a run starts, the options that only some machines, layouts or models support.

An option that cannot be used is an error. An option that would have no effect, or that gives up a guarantee of the run, causes a warning.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mm.config import EvaConfig, Experiment
from megatron_mm.families.registry import family_of
from megatron_mm.models.layers import Backend
from megatron_mm.models.vision import TOWER_MODULES
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.nodes import expert_traffic, gpus_per_node, nodes_of_expert_group
from megatron_mm.parallel.stages import most_in_flight
from megatron_mm.platform.device import dispatch_missing, fp8_recipe_missing, has_flash_attention, user_buffers_missing
from megatron_mm.training.freezing import trainable_patterns

logger = logging.getLogger(__name__)

FP8_WEIGHT_RECIPES = ("tensorwise", "blockwise")
"""FP8 recipes with which weights may be stored in FP8. The others are excluded: scales of earlier steps (delayed) are in no checkpoint, and
scales per 32 values (mxfp8) would need another way of gathering weights."""


@dataclass(frozen=True)
class Option:
    """An option that was requested, and the objections to it."""

    name: str
    value: Any
    impossible: str = ""
    """Why it cannot run here, and the remedy; empty if it can."""
    useless: str = ""
    """Why it has no effect here; empty if it has."""
    costs: str = ""
    """Its drawbacks; empty if it has none."""


def check_options(experiment: Experiment, *, backend: Backend, warn: bool = True) -> None:
    """Raise ValueError for an option that cannot run on this layer backend; warn of options without effect and of drawbacks."""
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
    """Yield the options that differ from their defaults."""
    yield from _overlap(experiment, backend=backend)
    yield from _recompute(experiment, backend=backend)
    yield from _experts(experiment)
    yield from _dispatch(experiment, backend=backend)
    yield from _expert_overlap(experiment, backend=backend)
    yield from _precision(experiment, backend=backend)
    yield from _tower_graph(experiment)
    yield from _router_graph(experiment)
    yield from _deterministic(experiment, backend=backend)
    yield from _warm_up(experiment)
    yield from _image_size(experiment)


def _deterministic(experiment: Experiment, *, backend: Backend) -> Iterator[Option]:
    if experiment.train.deterministic and backend == "te" and not has_flash_attention():
        costs = "attention over packed documents runs in PyTorch, document by document, which is slower; flash-attn would be faster"
        yield Option("train.deterministic", True, costs=costs)


def _warm_up(experiment: Experiment) -> Iterator[Option]:
    warm_up, end = experiment.optimizer.warmup_steps, experiment.train.schedule_steps
    if experiment.optimizer.decay == "cosine" and warm_up >= end:
        costs = f"train.schedule_steps is {end}, so the learning rate would fall to min_lr right after the warm-up; change one of them"
        yield Option("optimizer.warmup_steps", warm_up, costs=costs)


def _image_size(experiment: Experiment) -> Iterator[Option]:
    vision = getattr(experiment.model, "vision", None)
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))  # other towers may have no patches
    if size and patch and (rest := size % patch):
        costs = f"it is no multiple of patch_size {patch}, so the tower never sees the last {rest} pixels of rows and columns"
        yield Option("model.vision.image_size", size, costs=costs)


def _overlap(experiment: Experiment, *, backend: Backend) -> Iterator[Option]:
    if not experiment.parallel.overlap_tensor:
        return
    useless = "" if experiment.parallel.sequence_parallel else "sequences are not split across tensor-parallel processes"
    yield Option(
        "parallel.overlap_tensor",
        True,
        impossible="" if useless else _overlap_impossible(experiment, backend=backend),
        useless=useless,
        costs="micro-batches are padded to full sequences; the computation on padding (1 - `fill` in metrics.jsonl) is wasted",
    )


def _overlap_impossible(experiment: Experiment, *, backend: Backend) -> str:
    parallel, gpus = experiment.parallel, gpus_per_node()
    if backend != "te":
        return "user buffers need Transformer Engine, but layers are plain PyTorch here: leave it out"
    if not family_of(experiment.model).plain_layers or experiment.model.decoder.moe is not None:
        return "this model's layers also exchange other numbers of tokens than a micro-batch has: leave it out"
    if gpus % parallel.tensor:
        return f"tensor-parallel groups of {parallel.tensor} span several nodes of {gpus} GPUs: use a divisor of {gpus}"
    if experiment.train.precision == "fp8" and experiment.precision.fp8_recipe not in ("tensorwise", "delayed"):
        return (
            f"user buffers hold FP8 with one scale per tensor, not {experiment.precision.fp8_recipe}: use --precision.fp8-recipe tensorwise"
        )
    if experiment.eval.interval and experiment.eval.samples:
        return "captions of held-out images are generated token by token, with other sizes: use --eval.samples 0"
    return user_buffers_missing()


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


def _experts(experiment: Experiment) -> Iterator[Option]:
    parallel = experiment.parallel
    world_size, gpus = topologies.world_size(), gpus_per_node()
    nodes = nodes_of_expert_group(parallel, world_size=world_size, gpus=gpus)
    if experiment.model.decoder.moe is not None and nodes > 1:
        yield Option("parallel.expert", parallel.expert, costs=_spread(experiment, nodes=nodes, world_size=world_size, gpus=gpus))
    if parallel.max_expert_load is not None:
        useless = ""
        if experiment.model.decoder.moe is None:
            useless = "the model has no experts"
        elif parallel.expert == 1:
            useless = "every process has all experts, so its load does not depend on the router"
        elif parallel.max_expert_load >= parallel.expert:
            useless = f"one of {parallel.expert} processes cannot receive more than {parallel.expert} equal shares"
        yield Option("parallel.max_expert_load", parallel.max_expert_load, useless=useless)


def _spread(experiment: Experiment, *, nodes: int, world_size: int, gpus: int) -> str:
    """Describe the cost of an expert group that spans several nodes, compared with the largest degree that keeps it on one node."""
    degree = experiment.parallel.expert
    within = max(d for d in range(1, degree) if degree % d == 0 and (d == 1 or gpus % (d * experiment.parallel.expert_tensor) == 0))
    here, there = (expert_traffic(experiment, expert=d, world_size=world_size, gpus=gpus) for d in (degree, within))
    sent = [
        f"{traffic.tokens / 1e9:.1f} GB of tokens and {traffic.weights / 1e9:.1f} GB of gradients and weights" for traffic in (here, there)
    ]
    return (
        f"each expert-parallel group spans {nodes} nodes of {gpus} GPUs; a step sends up to {sent[0]} per GPU over the network. With "
        f"--parallel.expert {within} on one node it would be {sent[1]}, with {(there.held - here.held) / 1e9:.1f} GB more memory per GPU"
    )


def _dispatch(experiment: Experiment, *, backend: Backend) -> Iterator[Option]:
    parallel = experiment.parallel
    if parallel.expert_dispatch == "alltoall":
        return
    useless = _no_exchange(experiment, degree=parallel.expert * parallel.expert_tensor)
    yield Option(
        "parallel.expert_dispatch",
        parallel.expert_dispatch,
        impossible="" if useless else dispatch_missing(parallel.expert_dispatch),
        useless=useless,
    )


def _no_exchange(experiment: Experiment, *, degree: int) -> str:
    """Return why tokens are not sent to experts on other processes; empty if they are."""
    if experiment.model.decoder.moe is None:
        return "the model has no experts"
    return "every process has all experts, so no tokens are sent" if degree == 1 else ""


def _expert_overlap(experiment: Experiment, *, backend: Backend) -> Iterator[Option]:
    parallel = experiment.parallel
    if parallel.overlap_experts:
        useless = _no_exchange(experiment, degree=parallel.expert)
        yield Option(
            "parallel.overlap_experts",
            True,
            impossible="" if useless else _expert_overlap_impossible(experiment),
            useless=useless,
            costs="two micro-batches are in memory instead of one",
        )
    if parallel.delay_weight_gradients:
        useless = "" if parallel.overlaps_experts else "no exchange of tokens overlaps with anything: use --parallel.overlap-experts True"
        if not useless and backend != "te":
            useless = "only Transformer Engine's layers can delay them, but layers are plain PyTorch here"
        yield Option(
            "parallel.delay_weight_gradients",
            True,
            impossible="" if useless else _frozen_in_decoder(experiment, "which have no gradients to delay: leave it out"),
            useless=useless,
        )


def _expert_overlap_impossible(experiment: Experiment) -> str:
    parallel, decoder, precision = experiment.parallel, experiment.model.decoder, experiment.train.precision
    if precision == "fp32":
        return "megatron-core overlaps only in bf16 and FP8: use --train.precision bf16"
    if parallel.pipeline > 1 and parallel.virtual == 1:
        return f"with parallel.pipeline {parallel.pipeline} it needs an interleaved schedule: use --parallel.virtual 2"
    if parallel.recompute == "full" or (parallel.recompute == "selective" and "moe" in parallel.recompute_modules):
        return "recomputed layers cannot be split into parts: use --parallel.recompute none"
    if decoder.num_layers - 1 not in decoder.sparse_layers:
        return "the last layer has no experts, and megatron-core would then omit the final norm: change moe.every_n_layers"
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if connections == "1" and torch.cuda.is_available():
        return "CUDA_DEVICE_MAX_CONNECTIONS is 1, which serialises streams: set it to 32"
    return ""


def _precision(experiment: Experiment, *, backend: Backend) -> Iterator[Option]:
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
            yield Option(f"precision.{name}", "bf16", impossible=_moments_impossible(experiment, backend=backend))
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
            impossible=fp8_recipe_missing(precision.fp8_recipe) if backend == "te" and train.precision == "fp8" else "",
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
    return _frozen_in_decoder(experiment, "for which the optimizer has no master weights to save: leave it out")


def _frozen_in_decoder(experiment: Experiment, consequence: str) -> str:
    """Return why an option cannot be used with this freeze policy; empty if it freezes no weight of the decoder."""
    patterns = trainable_patterns(experiment)
    if all(any(re.match(pattern, name) for pattern in patterns) for name in _OF_THE_DECODER):
        return ""
    return f"freeze policy {experiment.train.freeze_policy!r} freezes weights of the decoder, {consequence}"


_OF_THE_DECODER = tuple(f"language.decoder.layers.0.{name}.weight" for name in ("self_attention.linear_qkv", "mlp.text.linear_fc1"))


def _moments_impossible(experiment: Experiment, *, backend: Backend) -> str:
    if backend != "te" or importlib.util.find_spec("transformer_engine") is None:
        return "only Transformer Engine's Adam keeps moments in bf16, but layers are plain PyTorch here: leave it out"
    if not experiment.parallel.distributed_optimizer:
        return "only the distributed optimizer keeps moments in bf16: use --parallel.distributed-optimizer True"
    return ""


def _tower_graph(experiment: Experiment) -> Iterator[Option]:
    images = experiment.kernels.tower_graph
    if images is not None:
        yield Option(
            "kernels.tower_graph",
            images,
            impossible=_tower_graph_impossible(experiment),
            costs=_tower_graph_costs(experiment, images),
        )


def _tower_graph_costs(experiment: Experiment, images: int) -> str:
    blanks = (
        f"each process fills up the images of a micro-batch with blank ones to {{}}{images}; the computation on these (`tower_blanks` in "
    )
    blanks += "metrics.jsonl) is wasted"
    if not _trains_tower(experiment):
        return f"{blanks.format('a multiple of ')}. At the start, replays are compared with the tower"
    return (
        f"{blanks.format('')}, and micro-batches with more images run without the graph. Activations of {images} images are kept for "
        f"{most_in_flight(experiment.parallel)} micro-batches. This is untried on GPUs; at the start, replays are compared with the tower"
    )


def _trains_tower(experiment: Experiment) -> bool:
    return any(map(family_of(experiment.model).trainable(experiment.train.freeze_policy), _tower_parameters(experiment)))


def _tower_graph_impossible(experiment: Experiment) -> str:
    family, parallel = family_of(experiment.model), experiment.parallel
    recompute = parallel.recompute_encoder or parallel.recompute
    if not torch.cuda.is_available():
        return "CUDA graphs need a GPU: leave it out"
    if not family.spreads_encoder:
        return f"{family.name} models have no image tower apart from the first stage: leave it out"
    if _trains_tower(experiment) and parallel.spread_encoder:
        return (
            f"freeze policy {experiment.train.freeze_policy!r} trains the image tower, and --parallel.spread-encoder encodes many images "
            "at once, for which a graph is not faster: leave it out"
        )
    if _trains_tower(experiment) and recompute != "none":
        return f"the tower is recomputed ({recompute}), and a graph keeps its activations: use --parallel.recompute-encoder none"
    if recompute != "none" and not isinstance(getattr(experiment.model, "vision", None), EvaConfig):
        return f"the tower is recomputed ({recompute}), which saves nothing if it is frozen: use --parallel.recompute-encoder none"
    return ""


def _router_graph(experiment: Experiment) -> Iterator[Option]:
    if experiment.kernels.router_graph:
        useless = "the model has no experts" if experiment.model.decoder.moe is None else ""
        yield Option(
            "kernels.router_graph",
            True,
            impossible="" if useless else _router_graph_impossible(experiment),
            useless=useless,
            costs="each router keeps memory for every micro-batch that waits for its backward pass, for as long as the run lasts. This is "
            "untried on GPUs; at the start, replays are compared with the routers",
        )


def _router_graph_impossible(experiment: Experiment) -> str:
    parallel, moe = experiment.parallel, experiment.model.decoder.moe
    if not torch.cuda.is_available():
        return "CUDA graphs need a GPU: leave it out"
    if moe is not None and moe.capacity_factor is not None:
        return (
            f"the experts' capacity (moe.capacity_factor {moe.capacity_factor}) depends on each micro-batch's tokens: leave one of them out"
        )
    if parallel.recompute == "full" or (parallel.recompute == "selective" and "moe" in parallel.recompute_modules):
        return "layers with experts are recomputed, and the first of their two forward passes would run without a graph: leave it out"
    return ""


def _tower_parameters(experiment: Experiment) -> list[str]:
    """Return the names of the image tower's parameters, as far as they are known without building it; `graph_tower` checks them all."""
    family = family_of(experiment.model)
    try:
        table = family.table(experiment.model)
    except ValueError:  # it has no Hugging Face model
        return []
    return [entry.ours for entry in table if family.part_of(entry.ours) == "tower"]
