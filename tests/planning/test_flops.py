"""FLOP counts against counts by hand and torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.config import ConnectorConfig, DecoderConfig, MoEConfig
from megatron_mm.config.towers import VIT_H_14_378
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mm1.family import MM1
from megatron_mm.families.recipes import get_recipe
from megatron_mm.flops import (
    FlopCount,
    StepWork,
    decoder_flops,
    decoder_matmul_parameters,
    mfu,
    peak_tflops,
    vision_flops,
)
from megatron_mm.models.connectors import build_connector, connector_flops

MM1_30B = get_recipe("mm1_30b").model
assert isinstance(MM1_30B, MM1Config)


def test_the_decoder_by_hand() -> None:
    tiny = DecoderConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, head_dim=2, vocab_size=100
    )
    weights = 2 * (8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 24) + 8 * 100
    assert decoder_matmul_parameters(tiny) == weights
    # Two documents of 3 and 5 tokens: scores and values, 2 FLOPs each, 8 wide, causal half, 2 layers.
    attention = 2 * (2 * 2 * (9 + 25) * 8) / 2
    assert decoder_flops(tiny, num_tokens=8, sum_squared_lengths=9 + 25) == 3 * (2 * weights * 8 + attention)


def test_a_sparse_layer_counts_the_router_and_top_k_experts() -> None:
    dense = DecoderConfig(
        num_layers=4, hidden_size=8, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=4, head_dim=2, vocab_size=100
    )
    sparse = replace(dense, moe=MoEConfig(num_experts=16, every_n_layers=2, top_k=2))
    more = 2 * (3 * 8 * 24 + 8 * 16)  # in each of two layers, one expert more than the dense MLP, and the router
    assert decoder_matmul_parameters(sparse) - decoder_matmul_parameters(dense) == more


def test_a_sequence_of_mm1_30b() -> None:
    """4096 tokens in one document: 6 N t for the weights, including the output layer, and 3 x 2 x 56 x 6656 x 4096^2 for attention."""
    found = decoder_flops(MM1_30B.decoder, num_tokens=4096, sum_squared_lengths=4096**2)
    layer = 4 * 6656 * 6656 + 3 * 6656 * 17920
    weights, attention = 6 * (56 * layer + 49152 * 6656) * 4096, 3 * 2 * 56 * 6656 * 4096**2
    assert found == weights + attention
    images = 16 * vision_flops(MM1_30B.vision)  # a full sequence's
    assert images == pytest.approx(48.3e12, rel=1e-3)
    # The estimate of 770.8 + 48.3 TFLOP was made independently of this formula; the logits alone are 1%.
    assert found + images == pytest.approx(819.1e12, rel=1.5e-2)


def test_the_image_tower_by_hand() -> None:
    """ViT-H at 378 pixels: 729 patches and a class token; bidirectional attention over 730 tokens."""
    tokens, width = 730, 1280
    layers = 32 * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)
    assert vision_flops(VIT_H_14_378) == pytest.approx(3 * (layers + 2 * 729 * 588 * width), rel=1e-12)


def test_average_pooling_counts_its_linear_layer() -> None:
    config = ConnectorConfig(kind="average", num_tokens=144)
    assert connector_flops(config, VIT_H_14_378, output_size=512) == 3 * 2 * 144 * 1280 * 512


@pytest.mark.parametrize("kind", ["attention", "c_abstractor"])
def test_connectors_against_torchs_counter(kind: str) -> None:
    """The forward pass without pooling, a product with a constant that is not counted as the model's FLOPs."""
    vision = replace(VIT_H_14_378, image_size=14 * 24, hidden_size=256, ffn_hidden_size=512)
    config = ConnectorConfig(kind=kind, num_tokens=144, hidden_size=256)
    with torch.device("meta"):
        connector = build_connector(config, vision=vision, output_size=512, dtype=torch.float32)
        features = torch.empty(1, vision.num_patches, 256)
        with FlopCounterMode(display=False) as counter:
            connector(features)
        with FlopCounterMode(display=False) as pooling:
            if hasattr(connector, "pool"):
                connector.pool(torch.empty(1, 24, 24, 256))
    expected = connector_flops(config, vision, output_size=512) / 3
    assert counter.get_total_flops() - pooling.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_an_unknown_connector_is_counted_as_nothing_else() -> None:
    with pytest.raises(ValueError, match=r"connector\.kind is 'mlp', but must be one of \['attention', 'average', 'c_abstractor'"):
        connector_flops(ConnectorConfig(kind="mlp", num_tokens=144), VIT_H_14_378, output_size=512)


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [("", 30), ("b", 10 + 30 + 20), ("c", 20 + 30), ("abc", 90)],
)
def test_a_chain_costs_what_is_trainable(trainable: str, expected: int) -> None:
    """A weight counts once forward, once more if it is trainable, and once more if anything before it is trainable."""
    count = FlopCount(lambda name: name in trainable)
    for name in "abc":
        count.weight(name, 10.0)
    assert count.flops == expected


def test_a_step_adds_up() -> None:
    decoder = decoder_flops(MM1_30B.decoder, num_tokens=1000, sum_squared_lengths=10**6)
    image = vision_flops(MM1_30B.vision) + connector_flops(MM1_30B.connector, MM1_30B.vision, output_size=6656)
    work = StepWork(num_tokens=1000, sum_squared_lengths=10**6, num_images=5)
    assert MM1.step_flops(MM1_30B, "all", work) == pytest.approx(decoder + 5 * image)


def test_peaks_and_utilisation() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert peak_tflops("cpu", "fp32") is None
    assert mfu(400.0, 989) == pytest.approx(0.4044, abs=1e-4) and mfu(1.0, None) is None
