"""The EVA-CLIP towers against a tower written out from its definition, under the names of released checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.infimm_reference import EvaReference
from support.random_weights import randomize
from support.references import tower_sizes

from megatron_mm.config import EvaConfig, ParallelConfig
from megatron_mm.config.towers import EVA01_G_14_224, EVA02_BIGE_14_224, EVA02_L_14_336, EVA_TINY
from megatron_mm.hf.mapping import from_hf
from megatron_mm.hf.towers import eva_table
from megatron_mm.models.eva import EvaTower, Turn, rotary_angles
from megatron_mm.parallel import topology
from megatron_mm.parallel.replicated import replicated_state

PLAIN = replace(EVA_TINY, swiglu=False, rotary_grid=None)
GEOMETRIES = {
    "tiny": EVA_TINY,
    "as fine as in pre-training": replace(EVA_TINY, rotary_grid=8),
    "no rotary positions": PLAIN,
    "post-norm": replace(PLAIN, block="post_norm"),
    "pixels left over": replace(EVA_TINY, image_size=35),
    "EVA02-L": replace(EVA02_L_14_336, image_size=56, num_layers=2),
    "EVA01-g, heads of 88": replace(EVA01_G_14_224, image_size=28, num_layers=2),
    "EVA02-bigE, heads of 112": replace(EVA02_BIGE_14_224, image_size=28, num_layers=2, ffn_hidden_size=1024),
}


def make_reference(config: EvaConfig) -> EvaReference:
    """Return a reference tower in which every parameter is random, including norms and biases."""
    reference = EvaReference(tower_sizes(config))
    randomize(reference)
    return reference


def make_tower(config: EvaConfig, *, dtype: torch.dtype = torch.float32) -> EvaTower:
    """Return a tower with the weights of `make_reference`."""
    tower = EvaTower(config, dtype=dtype)
    ours = from_hf(eva_table(config), dict(make_reference(config).named_parameters()))
    tower.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in ours.items()}, strict=True)
    return tower


def make_pixels(config: EvaConfig, *, num_images: int) -> torch.Tensor:
    shape = (num_images, 3, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("config", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_same_tokens_as_the_reference(config: EvaConfig) -> None:
    """In fp32, the same operations in another order, on tokens of about unit scale. The largest difference measured is 1.6e-5, in post-norm
    towers, whose norms scale up the branches' outputs."""
    pixels = make_pixels(config, num_images=2)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    with torch.no_grad():
        expected = make_reference(config)((pixels / 255 - mean) / std)
        tokens = make_tower(config)(pixels)
    assert tokens.shape == (2, config.num_tokens, config.hidden_size)
    assert 0.3 < expected.std() < 6
    torch.testing.assert_close(tokens, expected, atol=3e-5, rtol=1e-5)


def test_images_do_not_see_each_other() -> None:
    tower, pixels = make_tower(EVA_TINY), make_pixels(EVA_TINY, num_images=3)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels)[1:2], tower(pixels[1:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [EVA_TINY, PLAIN])
def test_no_image_is_no_tokens(config: EvaConfig) -> None:
    """A frozen tower needs no blank image: it has no gradients that a reduction would wait for."""
    assert make_tower(config)(make_pixels(config, num_images=0)).shape == (0, config.num_tokens, config.hidden_size)


def test_the_final_norm_and_the_head_take_no_part() -> None:
    tower, pixels = make_tower(EVA_TINY), make_pixels(EVA_TINY, num_images=1)
    with torch.no_grad():
        before = tower(pixels)
        for parameter in (*tower.norm.parameters(), *tower.head.parameters()):
            parameter.fill_(float("nan"))
        torch.testing.assert_close(tower(pixels), before, atol=0, rtol=0)


def test_positions_are_turned_by_row_then_column() -> None:
    """The worked example of `rotary_angles`: heads of width 8, 2 x 2 patches at positions 0 and 2."""
    angles = rotary_angles(replace(EVA_TINY, image_size=8, hidden_size=16, num_attention_heads=2))
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0.02], [2, 0.02, 0, 0], [2, 0.02, 2, 0.02]]
    assert angles is not None
    torch.testing.assert_close(angles, torch.tensor(expected, dtype=torch.float32))
    quarter = torch.full((1, 1), torch.pi / 2)
    turned = Turn(quarter)(torch.tensor([[[[3.0, 5.0]]]]))
    torch.testing.assert_close(turned, torch.tensor([[[[-5.0, 3.0]]]]))


def test_no_graph_is_kept() -> None:
    """Neither under no_grad nor if the tower is frozen; and no parameter has a gradient."""
    tower, pixels = make_tower(EVA_TINY), make_pixels(EVA_TINY, num_images=2)
    assert tower(pixels).requires_grad, "otherwise this test says nothing"
    with torch.no_grad():
        assert not tower(pixels).requires_grad
    tower.requires_grad_(False)
    assert not tower(pixels).requires_grad
    assert all(parameter.grad is None for parameter in tower.parameters())


@pytest.mark.parametrize("config", [EVA_TINY, PLAIN, replace(PLAIN, block="post_norm")])
def test_bf16_follows_fp32(config: EvaConfig) -> None:
    """Two layers in bf16: a few steps of 2^-8 on tokens of about unit scale."""
    pixels = make_pixels(config, num_images=2)
    with torch.no_grad():
        exact, rounded = make_tower(config)(pixels), make_tower(config, dtype=torch.bfloat16)(pixels)
    assert rounded.dtype is torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.03 * exact.std()


@pytest.mark.parametrize(
    ("config", "expected"),
    [(EVA02_L_14_336, 304_432_832), (EVA01_G_14_224, 1_012_588_928), (EVA02_BIGE_14_224, 4_350_556_928), (EVA_TINY, 110_256)],
)
def test_sizes(config: EvaConfig, expected: int) -> None:
    with torch.device("meta"):
        tower = EvaTower(config, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in tower.parameters()) == expected
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [EVA_TINY, PLAIN])
def test_every_matrix_says_its_initial_scale(config: EvaConfig) -> None:
    tower = EvaTower(config, dtype=torch.float32)
    unmarked = [name for name, p in tower.named_parameters() if not hasattr(p, "init_std")]
    assert all(name.endswith((".bias", "norm.weight")) for name in unmarked)
    layer = tower.layers[0]
    assert layer.attention.qkv.weight.init_std == layer.mlp.up.weight.init_std == 1 / 8
    assert layer.attention.output.weight.init_std == 1 / 16, "of 2 layers with 2 branches each"


def test_wrong_image_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="takes"):
        make_tower(EVA_TINY)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


class TestCheckpoint:
    @pytest.fixture(scope="class", autouse=True)
    def one_process(self) -> Iterator[None]:
        topology.initialize(ParallelConfig(), seed=1)
        yield
        topology.shutdown()

    def test_checkpoints_hold_parameters_and_no_buffers(self) -> None:
        tower = EvaTower(EVA_TINY, dtype=torch.float32)
        names = {f"vision.{name}" for name, _ in tower.named_parameters()}
        assert set(replicated_state(tower, prefix="vision.")) == names
        assert set(tower.state_dict()) == {name.removeprefix("vision.") for name in names}
