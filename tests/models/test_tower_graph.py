"""A tower that runs as replays of a fixed number of images gives the features of the plain tower, for any number of images."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config.towers import EVA_TINY
from megatron_mm.models.eva import EvaTower
from megatron_mm.models.tower_graph import GraphedTower

NUMBERS = [0, 1, 3, 4, 5, 8, 11]


class Replay:
    """Squares a few pixels of each image into the same memory at every call, as a graph does, and keeps a copy of each input."""

    def __init__(self, images: int) -> None:
        self.pixels = torch.full((images, 3, 2, 2), 7, dtype=torch.uint8)
        self.features = torch.empty(images, 5)
        self.seen: list[torch.Tensor] = []

    def __call__(self) -> torch.Tensor:
        self.seen.append(self.pixels.clone())
        self.features.copy_(features_of(self.pixels))
        return self.features


def features_of(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.flatten(1)[:, :5].float().square()


def random_pixels(number: int, size: int = 2) -> torch.Tensor:
    return torch.randint(1, 256, (number, 3, size, size), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_image_has_its_own_features_in_order(number: int) -> None:
    replay = Replay(4)
    graphed, pixels = GraphedTower(replay.pixels, replay), random_pixels(number)
    assert torch.equal(graphed(pixels), features_of(pixels))
    assert {seen.shape for seen in replay.seen} == {(4, 3, 2, 2)}  # every replay has the same shape
    seen = torch.cat(replay.seen)
    assert torch.equal(seen[:number], pixels) and not seen[number:].any()  # the rest is blank, not an earlier image
    assert graphed.take_blanks() == len(seen) - number and graphed.take_blanks() == 0
    assert len(seen) == max(4, -(-number // 4) * 4)


def test_features_outlive_the_next_replay() -> None:
    replay = Replay(4)
    graphed = GraphedTower(replay.pixels, replay)
    first = graphed(random_pixels(3))
    graphed(random_pixels(4))
    assert torch.equal(first, features_of(random_pixels(3)))


@pytest.mark.parametrize("number", NUMBERS)
def test_same_features_as_the_plain_tower(number: int) -> None:
    """In fp32; a product of another number of rows may add in another order, which moves features of about unit scale by some 1e-6."""
    torch.manual_seed(1)
    tower = EvaTower(EVA_TINY, dtype=torch.float32)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    static = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    graphed, pixels = GraphedTower(static, lambda: tower(static)), random_pixels(number, size=32)
    with torch.no_grad():
        expected = tower(pixels)
    found = graphed(pixels)
    assert found.shape == expected.shape and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_images_of_another_size_or_type_are_refused() -> None:
    replay = Replay(4)
    graphed = GraphedTower(replay.pixels, replay)
    with pytest.raises(ValueError, match=r"takes images of 3x2x2 uint8, but got 3x3x3 uint8: leave kernels\.tower_graph out"):
        graphed(random_pixels(1, size=3))
    with pytest.raises(ValueError, match="but got 3x2x2 float32"):
        graphed(random_pixels(1).float())
