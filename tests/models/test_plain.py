"""Layers of plain torch."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.models import plain


@pytest.mark.parametrize("number", [0, 1, 8, 11])
def test_a_convolution_filled_up_is_the_same_convolution(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, a number of images that is not a multiple of eight is padded to one."""
    torch.manual_seed(0)
    layer = plain.ImageConvolution(6, 6, 3, padding=1, groups=6).double()
    images = torch.randn(number, 6, 5, 5, dtype=torch.double, requires_grad=True)
    weights = torch.randn(number, 6, 5, 5, dtype=torch.double)

    def results() -> list[torch.Tensor]:
        found = layer(images)
        return [found.detach(), *torch.autograd.grad((found * weights).sum(), [images, layer.weight, layer.bias])]

    expected = results()
    seen: list[int] = []
    monkeypatch.setattr(plain, "_fills_up", lambda images: True)
    original = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, images: seen.append(len(images)) or original(self, images))
    for one, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert seen == [-(-number // 8) * 8]
