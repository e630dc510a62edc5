"""The checks of `gpu_check.py` that compare layers: Transformer Engine's in bf16 and FP8 with plain PyTorch's in fp32, for every family."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_mm.config import Experiment, ModelConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import STATE_METADATA
from megatron_mm.run.data import TrainingData, open_tokenizer
from megatron_mm.run.start import check_shapes
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.router_graph import graph_routers
from megatron_mm.training.step import TrainingStep
from megatron_mm.training.tower_graph import graph_tower

STEPS = 5
RECIPES = ("debug_mm1", "debug_mm1_moe", "debug_infimm", "debug_mono_internvl")
"""One recipe of every family, and one with experts."""
GATE = 0.7
"""Value that gates are set to: a closed gate hides every error behind it."""


@dataclass(frozen=True)
class Checked:
    """One line of the table."""

    what: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        """False for a NaN, too."""
        return self.found <= self.allowed


@dataclass(frozen=True)
class Skipped:
    """A check that cannot run here, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Seen:
    """Results of a few training steps."""

    images: list[int]
    """Images in each micro-batch of the first step."""
    logits: dict[str, torch.Tensor]
    """Logits of these micro-batches, on the CPU in fp32, by the micro-batch's number."""
    layers: dict[str, torch.Tensor]
    """Output of every layer for these micro-batches, on the CPU in fp32, by "<layer's name> <micro-batch's number>"."""
    losses: list[float]
    gradients: dict[str, torch.Tensor]
    """Gradients of the first step, by the parameter's name in checkpoints."""


def experiment(data: Path, *, precision: str, layers: str, recipe: str = "debug_mm1") -> Experiment:
    """Build a debug recipe with heads of 64 and widths allowed in FP8 products; half of the sequences are text only."""
    base = get_recipe(recipe)
    return replace(
        base,
        model=_widened(base.model),
        data=replace(base.data, path=data, decoder="pillow", mixture={"pairs": 0.25, "interleaved": 0.25, "text": 0.5}),
        optimizer=replace(base.optimizer, clip_grad_norm=0.0),  # the gradients are read after the step
        train=replace(base.train, global_batch_size=4, micro_batch_size=1, precision=precision, layers=layers),  # type: ignore[arg-type]
    )


def _widened(model: ModelConfig) -> ModelConfig:
    decoder = replace(model.decoder, hidden_size=256, head_dim=64, ffn_hidden_size=512, num_query_groups=2)
    if isinstance(model, MM1Config):
        return replace(model, decoder=decoder, vision=replace(model.vision, hidden_size=256, ffn_hidden_size=512))
    if isinstance(model, InfiMMConfig):
        return replace(model, decoder=decoder, gated=replace(model.gated, head_dim=64))
    return replace(model, decoder=decoder)


def hide_nothing(chunk: torch.nn.Module) -> None:
    """Open the gates, and make the visual experts, which begin as copies, differ from the text experts."""
    for name, parameter in chunk.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(GATE)
        if ".mlp.visual." in name:
            parameter.data.neg_()


def train(settings: Experiment) -> Seen:
    """Train a few steps on demo data. Initial weights and data depend only on names and seeds, so all settings start alike."""
    check_shapes(settings, 1)
    topology = topologies.initialize(settings.parallel, seed=settings.train.seed)
    try:
        model = build_model(settings, topology)
        chunk = model[0].module
        hide_nothing(chunk)
        graph_tower(settings, model)  # only if the settings ask for it, as below
        graph_routers(settings, model, topology)
        step = TrainingStep(settings, topology, model, build_optimizer(settings, model), num_sources=len(settings.data.sources))
        data = TrainingData(_padded_alike(settings), topology, open_tokenizer(settings))
        batches = next(data).micro_batches
        logits = _logits(chunk, [batch.to(topology.device) for batch in batches])
        layers: dict[str, torch.Tensor] = {}
        hooks = [module.register_forward_hook(_keep(layers, name)) for name, module in _layers(chunk)]
        losses = [step.run(batches, step=1).losses.mean]
        gradients = _gradients(chunk)
        for hook in hooks:
            hook.remove()
        losses += [step.run(next(data).micro_batches, step=number).losses.mean for number in range(2, STEPS + 1)]
        data.close()
        return Seen([batch.num_images for batch in batches], logits, layers, losses, gradients)
    finally:
        topologies.shutdown()


def _padded_alike(settings: Experiment) -> Experiment:
    """Pad micro-batches as FP8 requires in every precision, so that all have the same number of tokens."""
    return replace(settings, train=replace(settings.train, precision="fp8"))


@torch.no_grad()
def _logits(chunk: torch.nn.Module, batches: list[PackedBatch]) -> dict[str, torch.Tensor]:
    return {str(number): chunk(batch, with_loss=False).float().cpu() for number, batch in enumerate(batches)}


