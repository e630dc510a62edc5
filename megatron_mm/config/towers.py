"""Configurations of published image towers, and small ones of the same kind for tests."""

from __future__ import annotations

from megatron_mm.config.blocks import EvaConfig, VisionConfig

VIT_L_14_336 = VisionConfig(image_size=336, patch_size=14, hidden_size=1024, num_layers=24, num_attention_heads=16, ffn_hidden_size=4096)
"""OpenAI CLIP ViT-L/14 at 336 px: 24 x 24 patches."""

VIT_H_14_224 = VisionConfig(image_size=224, patch_size=14, hidden_size=1280, num_layers=32, num_attention_heads=16, ffn_hidden_size=5120)
"""DFN5B CLIP ViT-H/14 at 224 px: 16 x 16 patches. Quick-GELU, as in OpenAI's models."""

VIT_H_14_378 = VisionConfig(image_size=378, patch_size=14, hidden_size=1280, num_layers=32, num_attention_heads=16, ffn_hidden_size=5120)
"""DFN5B CLIP ViT-H/14 at 378 px, MM1's image encoder: 27 x 27 patches, 631,371,520 parameters."""

VIT_TINY = VisionConfig(image_size=32, patch_size=4, hidden_size=64, num_layers=2, num_attention_heads=4, ffn_hidden_size=256)
"""A tower that can be trained on a CPU: 8 x 8 patches, 107,520 parameters."""

EVA02_L_14_336 = EvaConfig(
    image_size=336,
    patch_size=14,
    hidden_size=1024,
    num_layers=24,
    num_attention_heads=16,
    ffn_hidden_size=2730,
    output_size=768,
    swiglu=True,
    rotary_grid=16,
    resize="crop",
)
"""EVA02-CLIP-L/14 at 336 px: 24 x 24 patches, 304,432,832 parameters."""

EVA01_G_14_224 = EvaConfig(
    image_size=224,
    patch_size=14,
    hidden_size=1408,
    num_layers=40,
    num_attention_heads=16,
    ffn_hidden_size=6144,
    output_size=1024,
    resize="crop",
)
"""EVA01-CLIP-g/14 at 224 px: 16 x 16 patches, 1,012,588,928 parameters."""

EVA02_BIGE_14_224 = EvaConfig(
    image_size=224,
    patch_size=14,
    hidden_size=1792,
    num_layers=64,
    num_attention_heads=16,
    ffn_hidden_size=15360,
    output_size=1024,
    block="post_norm",
    resize="crop",
)
"""EVA02-CLIP-bigE/14 at 224 px: 16 x 16 patches, 4,350,556,928 parameters."""

EVA_TINY = EvaConfig(
    image_size=32,
    patch_size=4,
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    ffn_hidden_size=170,
    output_size=32,
    swiglu=True,
    rotary_grid=4,
)
"""A small tower like EVA02-L for a CPU: 8 x 8 patches, 110,256 parameters."""
