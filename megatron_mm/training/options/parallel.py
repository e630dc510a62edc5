"""Options of tensor and expert parallelism."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config import Experiment
from megatron_mm.families.registry import family_of
from megatron_mm.models.layers import Backend
from megatron_mm.parallel.nodes import expert_traffic, nodes_of_expert_group
from megatron_mm.training.machine import Machine
from megatron_mm.training.options.frozen import frozen_in_decoder
from megatron_mm.training.options.option import Option


def parallel_options(experiment: Experiment, *, backend: Backend, machine: Machine, world_size: int) -> Iterator[Option]:
    """Yield the options of tensor and expert parallelism that differ from their defaults."""
    yield from _sequence(experiment)
    yield from _overlap(experiment, backend=backend, machine=machine)
    yield from _experts(experiment, machine=machine, world_size=world_size)
    yield from _dispatch(experiment, machine=machine)
    yield from _expert_overlap(experiment, backend=backend, machine=machine)


def _overlap(experiment: Experiment, *, backend: Backend, machine: Machine) -> Iterator[Option]:
    if not experiment.parallel.overlap_tensor:
        return
    useless = "" if experiment.parallel.sequence_parallel else "sequences are not split across tensor-parallel processes"
    yield Option(
        "parallel.overlap_tensor",
        True,
        impossible="" if useless else _overlap_impossible(experiment, backend=backend, machine=machine),
        useless=useless,
        costs="micro-batches are padded to full sequences; the computation on padding (1 - `fill` in metrics.jsonl) is wasted",
    )


def _sequence(experiment: Experiment) -> Iterator[Option]:
    parallel = experiment.parallel
    if parallel.sequence and parallel.tensor == 1:
        yield Option("parallel.sequence", True, useless="parallel.tensor is 1, so no processes share a sequence")


def _overlap_impossible(experiment: Experiment, *, backend: Backend, machine: Machine) -> str:
    parallel, gpus = experiment.parallel, machine.gpus_per_node()
    if backend != "te":
        return "user buffers need Transformer Engine, but layers are plain PyTorch here: leave it out"
    if not family_of(experiment.model).plain_layers or experiment.model.decoder.moe is not None:
        return "this model's layers also exchange other numbers of tokens than a micro-batch has: leave it out"
    if gpus is not None and gpus % parallel.tensor:
        return f"tensor-parallel groups of {parallel.tensor} span several nodes of {gpus} GPUs: use a divisor of {gpus}"
    if experiment.train.precision == "fp8" and experiment.precision.fp8_recipe not in ("tensorwise", "delayed"):
        return (
            f"user buffers hold FP8 with one scale per tensor, not {experiment.precision.fp8_recipe}: use --precision.fp8-recipe tensorwise"
        )
    if experiment.eval.interval and experiment.eval.samples:
        return "captions of held-out images are generated token by token, with other sizes: use --eval.samples 0"
    return machine.user_buffers_missing()


def _experts(experiment: Experiment, *, machine: Machine, world_size: int) -> Iterator[Option]:
    parallel, gpus = experiment.parallel, machine.gpus_per_node()
    nodes = 1 if gpus is None else nodes_of_expert_group(parallel, world_size=world_size, gpus=gpus)
    if experiment.model.decoder.moe is not None and gpus is not None and nodes > 1:
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


def _dispatch(experiment: Experiment, *, machine: Machine) -> Iterator[Option]:
    parallel = experiment.parallel
    if parallel.expert_dispatch == "alltoall":
        return
    useless = _no_exchange(experiment, degree=parallel.expert * parallel.expert_tensor)
    yield Option(
        "parallel.expert_dispatch",
        parallel.expert_dispatch,
        impossible="" if useless else machine.dispatch_missing(parallel.expert_dispatch),
        useless=useless,
    )


def _no_exchange(experiment: Experiment, *, degree: int) -> str:
    """Return why tokens are not sent to experts on other processes; empty if they are."""
    if experiment.model.decoder.moe is None:
        return "the model has no experts"
    return "every process has all experts, so no tokens are sent" if degree == 1 else ""


def _expert_overlap(experiment: Experiment, *, backend: Backend, machine: Machine) -> Iterator[Option]:
    parallel = experiment.parallel
    if parallel.overlap_experts:
        useless = _no_exchange(experiment, degree=parallel.expert)
        yield Option(
            "parallel.overlap_experts",
            True,
            impossible="" if useless else _expert_overlap_impossible(experiment, machine=machine),
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
            impossible="" if useless else frozen_in_decoder(experiment, "which have no gradients to delay: leave it out"),
            useless=useless,
        )


def _expert_overlap_impossible(experiment: Experiment, *, machine: Machine) -> str:
    parallel, decoder, precision = experiment.parallel, experiment.model.decoder, experiment.train.precision
    if precision == "fp32":
        return "megatron-core overlaps only in bf16 and FP8: use --train.precision bf16"
    if parallel.pipeline > 1 and parallel.virtual == 1:
        return f"with parallel.pipeline {parallel.pipeline} it needs an interleaved schedule: use --parallel.virtual 2"
    if parallel.recompute == "full" or (parallel.recompute == "selective" and "moe" in parallel.recompute_modules):
        return "recomputed layers cannot be split into parts: use --parallel.recompute none"
    if decoder.num_layers - 1 not in decoder.sparse_layers:
        return "the last layer has no experts, and megatron-core would then omit the final norm: change moe.every_n_layers"
    if machine.serialises_streams():
        return "CUDA_DEVICE_MAX_CONNECTIONS is 1, which makes the kernels of all streams wait for each other: set it to 32"
    return ""