def _layers(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((name, module) for name, module in chunk.named_modules() if isinstance(module, TransformerLayer))


def _keep(into: dict[str, torch.Tensor], name: str) -> Callable[..., Any]:
    numbers = itertools.count()

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        into[f"{name} {next(numbers)}"] = output[0].detach().float().cpu()

    return hook


def _gradients(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Read the gradients after the step: the optimizer neither clips nor changes the buffers that hold them."""
    state = chunk.sharded_state_dict(metadata=dict(STATE_METADATA))  # type: ignore[operator]
    found: dict[str, torch.Tensor] = {}
    for entry in state.values():
        if hasattr(entry.data, "main_grad"):
            number = sum(name.startswith(f"{entry.key} ") for name in found)  # experts share a name
            found[f"{entry.key} {number}"] = entry.data.main_grad.detach().float().cpu()
    return found


def distance(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def farthest(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Return the largest |one - other| / |other| (norms) of any tensor; infinity if one is NaN."""
    assert ones.keys() == others.keys() and ones, "not the same names"
    found = torch.stack([(one - others[name]).norm() / others[name].norm().clamp(min=1e-12) for name, one in ones.items()])
    return float("inf") if found.isnan().any() else float(found.max())


def together(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Return |ones - others| / |others| with all tensors as one long vector."""
    return farthest(*({"all": torch.cat([each[name].flatten() for name in others])} for each in (ones, others)))


def check_layers(data: Path, device: torch.device, *, recipe: str) -> Iterator[Checked | Skipped]:
    """Compare a family in bf16 and FP8 with its fp32 PyTorch layers; for the first recipe, also compare these with a repeat."""
    exact = train(experiment(data, precision="fp32", layers="torch", recipe=recipe))
    assert 0 in exact.images and max(exact.images) > 0, f"micro-batches with {exact.images} images: some must have none, some any"
    if recipe == RECIPES[0]:
        again = train(experiment(data, precision="fp32", layers="torch", recipe=recipe))
        yield from against(exact, again, what=f"{recipe} torch fp32 again", limits=Limits(1e-5, 1e-5, 1e-4, 1e-5))
    yield from check_precisions(data, device, recipe=recipe, exact=exact)


@dataclass(frozen=True)
class Limits:
    """Allowed relative differences."""

    logits: float
    layer: float
    gradients: float
    loss: float


def against(exact: Seen, seen: Seen, *, what: str, limits: Limits) -> Iterator[Checked]:
    yield Checked(f"{what}: logits", together(seen.logits, exact.logits), limits.logits)
    yield Checked(f"{what}: worst layer's output", farthest(seen.layers, exact.layers), limits.layer)
    yield Checked(f"{what}: gradient", together(seen.gradients, exact.gradients), limits.gradients)
    yield Checked(f"{what}: loss of {STEPS} steps", distance(seen.losses, exact.losses), limits.loss)


def check_precisions(data: Path, device: torch.device, *, recipe: str, exact: Seen) -> Iterator[Checked | Skipped]:
    """Compare bf16 and FP8 layers with fp32 PyTorch layers of the same weights on the same batches: only rounding may differ.

    In bf16, three times the error of PyTorch's own bf16 layers is allowed. FP8 has 3 bits of mantissa (rounding to 2^-4 of a value) and
    2 bits in gradients (rounding to 2^-3); its errors partly average out in sums of hundreds of terms.
    """
    plain = train(experiment(data, precision="bf16", layers="torch", recipe=recipe))
    yield from against(exact, plain, what=f"{recipe} torch bf16", limits=Limits(5e-2, 5e-2, 1e-1, 2e-2))
    if device.type != "cuda" or importlib.util.find_spec("transformer_engine") is None:
        why = "needs a GPU" if device.type != "cuda" else "Transformer Engine is not installed"
        yield Skipped(f"{recipe} te bf16 and fp8", why)
        return
    limits = Limits(
        logits=max(3 * together(plain.logits, exact.logits), 1e-2),
        layer=max(3 * farthest(plain.layers, exact.layers), 1e-2),
        gradients=max(3 * together(plain.gradients, exact.gradients), 2e-2),
        loss=max(3 * distance(plain.losses, exact.losses), 5e-3),
    )
    te = train(experiment(data, precision="bf16", layers="te", recipe=recipe))
    yield from against(exact, te, what=f"{recipe} te bf16", limits=limits)
    fp8 = train(experiment(data, precision="fp8", layers="te", recipe=recipe))
    yield from against(exact, fp8, what=f"{recipe} te fp8", limits=Limits(2e-1, 2e-1, 4e-1, 5e-2))
