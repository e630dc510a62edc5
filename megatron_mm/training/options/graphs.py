"""Options of CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config import EvaConfig, Experiment
from megatron_mm.families.registry import family_of
from megatron_mm.parallel.stages import most_in_flight
from megatron_mm.training.machine import Machine
from megatron_mm.training.options.option import Option


def graph_options(experiment: Experiment, *, machine: Machine) -> Iterator[Option]:
    """Yield the options of CUDA graphs that differ from their defaults."""
    yield from _tower_graph(experiment, machine=machine)
    yield from _router_graph(experiment, machine=machine)


def _tower_graph(experiment: Experiment, *, machine: Machine) -> Iterator[Option]:
    images = experiment.kernels.tower_graph
    if images is not None:
        yield Option(
            "kernels.tower_graph",
            images,
            impossible=_tower_graph_impossible(experiment, machine=machine),
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


def _tower_graph_impossible(experiment: Experiment, *, machine: Machine) -> str:
    family, parallel = family_of(experiment.model), experiment.parallel
    recompute = parallel.recompute_encoder or parallel.recompute
    if not machine.has_gpus():
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


def _router_graph(experiment: Experiment, *, machine: Machine) -> Iterator[Option]:
    if experiment.kernels.router_graph:
        useless = "the model has no experts" if experiment.model.decoder.moe is None else ""
        yield Option(
            "kernels.router_graph",
            True,
            impossible="" if useless else _router_graph_impossible(experiment, machine=machine),
            useless=useless,
            costs="each router keeps memory for every micro-batch that waits for its backward pass, for as long as the run lasts. This is "
            "untried on GPUs; at the start, replays are compared with the routers",
        )


def _router_graph_impossible(experiment: Experiment, *, machine: Machine) -> str:
    parallel, moe = experiment.parallel, experiment.model.decoder.moe
    if not machine.has_gpus():
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
