"""The image tower equals transformers' CLIP, and all of its parameters are trained."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from megatron_mm.config import ParallelConfig, VisionConfig
from megatron_mm.config.towers import VIT_H_14_224, VIT_H_14_378, VIT_L_14_336, VIT_TINY
from megatron_mm.hf.mapping import from_hf
from megatron_mm.hf.towers import clip_table
from megatron_mm.models.layers import vision_layer_spec
from megatron_mm.models.vision import VisionTower, vision_transformer_config
from megatron_mm.parallel import topology

GEOMETRIES = {
    "tiny": VIT_TINY,
    "tiny with gelu": replace(VIT_TINY, activation="gelu"),
    "pixels left over": replace(VIT_TINY, image_size=35),
    "another epsilon": replace(VIT_TINY, norm_epsilon=1e-3),
    "L/14": replace(VIT_L_14_336, image_size=56, num_layers=2),
    "H/14, heads of 80": replace(VIT_H_14_378, image_size=50, num_layers=2),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    topology.initialize(ParallelConfig(), seed=1)
    yield
    topology.shutdown()


def make_tower(config: VisionConfig, *, dtype: torch.dtype = torch.float32, recompute: str = "none") -> VisionTower:
    return VisionTower(
        config,
        layer_spec=vision_layer_spec("torch"),
        transformer_config=vision_transformer_config(config, params_dtype=dtype, recompute=recompute, on_gpu=False),
        pg_collection=topology.single_process_groups(),
    )


def make_clip(config: VisionConfig) -> CLIPVisionModel:
    """Return a CLIP tower in which every parameter is random: transformers initialises norms and biases to ones and zeros."""
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.activation,
            layer_norm_eps=config.norm_epsilon,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return clip


def load(tower: VisionTower, clip: CLIPVisionModel) -> None:
    ours = from_hf(clip_table(tower.config, prefix=""), clip.state_dict())
    tower.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in ours.items()}, strict=True)


def make_pixels(config: VisionConfig, *, num_images: int) -> torch.Tensor:
    shape = (num_images, 3, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("config", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_same_features_as_clip(config: VisionConfig) -> None:
    """In fp32, the same operations in another order: 1e-5 on features of unit scale (after the final LayerNorm)."""
    tower, clip = make_tower(config), make_clip(config)
    load(tower, clip)
    pixels = make_pixels(config, num_images=2)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    with torch.no_grad():
        hidden = clip(pixel_values=(pixels / 255 - mean) / std).last_hidden_state
        expected = clip.post_layernorm(hidden)[:, 1:]
        features = tower(pixels)
    assert features.shape == (2, config.num_patches, config.hidden_size)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_images_do_not_see_each_other() -> None:
    tower = make_tower(VIT_TINY)
    load(tower, make_clip(VIT_TINY))
    pixels = make_pixels(VIT_TINY, num_images=3)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels)[1:2], tower(pixels[1:2]), atol=1e-5, rtol=1e-5)


def test_every_parameter_learns() -> None:
    """The class token is dropped at the end, but must still have a gradient from attention to it."""
    tower = make_tower(VIT_TINY)
    load(tower, make_clip(VIT_TINY))
    (tower(make_pixels(VIT_TINY, num_images=2)) * torch.randn(64, 64)).sum().backward()
    silent = [name for name, parameter in tower.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


def test_recomputing_layers_changes_nothing() -> None:
    clip, gradients = make_clip(VIT_TINY), []
    for recompute in ("none", "selective", "full"):
        tower = make_tower(VIT_TINY, recompute=recompute)
        load(tower, clip)
        tower(make_pixels(VIT_TINY, num_images=2)).square().sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=0, rtol=0)


def test_bf16_follows_fp32() -> None:
    """Two layers in bf16: a few steps of 2^-8 on features of unit scale."""
    clip = make_clip(VIT_TINY)
    exact, rounded = make_tower(VIT_TINY), make_tower(VIT_TINY, dtype=torch.bfloat16)
    load(exact, clip)
    load(rounded, clip)
    pixels = make_pixels(VIT_TINY, num_images=2)
    with torch.no_grad():
        features = rounded(pixels)
        assert features.dtype is torch.bfloat16
        assert (features.float() - exact(pixels)).abs().mean() < 0.03


@pytest.mark.parametrize(("config", "expected"), [(VIT_H_14_378, 631_371_520), (VIT_H_14_224, 630_766_080), (VIT_L_14_336, 303_507_456)])
def test_sizes(config: VisionConfig, expected: int) -> None:
    with torch.device("meta"):
        tower = make_tower(config)
    assert sum(parameter.numel() for parameter in tower.parameters()) == expected


def test_every_matrix_says_its_initial_scale() -> None:
    tower = make_tower(VIT_TINY)
    unmarked = [name for name, p in tower.named_parameters() if not hasattr(p, "init_std") and not hasattr(p, "init_value")]
    assert all(name.endswith("bias") for name in unmarked)


def test_wrong_image_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="takes"):
        make_tower(VIT_TINY)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
