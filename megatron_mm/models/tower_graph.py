"""Runs an image tower by replaying passes of a fixed number of images.

A CUDA graph replays kernels of fixed sizes on fixed addresses. Each replay overwrites the previous one's activations. For a frozen tower
that does not matter: its activations are not needed once its features are copied. So one captured forward pass serves any number of images
under every pipeline schedule (`GraphedTower`).

A tower that trains needs its activations until its backward pass. So there is a copy of both passes, with activations of its own, for each
micro-batch that waits for its backward pass (`GraphedTrainedTower`). Micro-batches that do not fit run without a graph.

The price is that images are filled up with blank ones to the fixed number, and that these are computed, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mm.models.graph_copy import GraphCopy

Forward = Callable[[torch.Tensor], torch.Tensor]


class GraphedTower:
    """Pixels [n, 3, H, W] -> features [n, ...], computed k images at a time. It takes the place of a tower's `forward`.

    Worked example: k = 4, n = 6. The first replay computes images 0 to 3; the second computes 4, 5 and two blank images, whose features are
    dropped.
    """

    def __init__(self, pixels: torch.Tensor, replay: Callable[[], torch.Tensor]) -> None:
        """
        Args:
            pixels: [k, 3, H, W] uint8, the input of every replay; it is overwritten.
            replay: computes the features [k, ...] of `pixels`; the next call may overwrite them.
        """
        self.pixels, self.replay = pixels, replay
        self._blanks = 0

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features [n, ...] in memory of their own, without gradients.

        Raises ValueError if the images have another size or type than those of the graph.
        """
        self._check(pixels)
        found = []
        for part in pixels.split(len(self.pixels)):  # of no images: one part of none, so that the result has a shape
            self._fill(self.pixels, part)
            found.append(self.replay()[: len(part)].clone())
        return found[0] if len(found) == 1 else torch.cat(found)

    def take_blanks(self) -> int:
        """Return the number of blank images that were computed to fill up replays since the last call."""
        blanks, self._blanks = self._blanks, 0
        return blanks

    def _check(self, pixels: torch.Tensor) -> None:
        if pixels.shape[1:] != self.pixels.shape[1:] or pixels.dtype is not self.pixels.dtype:
            raise ValueError(
                f"the tower's graph takes images of {_described(self.pixels)}, but got {_described(pixels)}: leave kernels.tower_graph out"
            )

    def _fill(self, pixels: torch.Tensor, images: torch.Tensor) -> None:
        """Copy images into the input of a replay, and make the rest of it blank."""
        pixels[: len(images)].copy_(images)
        pixels[len(images) :].zero_()
        self._blanks += len(pixels) - len(images)


@dataclass
class Copy(GraphCopy):
    """One capture of both passes, whose activations are in use from its forward to its backward pass."""

    pixels: torch.Tensor
    """[k, 3, H, W] uint8, the input of every forward pass; it is overwritten."""
    forward: Callable[[], torch.Tensor]
    """Computes the features [k, ...] of `pixels`; the next call overwrites them."""
    gradient: torch.Tensor
    """[k, ...] of the features, the input of every backward pass."""
    backward: Callable[[], None]
    """Adds the gradients of the tower's weights for `gradient` to their buffers."""


class GraphedTrainedTower(GraphedTower):
    """As `GraphedTower`, and with gradients for up to k images. More images, or no free copy: the tower runs without a graph."""

    def __init__(self, copies: Sequence[Copy], *, eager: Forward, before: Callable[[], None], after: Callable[[], None]) -> None:
        """
        Args:
            copies: at least one.
            eager: the tower's own forward pass.
            before: called before replays, which run no hooks: waits until the weights are complete.
            after: called once the weights' gradients of a micro-batch are in their buffers.
        """
        super().__init__(copies[0].pixels, copies[0].forward)
        self.copies, self.eager, self.before, self.after = copies, eager, before, after
        self._anchor = torch.zeros((), device=self.pixels.device, requires_grad=True)  # so that autograd calls the backward pass

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features [n, ...] in memory of their own; under autograd, their backward pass adds the weights' gradients to buffers.

        Raises ValueError if the images have another size or type than those of the graph.
        """
        self._check(pixels)
        if not torch.is_grad_enabled() and self.copies[0].is_free:
            self.before()
            return super().__call__(pixels)
        copy = next((copy for copy in self.copies if copy.is_free), None)
        if copy is None or len(pixels) > len(copy.pixels) or not torch.is_grad_enabled():
            return self.eager(pixels)
        self.before()
        self._fill(copy.pixels, pixels)
        features: torch.Tensor = _Replayed.apply(self._anchor, copy, len(pixels), self.after)
        return features


class _Replayed(torch.autograd.Function):
    """Replays a copy's forward pass, and in the backward pass its backward pass."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, copy: Copy, count: int, after: Callable[[], None]) -> torch.Tensor:
        ctx.user, ctx.copy, ctx.after = copy.begin(), copy, after
        return copy.forward()[:count].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
        copy: Copy = ctx.copy
        copy.check(ctx.user)
        copy.gradient[: len(gradient)].copy_(gradient)
        copy.gradient[len(gradient) :].zero_()
        copy.backward()
        copy.end()
        ctx.after()
        return None, None, None, None


def _described(pixels: torch.Tensor) -> str:
    return f"{'x'.join(map(str, pixels.shape[1:]))} {str(pixels.dtype).removeprefix('torch.')}"
