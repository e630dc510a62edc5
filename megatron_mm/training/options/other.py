"""Options of the schedule, of images and of determinism."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.config import Experiment
from megatron_mm.models.layers import Backend
from megatron_mm.training.machine import Machine
from megatron_mm.training.options.option import Option


def other_options(experiment: Experiment, *, backend: Backend, machine: Machine) -> Iterator[Option]:
    """Yield the options of this module that differ from their defaults."""
    yield from _deterministic(experiment, backend=backend, machine=machine)
    yield from _warm_up(experiment)
    yield from _image_size(experiment)


def _deterministic(experiment: Experiment, *, backend: Backend, machine: Machine) -> Iterator[Option]:
    if experiment.train.deterministic and backend == "te" and not machine.has("flash_attn"):
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
