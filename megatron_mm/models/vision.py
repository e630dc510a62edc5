"""The image tower: a CLIP vision transformer made of megatron-core's layers.

A tower is never split over processes: each process of a tensor-parallel group has all of it and encodes its own share of the images. So its
layers are built with a separate configuration without parallelism, and with process groups of one process. They use the same specs as the
decoder's layers, so on a GPU they are Transformer Engine's.

Shape legend: n images, g patches along one side, p = g * g patches, s = p + 1 tokens (class token first), v tower width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core import activations
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm.config import VisionConfig
from megatron_mm.models.decoder import NO_INITIALIZATION, recompute_options
from megatron_mm.models.layers import TorchNorm
from megatron_mm.models.plain import ImageConvolution, PixelNormalization

TOWER_MODULES = ("core_attn", "mlp", "layernorm")
"""Modules that selective recompute may name in a tower, which has no experts."""


def vision_transformer_config(
    config: VisionConfig, *, params_dtype: torch.dtype, recompute: str, on_gpu: bool, recompute_modules: Sequence[str] = ("core_attn",)
) -> TransformerConfig:
    """Translate the tower's configuration to megatron-core's: LayerNorm, biases everywhere, no parallelism, no dropout.

    The tower stays in params_dtype under FP8 training: FP8 matrix products need token counts that are multiples of 16, and the tower's
    counts (for example images x 730) are not.

    Args:
        recompute: as `ParallelConfig.recompute`.
        recompute_modules: as `ParallelConfig.recompute_modules`; modules of experts are ignored.
        on_gpu: allocate on the current CUDA device rather than on torch's default device.
    """
    # Looked up here, not when this module is imported, because on a CPU platform.cpu replaces megatron-core's compiled activations.
    activation_funcs = {"quick_gelu": activations.quick_gelu, "gelu": F.gelu}
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=config.norm_epsilon,
        activation_func=activation_funcs[config.activation],
        add_bias_linear=True,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype is torch.bfloat16,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,  # megatron-core has no fused kernel for quick-GELU without a gate
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=not on_gpu,
        **NO_INITIALIZATION,
        **recompute_options(recompute, [module for module in recompute_modules if module in TOWER_MODULES]),
    )


class VisionTower(torch.nn.Module):
    """CLIP's vision transformer without its projection: pixels [n, 3, H, W] -> patch features [n, p, v].

    The features are the output of the last layer after the final LayerNorm. The class token takes part in attention, so its parameters
    have gradients, and is dropped at the end. Weights are allocated and marked with their initial scale: that of OpenAI's CLIP, with
    widths for fan-in.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        layer_spec: ModuleSpec,
        transformer_config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """
        Args:
            layer_spec: spec of a bidirectional layer (`layers.vision_layer_spec`).
            transformer_config: result of `vision_transformer_config`.
            pg_collection: process groups of this process alone.
        """
        super().__init__()
        self.config = config
        width, dtype = config.hidden_size, transformer_config.params_dtype
        patch = config.patch_size
        device = torch.get_default_device()  # skip_init ignores `with torch.device(...)`
        self.patch_embedding = torch.nn.utils.skip_init(
            ImageConvolution, 3, width, patch, stride=patch, bias=False, dtype=dtype, device=device
        )
        self.class_embedding = torch.nn.Parameter(torch.empty(width, dtype=dtype))
        self.position_embedding = torch.nn.Parameter(torch.empty(config.num_patches + 1, width, dtype=dtype))
        self.pre_norm = TorchNorm(transformer_config, width, config.norm_epsilon)
        layers = TransformerBlockSubmodules(layer_specs=[layer_spec] * config.num_layers)
        self.transformer = TransformerBlock(
            transformer_config, layers, post_layer_norm=False, pre_process=True, post_process=True, pg_collection=pg_collection
        )
        self.post_norm = TorchNorm(transformer_config, width, config.norm_epsilon)
        self.normalize = PixelNormalization(config.mean, config.std)
        self._mark_initial_scales()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            pixels: [n, 3, H, W] uint8, RGB, H = W = `config.image_size`.

        Returns:
            [n, p, v] in the parameters' type, patches row by row.
        """
        size = self.config.image_size
        assert pixels.shape[1:] == (3, size, size), f"pixels of shape {tuple(pixels.shape)}, but the tower takes [n, 3, {size}, {size}]"
        normalised = self.normalize(pixels).to(self.class_embedding.dtype)
        patches_npv = self.patch_embedding(normalised).flatten(2).transpose(1, 2)
        class_n1v = self.class_embedding.expand(pixels.shape[0], 1, -1)
        tokens_nsv = torch.cat([class_n1v, patches_npv], dim=1) + self.position_embedding
        hidden_snv = self.pre_norm(tokens_nsv).transpose(0, 1).contiguous()
        hidden_snv = self.transformer(hidden_snv, attention_mask=None)
        return self.post_norm(hidden_snv[1:]).transpose(0, 1)

    def _mark_initial_scales(self) -> None:
        config = self.config
        width_std = config.hidden_size**-0.5
        stds = {
            "patch_embedding.weight": (3 * config.patch_size**2) ** -0.5,
            "class_embedding": width_std,
            "position_embedding": width_std,
            "linear_qkv.weight": width_std,
            "linear_proj.weight": width_std / math.sqrt(2 * config.num_layers),
            "linear_fc1.weight": width_std / math.sqrt(2),
            "linear_fc2.weight": width_std / math.sqrt(2 * config.num_layers),
        }
        for name, parameter in self.named_parameters():
            if name.endswith(("norm.weight", "layer_norm_weight")):
                parameter.init_value = 1.0  # type: ignore[attr-defined]
            elif not name.endswith("bias"):
                parameter.init_std = next(std for key, std in stds.items() if name.endswith(key))  # type: ignore[attr-defined]
