"""Runs an image tower as CUDA graphs (`kernels.tower_graph`).

They are captured once all weights are loaded and before the loader starts. A replay reads weights, and adds gradients to buffers, where
they were at that time. They never move after that: the optimizer changes weights in place, and later loads (a roll-back) build a new model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_mm.config import Experiment
from megatron_mm.models.encoder import TOWER, ImageEncoder
from megatron_mm.models.tower_graph import Copy, Forward, GraphedTower, GraphedTrainedTower
from megatron_mm.parallel.stages import most_in_flight
from megatron_mm.platform import cuda_graph
from megatron_mm.platform.device import send
from megatron_mm.platform.multi_tensor import DataParallel

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Difference between the features of a replay and of the tower itself that is always allowed, relative to the difference between the
features of two images, by type of the features. A replay of other pixels has about 1."""
HIGHEST_LIMIT = 0.5
"""Largest difference that is allowed if the tower's own rounding is large."""

Capture = Callable[[Forward, torch.Tensor], Callable[[], torch.Tensor]]
CapturePasses = Callable[..., cuda_graph.Passes]
"""Called as `platform.cuda_graph.capture_passes`."""


def graph_tower(
    experiment: Experiment,
    model: Sequence[DistributedDataParallel],
    *,
    capture: Capture = cuda_graph.capture,
    capture_passes: CapturePasses = cuda_graph.capture_passes,
) -> bool:
    """Make this process's image tower run as replays of graphs, if the experiment asks for it and the process has a tower.

    Returns True if it does.

    Args:
        model: this process's pipeline chunks, with their final weights. Gradients in their buffers are lost if the tower trains.
        capture: captures the forward pass of a frozen tower (`platform.cuda_graph.capture`).
        capture_passes: captures the passes of a tower that trains (`platform.cuda_graph.capture_passes`).

    Raises ValueError if the encoder has no tower, or if the tower trains but is spread over pipeline ranks, cannot be captured, or gives
    other features or gradients in a replay.
    """
    images = experiment.kernels.tower_graph
    encoder = getattr(model[0].module, "encoder", None)
    if images is None or encoder is None:
        return False
    tower = encoder.parts.get(TOWER)
    if tower is None:
        raise ValueError(_refused(images, f"the image encoder has no part named {TOWER}, only {list(encoder.parts)}"))
    size = model[0].module.image.size
    device = next(tower.parameters()).device
    pixels = torch.zeros(images, 3, size, size, dtype=torch.uint8, device=device)
    try:
        if any(parameter.requires_grad for parameter in tower.parameters()):
            tower.forward = _trained(experiment, model[0], tower, pixels, capture_passes)
        else:
            eager: Forward = tower.forward
            graphed = GraphedTower(pixels, capture(eager, pixels))
            check_replays(graphed, eager)
            tower.forward = graphed
    except RuntimeError as error:
        raise ValueError(_refused(images, f"the tower's graph fails ({_first_line(error)})")) from error
    return True


def _trained(
    experiment: Experiment, wrapped: DistributedDataParallel, tower: torch.nn.Module, pixels: torch.Tensor, capture: CapturePasses
) -> GraphedTrainedTower:
    if experiment.parallel.spread_encoder:
        raise ValueError(_refused(len(pixels), "the tower trains and its images are spread over pipeline ranks (parallel.spread_encoder)"))
    assert isinstance(wrapped, DataParallel)
    eager: Forward = tower.forward
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]

    def backward(features: torch.Tensor, gradient: torch.Tensor) -> None:
        wrapped.add_gradients(features, gradient, trained)

    copies, stream = [], torch.cuda.Stream()
    for _ in range(most_in_flight(experiment.parallel)):
        example = torch.zeros_like(pixels)
        passes = capture(eager, backward, example, stream=stream)
        copies.append(Copy(example, passes.forward, passes.gradient, passes.backward))
    graphed = GraphedTrainedTower(
        copies, eager=eager, before=partial(wrapped.wait_for_weights, tower), after=partial(wrapped.note_gradients, trained)
    )
    for copy in copies:
        check_replays(GraphedTower(copy.pixels, copy.forward), eager)
        check_gradients(copy, eager, wrapped, trained)
    wrapped.zero_grad_buffer()
    return graphed


def graphed_tower(model: Sequence[DistributedDataParallel]) -> GraphedTower | None:
    """Return what runs this process's image tower if that is a graph, otherwise None."""
    encoder = getattr(model[0].module, "encoder", None)
    forward = getattr(encoder.parts.get(TOWER), "forward", None) if isinstance(encoder, ImageEncoder) else None
    return forward if isinstance(forward, GraphedTower) else None


def check_replays(graphed: GraphedTower, eager: Forward) -> None:
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


def check_gradients(copy: Copy, eager: Forward, wrapped: DataParallel, trained: Sequence[torch.nn.Parameter]) -> None:
    """Raise ValueError if a replay's weight gradients, of random images and features, differ from the tower's by more than rounding."""
    difference, allowed = gradient_difference(copy, eager, wrapped, trained), LIMITS[copy.gradient.dtype]
    if not difference <= allowed:  # also for NaN
        raise ValueError(
            _refused(
                len(copy.pixels), f"gradients of a replay differ from the tower's by {difference:.2g} of their norm (allowed: {allowed:g})"
            )
        )


def gradient_difference(copy: Copy, eager: Forward, wrapped: DataParallel, trained: Sequence[torch.nn.Parameter]) -> float:
    """Return the norm of the difference between the weight gradients of a replay and of the tower, relative to the norm of the latter.

    The images, and the gradient of the features, are random. Gradients in the buffers are lost.
    """
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, copy.pixels.shape, generator=generator, dtype=torch.uint8)
    gradient = torch.randn(copy.gradient.shape, generator=generator)
    copy.pixels.copy_(pixels)
    copy.gradient.copy_(gradient)

    def replay() -> None:
        copy.forward()
        copy.backward()

    def run() -> None:
        with torch.enable_grad():
            wrapped.add_gradients(eager(copy.pixels), copy.gradient, trained)

    sums = []
    for add in (run, replay):
        wrapped.zero_grad_buffer()
        add()
        sums.append([parameter.main_grad.clone() for parameter in trained])  # type: ignore[attr-defined]
    expected, found = sums
    apart = torch.stack([(one - other).float().square().sum() for one, other in zip(found, expected, strict=True)]).sum()
    return float((apart / torch.stack([one.float().square().sum() for one in expected]).sum().clamp(min=1e-40)).sqrt())


def allowed_difference(graphed: GraphedTower, eager: Forward) -> float:
    """Return the largest `replay_difference` that rounding explains: three times what images' features change if each is encoded alone,
    by other kernels, between the limits above. Deep towers whose norms follow their branches round most."""
    alone = torch.zeros_like(graphed.pixels[:1])
    rounding = replay_difference(GraphedTower(alone, lambda: eager(alone)), eager, numbers=[8])
    return min(HIGHEST_LIMIT, max(LIMITS[graphed.replay().dtype], 3 * rounding))


@torch.no_grad()
def replay_difference(graphed: GraphedTower, eager: Forward, *, numbers: Sequence[int]) -> float:
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
