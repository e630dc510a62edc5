"""The connectors against references written from their definitions (functional, channels first)."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_mm.config import ConnectorConfig, VisionConfig
from megatron_mm.config.towers import VIT_H_14_378
from megatron_mm.models.connectors import build_connector
from megatron_mm.models.connectors.pooling import pooling_weights

VISION = VisionConfig(image_size=36, patch_size=4, hidden_size=24, num_layers=1, num_attention_heads=2, ffn_hidden_size=8)
CONFIGS = {
    "average": ConnectorConfig(kind="average", num_tokens=16),
    "attention": ConnectorConfig(kind="attention", num_tokens=10, hidden_size=16, num_attention_heads=2),
    "c_abstractor": ConnectorConfig(kind="c_abstractor", num_tokens=16, hidden_size=16, depth=2),
    "c_abstractor of the same width": ConnectorConfig(kind="c_abstractor", num_tokens=25, hidden_size=24, depth=1),
}
OUTPUT_SIZE = 20
Weights = dict[str, torch.Tensor]


def make(config: ConnectorConfig, *, vision: VisionConfig = VISION, output_size: int = OUTPUT_SIZE) -> torch.nn.Module:
    """Return a connector with random weights everywhere, including norms and biases."""
    connector = build_connector(config, vision=vision, output_size=output_size, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.5))
    return connector


def make_features(*, num_images: int) -> torch.Tensor:
    return torch.randn(num_images, VISION.num_patches, VISION.hidden_size, generator=torch.Generator().manual_seed(1))


def channel_norm(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    """LayerNorm over the channels of [n, c, g, g]."""
    centred = x - x.mean(dim=1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def reference_block(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    w = {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}

    def pointwise(x: torch.Tensor, layer: str) -> torch.Tensor:
        return F.conv2d(x, w[f"{layer}.weight"][:, :, None, None], w.get(f"{layer}.bias"))

    y = F.silu(channel_norm(pointwise(x, "enter"), w, "enter_norm"))
    y = F.conv2d(y, w["depthwise.weight"], padding=1, groups=y.shape[1])
    y = F.silu(channel_norm(y, w, "depthwise_norm"))
    squeezed = F.silu(pointwise(F.adaptive_avg_pool2d(y, 1), "squeeze"))
    y = y * torch.sigmoid(pointwise(squeezed, "excite"))
    y = channel_norm(pointwise(y, "leave"), w, "leave_norm")
    shortcut = channel_norm(pointwise(x, "shortcut"), w, "shortcut_norm") if "shortcut.weight" in w else x
    return F.silu(y + shortcut)


def reference_c_abstractor(features: torch.Tensor, weights: Weights, config: ConnectorConfig) -> torch.Tensor:
    side = math.isqrt(features.shape[1])
    x = (features + weights["position_embedding"]).transpose(1, 2).reshape(len(features), -1, side, side)
    for block in range(config.depth):
        x = reference_block(x, weights, f"before.{block}.")
    x = F.adaptive_avg_pool2d(x, math.isqrt(config.num_tokens))
    for block in range(config.depth):
        x = reference_block(x, weights, f"after.{block}.")
    x = x.flatten(2).transpose(1, 2)
    x = F.silu(F.linear(x, weights["hidden.weight"], weights["hidden.bias"]))
    return F.linear(x, weights["output.weight"], weights["output.bias"])


def reference_average(features: torch.Tensor, weights: Weights, config: ConnectorConfig) -> torch.Tensor:
    side = math.isqrt(features.shape[1])
    x = F.adaptive_avg_pool2d(features.transpose(1, 2).reshape(len(features), -1, side, side), math.isqrt(config.num_tokens))
    return F.linear(x.flatten(2).transpose(1, 2), weights["output.weight"], weights["output.bias"])


def reference_attention(features: torch.Tensor, weights: Weights, config: ConnectorConfig) -> torch.Tensor:
    w = weights
    features = F.layer_norm(features, features.shape[-1:], w["feature_norm.weight"], w["feature_norm.bias"])
    queries = F.layer_norm(w["queries"], w["queries"].shape[-1:], w["query_norm.weight"], w["query_norm.bias"]) @ w["query.weight"].T
    keys, values = features @ w["key.weight"].T, features @ w["value.weight"].T
    width = config.hidden_size // config.num_attention_heads
    heads = []
    for head in range(config.num_attention_heads):
        own = slice(head * width, (head + 1) * width)
        scores = queries[:, own] @ keys[..., own].transpose(1, 2) / math.sqrt(width)
        heads.append(scores.softmax(dim=-1) @ values[..., own])
    attended = F.linear(torch.cat(heads, dim=-1), w["projection.weight"], w["projection.bias"])
    return F.linear(w["queries"] + attended, w["output.weight"], w["output.bias"])


REFERENCES = {"average": reference_average, "attention": reference_attention, "c_abstractor": reference_c_abstractor}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_agrees_with_its_definition(config: ConnectorConfig) -> None:
    """In fp32; the same operations in another order."""
    connector, features = make(config), make_features(num_images=3)
    with torch.no_grad():
        tokens = connector(features)
        expected = REFERENCES[config.kind](features, dict(connector.named_parameters()), config)
    assert tokens.shape == (3, config.num_tokens, OUTPUT_SIZE)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("output_size", "expected"), [(3072, 31_056_704), (4096, 39_447_360), (6656, 69_599_040)])
def test_c_abstractor_has_honeybees_size(output_size: int, expected: int) -> None:
    config = ConnectorConfig(kind="c_abstractor", num_tokens=144)
    with torch.device("meta"):
        connector = build_connector(config, vision=VIT_H_14_378, output_size=output_size, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in connector.parameters()) == expected


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_parameter_learns(config: ConnectorConfig) -> None:
    connector = make(config)
    (connector(make_features(num_images=2)) * torch.randn(config.num_tokens, OUTPUT_SIZE)).sum().backward()
    silent = [name for name, parameter in connector.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_no_images(config: ConnectorConfig) -> None:
    connector = make(config)
    tokens = connector(make_features(num_images=0))
    assert tokens.shape == (0, config.num_tokens, OUTPUT_SIZE)
    tokens.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in connector.parameters())


@pytest.mark.parametrize(("input_side", "output_side"), [(5, 2), (8, 4), (9, 9), (16, 12), (24, 8), (27, 8), (27, 12)])
def test_pooling_windows_are_torchs(input_side: int, output_side: int) -> None:
    grid = torch.randn(1, 1, input_side, input_side, dtype=torch.float64)
    weights = pooling_weights(input_side, output_side).double()
    torch.testing.assert_close(weights @ grid @ weights.T, F.adaptive_avg_pool2d(grid, output_side), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_initial_scale(config: ConnectorConfig) -> None:
    """With the marked initial scales, features of unit scale enter the decoder at 0.1 to 1."""
    connector = build_connector(config, vision=VISION, output_size=256, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in connector.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.init_std)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        assert 0.1 < connector(make_features(num_images=4)).std() < 1.2
