"""Mono-InternVL (arXiv 2410.08202) for Hugging Face transformers. Part of the checkpoint: imports only torch and transformers.

Tile -> patches with learned positions -> squares of patches -> image tokens in the decoder's sequence. In every layer, image tokens go
through a feed-forward network of their own, the visual expert. Tensors have the same names as in the authors' checkpoints.

The decoder is based on transformers' Llama: InternLM2 differs from it only in a single projection for queries, keys and values, and in the
names of its parts.

Shape legend: b sequences, s tokens, n tiles, g patches along one side of a tile, u patches along a square's side, v patch width,
k = (g / u)^2 tokens of a tile, h decoder width, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from .configuration_mono_internvl import MonoInternVLConfig
from .image_tokens import ImageTokens, cache_of

# ----------------------------------------------------------------------------------------------------------------- patches


class PatchEmbeddings(nn.Module):
    """Patch embedding with learned positions. Checkpoints contain a class embedding and its position, which are not used."""

    def __init__(self, config: MonoInternVLConfig) -> None:
        super().__init__()
        vision = config.vision_config
        width, patch = vision["hidden_size"], vision["patch_size"]
        self.grid = vision["image_size"] // patch
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + self.grid**2, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] -> [n, g, g, v]."""
        patches = self.patch_embedding(pixels)
        positions = self.position_embedding[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        if patches.shape[2:] != positions.shape[2:]:
            positions = F.interpolate(positions.float(), size=patches.shape[2:], mode="bicubic", align_corners=False).to(patches.dtype)
        return (patches + positions).permute(0, 2, 3, 1)


class VisionModel(nn.Module):
    """The patch embedding, under its name in checkpoints; there is no image tower."""

    def __init__(self, config: MonoInternVLConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)


def unshuffle(patches: torch.Tensor, side: int) -> torch.Tensor:
    """Concatenate each square of patches to one vector, row by row: [n, g, g, v] -> [n, k, u * u * v]."""
    squares = patches.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [n, rows, u, columns, u, v]
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


# ----------------------------------------------------------------------------------------------------------------- decoder


class InternLM2Attention(LlamaAttention):
    """Llama's attention with a single projection, whose rows are grouped by key/value head: the group's queries, its key, its value."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in "qkvo":
            del self._modules[f"{name}_proj"]
        self.num_groups = config.num_key_value_heads
        heads = config.num_attention_heads
        self.wqkv = nn.Linear(config.hidden_size, (heads + 2 * self.num_groups) * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self._left: list[torch.Tensor] = []

    # Llama's forward calls q_proj, k_proj and v_proj in this order.

    def q_proj(self, x: torch.Tensor) -> torch.Tensor:
        groups = self.wqkv(x).unflatten(-1, (self.num_groups, -1, self.head_dim))
        self._left = [groups[..., -1, :].flatten(-2), groups[..., -2, :].flatten(-2)]
        return groups[..., :-2, :].flatten(-3)

    def k_proj(self, x: torch.Tensor) -> torch.Tensor:
        return self._left.pop()

    def v_proj(self, x: torch.Tensor) -> torch.Tensor:
        return self._left.pop()

    def o_proj(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(x)


class FeedForward(nn.Module):
    """SwiGLU: w1 is the gate, w3 the other branch, w2 the output projection."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.w1, self.w3, self.w2 = (
            nn.Linear(width, inner, bias=False),
            nn.Linear(width, inner, bias=False),
            nn.Linear(inner, width, bias=False),
        )
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class MonoInternVLLayer(LlamaDecoderLayer):
    """Llama's layer with a visual expert. The mask of image tokens (`is_image`) is set before the decoder runs."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        made = {name: self._modules.pop(name) for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")}
        self.attention_norm, self.ffn_norm = made["input_layernorm"], made["post_attention_layernorm"]
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward, self.feed_forward_ve = FeedForward(config), FeedForward(config)
        self.is_image: torch.Tensor | None = None

    # The names under which Llama's forward calls these modules.

    def self_attn(self, *args: Any, **kwargs: Any) -> Any:
        return self.attention(*args, **kwargs)

    def input_layernorm(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention_norm(x)

    def post_attention_layernorm(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn_norm(x)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]; each token goes through one of the two networks."""
        if self.is_image is None:
            return self.feed_forward(x)
        is_image, out = self.is_image.to(x.device), torch.empty_like(x)
        out[is_image] = self.feed_forward_ve(x[is_image])
        out[~is_image] = self.feed_forward(x[~is_image])
        return out


class InternLM2Model(LlamaModel):
    """The decoder without its output layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = self._modules.pop("embed_tokens")
        self.layers = nn.ModuleList(MonoInternVLLayer(config, number) for number in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tok_embeddings = value


class InternLM2(nn.Module):
    """The decoder with its output layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


# ------------------------------------------------------------------------------------------------------------------- model


class MonoInternVLPreTrainedModel(PreTrainedModel):
    config_class = MonoInternVLConfig
    base_model_prefix = ""
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    _no_split_modules = ["MonoInternVLLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_attention_backend = True


class InternVLChatModel(ImageTokens, MonoInternVLPreTrainedModel, GenerationMixin):
    """Mono-InternVL with its output layer."""

    _tied_weights_keys = {"language_model.output.weight": "language_model.model.tok_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: MonoInternVLConfig) -> None:
        super().__init__(config)
        self.squares = round(1 / config.downsample_ratio)
        width, out = self.squares**2 * config.vision_config["hidden_size"], config.llm_config.hidden_size
        self.vision_model = VisionModel(config)
        self.mlp1 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
        self.language_model = InternLM2(config.llm_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.output = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.language_model.model

    @property
    def tokens_per_square(self) -> int:
        return (self.config.force_image_size // self.config.vision_config["patch_size"] // self.squares) ** 2

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode tiles: normalised pixels [n, 3, H, W] -> image tokens [n, k, h]."""
        pixels = pixel_values.to(self.vision_model.embeddings.position_embedding)
        return self.mlp1(unshuffle(self.vision_model.embeddings(pixels), self.squares))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if labels are given.

        Args:
            input_ids: [b, s]; each image is <img>, one <IMG_CONTEXT> for each token of its tiles, and </img>.
            pixel_values: normalised tiles, as returned by `MonoInternVLProcessor`: [b, maximum tiles of a sequence, 3, H, W], each
                sequence's tiles followed by padding; or [n, 3, H, W], the tiles of all sequences in order.
            inputs_embeds: [b, s, h], instead of input_ids; then all tokens are processed as text.
            labels: [b, s], not shifted; -100 for tokens without a loss.
        """
        kwargs.pop("return_dict", None)
        is_image = None
        if inputs_embeds is None:
            inputs_embeds = self.embed_with_images(input_ids, pixel_values)
            is_image = input_ids == self.config.image_token_id
        elif pixel_values is not None:
            raise ValueError("pixel_values need input_ids to locate the images: pass input_ids, not inputs_embeds")
        body = self.language_model.model
        for layer in body.layers:
            layer.is_image = is_image if is_image is not None and is_image.any() else None
        try:
            outputs = body(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        finally:
            for layer in body.layers:
                layer.is_image = None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language_model.output(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.llm_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cache_of(outputs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Makes `save_pretrained` write this file, too, in every version of transformers.
InternVLChatModel.register_for_auto_class("AutoModelForCausalLM")
