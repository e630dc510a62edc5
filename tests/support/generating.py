"""Small models of all families that have trained for a few steps, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch

from megatron_mm.config import Experiment, MoEConfig
from megatron_mm.evaluation.generation import Generator, Prompt
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep
from support import small, small_infimm, small_mono

FAMILIES = ("mm1", "mm1_moe", "infimm", "mono_internvl")
NEW_TOKENS = 6


def experiment_of(family: str, parallel: dict[str, Any]) -> Experiment:
    if family == "infimm":
        return small_infimm.small_infimm(parallel=parallel)
    if family == "mono_internvl":
        return small_mono.small_mono(parallel=parallel)
    moe = MoEConfig(num_experts=4, every_n_layers=2, top_k=2) if family == "mm1_moe" else None
    return small.small_experiment(parallel=parallel, decoder={"num_layers": 4, "moe": moe})


def trained(family: str, parallel: dict[str, Any], *, steps: int = 3) -> tuple[Experiment, Topology, list[torch.nn.Module]]:
    """Build and train a model for a few steps: with fresh weights it would only repeat its input."""
    experiment = experiment_of(family, parallel)
    topology = topologies.initialize(experiment.parallel, seed=1)
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    random_step = {"infimm": small_infimm.infimm_step, "mono_internvl": small_mono.mono_step}.get(family, small.random_step)
    for number in range(1, steps + 1):
        step.run(random_step(experiment, topology, step=number), step=number)
    with torch.no_grad():  # gates start closed, which would hide errors in cross-attention
        for name, parameter in ((name, parameter) for chunk in model for name, parameter in chunk.named_parameters()):
            if name.endswith(("attention_gate", "ffn_gate")):
                parameter.fill_(1.0)
    return experiment, topology, model


def prompts_of(experiment: Experiment, family: str) -> list[Prompt]:
    """Return prompts of several lengths: with one image, none, two, one between texts, and one at the end."""
    generator = torch.Generator().manual_seed(0)
    if family == "infimm":
        size, image = experiment.model.vision.image_size, [small_infimm.END_OF_CHUNK_ID, small_infimm.IMAGE_ID]  # type: ignore[attr-defined]
        place = 1
    elif family == "mono_internvl":
        size = experiment.model.patches.image_size  # type: ignore[attr-defined]
        image, place = [small_mono.IMG_ID, *[small_mono.CONTEXT_ID] * small_mono.TILE_TOKENS, small_mono.END_IMG_ID], 1
    else:
        size, image, place = experiment.model.vision.image_size, [small.IMAGE_ID] * small.IMAGE_TOKENS, 0  # type: ignore[attr-defined]
    pictures = torch.randint(0, 256, (5, 3, size, size), generator=generator, dtype=torch.uint8)
    return [
        Prompt([1, *image, 20, 21], [1 + place], pictures[:1]),
        Prompt([1, 30], [], pictures[:0]),
        Prompt([1, *image, 9, *image, 8], [1 + place, 2 + len(image) + place], pictures[1:3]),
        Prompt([1, 40, 41, 42, *image, 50, 51, 52, 53, 54], [4 + place], pictures[3:4]),
        Prompt([1, *image], [1 + place], pictures[4:]),
    ]


def answers(family: str, parallel: dict[str, Any], cache: bool = True) -> dict[str, Any]:
    """Return a model's outputs for `prompts_of` by every method of generation; each data-parallel rank begins with another prompt."""
    experiment, topology, model = trained(family, parallel)
    generator = Generator(experiment, model, topology, pad_id=0, cache=cache)
    prompts = prompts_of(experiment, family)
    turn = topology.data_rank
    prompts = prompts[turn:] + prompts[:turn]
    (first,) = generator.greedy(prompts, max_new_tokens=1, end_ids=[])[-turn]
    choices = [[[7, 8, 9], [10], [11, 12]], [[13, 14]], [[7], [8]], [[9, 9, 9, 9], [10, 11]], [[60, 61]]]
    choices = choices[turn:] + choices[:turn]
    found: dict[str, list[Any]] = {
        "greedy": generator.greedy(prompts, max_new_tokens=NEW_TOKENS, end_ids=[]),
        "ended": generator.greedy(prompts, max_new_tokens=NEW_TOKENS, end_ids=[first]),
        "beam": generator.beam(prompts, num_beams=3, max_new_tokens=NEW_TOKENS, end_ids=[first]),
        "likelihoods": generator.log_likelihoods(prompts, choices),
    }
    topologies.shutdown()
    return {name: values[-turn:] + values[:-turn] if turn else values for name, values in found.items()}
