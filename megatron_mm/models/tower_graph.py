"""Runs a frozen image tower on any number of images by replaying a forward pass of a fixed number of images.

A CUDA graph replays kernels of fixed sizes on fixed addresses. Each replay overwrites the previous one's activations, so only a forward
pass without a backward pass can be replayed at any time: that of a tower without trainable parameters, whose activations are not needed
once its features are copied. That is right under every pipeline schedule.

The price is that a micro-batch's images are filled up with blank ones to a multiple of the fixed number, and that these are computed, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


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
        at_once = len(self.pixels)
        if pixels.shape[1:] != self.pixels.shape[1:] or pixels.dtype is not self.pixels.dtype:
            raise ValueError(
                f"the tower's graph takes images of {_described(self.pixels)}, but got {_described(pixels)}: leave kernels.tower_graph out"
            )
        found = []
        for part in pixels.split(at_once):  # of no images: one part of none, so that the result has a shape
            self.pixels[: len(part)].copy_(part)
            self.pixels[len(part) :].zero_()
            self._blanks += at_once - len(part)
            found.append(self.replay()[: len(part)].clone())
        return found[0] if len(found) == 1 else torch.cat(found)

    def take_blanks(self) -> int:
        """Return the number of blank images that were computed to fill up replays since the last call."""
        blanks, self._blanks = self._blanks, 0
        return blanks


def _described(pixels: torch.Tensor) -> str:
    return f"{'x'.join(map(str, pixels.shape[1:]))} {str(pixels.dtype).removeprefix('torch.')}"
