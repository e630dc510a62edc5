"""Runs a frozen image tower as a CUDA graph (`kernels.tower_graph`).

The graph is captured once all weights are loaded and before the loader starts. A replay reads weights where they were at that time. They
never move after that: the optimizer does not know frozen parameters, and later loads (a roll-back) build a new model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_mm.config import Experiment
from megatron_mm.models.encoder import TOWER, ImageEncoder
from megatron_mm.models.tower_graph import GraphedTower
from megatron_mm.platform import cuda_graph
from megatron_mm.platform.device import send

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Difference between the features of a replay and of the tower itself that is always allowed, relative to the difference between the
features of two images, by type of the features. A replay of other pixels has about 1."""
HIGHEST_LIMIT = 0.5
"""Largest difference that is allowed if the tower's own rounding is large."""

Capture = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], Callable[[], torch.Tensor]]


def graph_tower(experiment: Experiment, model: Sequence[DistributedDataParallel], *, capture: Capture = cuda_graph.capture) -> bool:
    """Make this process's image tower run as replays of a graph, if the experiment asks for it and the process has a tower.

    Returns True if it does.

    Args:
        model: this process's pipeline chunks, with their final weights.
        capture: captures a forward pass (`platform.cuda_graph.capture`).

    Raises ValueError if the encoder has no tower, or if the tower has trainable parameters, cannot be captured, or gives other features in
    a replay.
    """
    images = experiment.kernels.tower_graph
    encoder = getattr(model[0].module, "encoder", None)
    if images is None or encoder is None:
        return False
    tower = encoder.parts.get(TOWER)
    if tower is None:
        raise ValueError(_refused(images, f"the image encoder has no part named {TOWER}, only {list(encoder.parts)}"))
    if trainable := [name for name, parameter in tower.named_parameters() if parameter.requires_grad]:
        raise ValueError(_refused(images, f"the tower trains {len(trainable)} parameters, such as {trainable[0]}"))
    size = model[0].module.image.size
    device = next(tower.parameters()).device
    pixels = torch.zeros(images, 3, size, size, dtype=torch.uint8, device=device)
    eager: Callable[[torch.Tensor], torch.Tensor] = tower.forward
    try:
        graphed = GraphedTower(pixels, capture(eager, pixels))
        check_replays(graphed, eager)
    except RuntimeError as error:
        raise ValueError(_refused(images, f"the tower's graph fails ({_first_line(error)})")) from error
    tower.forward = graphed
    return True


def graphed_tower(model: Sequence[DistributedDataParallel]) -> GraphedTower | None:
    """Return what runs this process's image tower if that is a graph, otherwise None."""
    encoder = getattr(model[0].module, "encoder", None)
    forward = getattr(encoder.parts.get(TOWER), "forward", None) if isinstance(encoder, ImageEncoder) else None
    return forward if isinstance(forward, GraphedTower) else None


def check_replays(graphed: GraphedTower, eager: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raise ValueError if replays on random pixels (two inputs, and the first one again) differ from the tower by more than rounding."""
    difference = replay_difference(graphed, eager, numbers=[len(graphed.pixels)] * 2)
    allowed = allowed_difference(graphed, eager)
    if not difference <= allowed:  # also for NaN
        raise ValueError(
            _refused(
                len(graphed.pixels),
                f"a replay differs from the tower by {difference:.2g} of the difference between images (allowed: {allowed:g})",
            )
        )


def allowed_difference(graphed: GraphedTower, eager: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Return the largest `replay_difference` that rounding explains: three times what images' features change if each is encoded alone,
    by other kernels, between the limits above. Deep towers whose norms follow their branches round most."""
    alone = torch.zeros_like(graphed.pixels[:1])
    rounding = replay_difference(GraphedTower(alone, lambda: eager(alone)), eager, numbers=[8])
    return min(HIGHEST_LIMIT, max(LIMITS[graphed.replay().dtype], 3 * rounding))


@torch.no_grad()
def replay_difference(graphed: GraphedTower, eager: Callable[[torch.Tensor], torch.Tensor], *, numbers: Sequence[int]) -> float:
    """Return the largest difference between features of replays and of the tower itself, relative to that between features of images.

    Args:
        numbers: of images in each random input, each at least 1; the first input is run once more at the end, after all others.
    """
    generator = torch.Generator().manual_seed(1)  # its own: a run draws the same numbers with and without a graph
    shape, device = graphed.pixels.shape[1:], graphed.pixels.device
    inputs = [send(torch.randint(0, 256, (number, *shape), generator=generator, dtype=torch.uint8), device) for number in numbers]
    expected = [eager(pixels).float() for pixels in inputs]
    found = [graphed(pixels).float() for pixels in (*inputs, inputs[0])]
    every = torch.cat(expected)
    apart = (every - every.roll(1, dims=0)).square().mean().sqrt()
    errors = [(ours - theirs).square().mean().sqrt() for ours, theirs in zip(found, (*expected, expected[0]), strict=True)]
    graphed.take_blanks()
    return float((torch.stack(errors) / apart.clamp(min=1e-20)).max())


def _refused(images: int, why: str) -> str:
    return f"kernels.tower_graph is {images}, but {why}: leave it out"


def _first_line(error: RuntimeError) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
