"""InfiMM (arXiv 2403.01487) for Hugging Face transformers. Part of the checkpoint: imports only torch and transformers.

Image -> EVA-CLIP tower (all tokens of the last block, before the final norm) -> Perceiver resampler -> latents. Gated blocks of the
language model attend to the latents: each token to those of the last image before it. Tensors have the same names as in the authors'
checkpoints.

Shape legend: b sequences, s tokens, n images, t maximum number of images per sequence, p tokens of the tower, v tower width, l latents of
an image, h decoder width, a heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, MistralForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_infimm import InfiMMConfig

LANGUAGE_MODELS = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[n, s, a * d] -> [n, a, s, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[n, a, s, d] -> [n, s, a * d]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


# ----------------------------------------------------------------------------------------------------------------- tower


class EvaRotary(nn.Module):
    """Rotates the patches but not the class token: the first half of a head's channels by the patch's row, the second by its column."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        grid, half = visual["image_size"] // visual["patch_size"], visual["head_width"] // 2
        frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
        positions = torch.arange(grid, dtype=torch.float32) / grid * visual["pt_hw_seq_len"]
        angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=1)
        turns = torch.cat([angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)], dim=-1).flatten(0, 1)
        self.register_buffer("freqs_cos", turns.cos())
        self.register_buffer("freqs_sin", turns.sin())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, a, p, d] -> [n, a, p, d], class token first."""
        patches = x[:, :, 1:].float()
        turned = torch.stack([-patches[..., 1::2], patches[..., 0::2]], dim=-1).flatten(-2)
        return torch.cat([x[:, :, :1], (patches * self.freqs_cos + turned * self.freqs_sin).to(x.dtype)], dim=2)


class EvaAttention(nn.Module):
    """Attention of every token to all tokens of its image.

    EVA02-L has three projections, rotary positions and an inner norm; EVA01-g and EVA02-bigE have one projection. Keys have no bias.
    """

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width = visual["width"]
        self.num_heads, self.split = width // visual["head_width"], visual["naiveswiglu"]
        if self.split:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
            self.inner_attn_ln = nn.LayerNorm(width, eps=1e-6)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.proj = nn.Linear(width, width)
        self.rope = EvaRotary(visual) if visual["rope"] else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.q_proj(x), self.k_proj(x), self.v_proj(x)) if self.split else self.qkv(x).chunk(3, dim=-1)
        q, k, v = (_heads(part, self.num_heads) for part in (q + self.q_bias, k, v + self.v_bias))
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        out = _attend(q, k, v)
        return self.proj(self.inner_attn_ln(out) if self.split else out)


class EvaMLP(nn.Module):
    """A SwiGLU with an inner norm, or a GELU MLP."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width, inner = visual["width"], int(visual["width"] * visual["mlp_ratio"])
        self.gated = visual["naiveswiglu"]
        if self.gated:
            self.w1, self.w2, self.w3 = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
            self.ffn_ln = nn.LayerNorm(inner, eps=1e-6)
        else:
            self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))
        return self.fc2(F.gelu(self.fc1(x)))


class EvaBlock(nn.Module):
    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        self.postnorm = visual["postnorm"]
        self.norm1, self.norm2 = (nn.LayerNorm(visual["width"], eps=1e-6) for _ in range(2))
        self.attn, self.mlp = EvaAttention(visual), EvaMLP(visual)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.postnorm:
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class EvaTower(nn.Module):
    """EVA-CLIP's vision transformer. Checkpoints contain its final norm and head, but InfiMM does not use them."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width, patch = visual["width"], visual["patch_size"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (visual["image_size"] // patch) ** 2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.rope = EvaRotary(visual) if visual["rope"] else None  # unused here; its tables are in checkpoints
        self.blocks = nn.ModuleList(EvaBlock(visual) for _ in range(visual["layers"]))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, visual["embed_dim"])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] -> [n, p, v]."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


# ----------------------------------------------------------------------------------------------------- resampler and gates


def _feed_forward(width: int, multiplier: int) -> nn.Sequential:
    inner = width * multiplier
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False))


class PerceiverAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_dim
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, inner, bias=False), nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """[n, p, v], [n, l, v] -> [n, l, v]."""
        latents = self.norm_latents(latents)
        k, v = self.to_kv(torch.cat([self.norm_media(features), latents], dim=1)).chunk(2, dim=-1)
        return self.to_out(_attend(*(_heads(x, self.num_heads) for x in (self.to_q(latents), k, v))))


class Perceiver(nn.Module):
    """Resampler: in each layer, learned latents attend to the tokens of an image and to themselves."""

    def __init__(self, config: InfiMMConfig) -> None:
        super().__init__()
        width, sizes = config.visual["width"], config.resampler_config
        heads = (sizes["num_attention_heads"], sizes["head_dim"])
        self.latents = nn.Parameter(torch.zeros(sizes["num_latents"], width))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, *heads), _feed_forward(width, sizes["ffn_multiplier"])])
            for _ in range(sizes["num_layers"])
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, p, v] -> [n, l, v]."""
        x = self.latents.expand(len(features), -1, -1)
        for attention, ffn in self.layers:
            x = x + attention(features, x)
            x = x + ffn(x)
        return self.norm(x)


class MaskedCrossAttention(nn.Module):
    def __init__(self, config: InfiMMConfig) -> None:
        super().__init__()
        width, sizes = config.language.hidden_size, config.gated_config
        self.num_heads, inner = sizes["num_attention_heads"], sizes["num_attention_heads"] * sizes["head_dim"]
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(config.visual["width"], 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[b, s, h], [b, t * l, v], [b, s, t * l] -> [b, s, h]; zero for tokens that attend to no image."""
        k, v = self.to_kv(latents).chunk(2, dim=-1)
        q, k, v = (_heads(part, self.num_heads) for part in (self.to_q(self.norm(x)), k, v))
        sees = mask.any(dim=-1, keepdim=True)
        return self.to_out(torch.where(sees, _attend(q, k, v, (mask | ~sees)[:, None]), 0))


class GatedBlock(nn.Module):
    def __init__(self, config: InfiMMConfig) -> None:
        super().__init__()
        self.attn_gate, self.ff_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.attn = MaskedCrossAttention(config)
        self.ff = _feed_forward(config.language.hidden_size, config.gated_config["ffn_multiplier"])

    def forward(self, x: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor, has_images: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]; sequences without any image are not changed."""
        y = x + self.attn_gate.tanh() * self.attn(x, latents, mask)
        y = y + self.ff_gate.tanh() * self.ff(y)
        return torch.where(has_images[:, None, None], y, x)


class InfiMMLayer(nn.Module):
    """A decoder layer and the gated block before it. The latents and masks for the block (`media`) are set before the decoder runs."""

    def __init__(self, decoder_layer: nn.Module, config: InfiMMConfig, *, gated: bool) -> None:
        super().__init__()
        self.decoder_layer = decoder_layer
        self.gated_cross_attn_layer = GatedBlock(config) if gated else None
        self.media: tuple[torch.Tensor, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # transformers reads attributes of its layers, such as their kind of attention
            return getattr(super().__getattr__("decoder_layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.gated_cross_attn_layer is not None and self.media is not None:
            media = (part.to(hidden_states.device) for part in self.media)  # layers may be on different devices
            hidden_states = self.gated_cross_attn_layer(hidden_states, *media)
        return self.decoder_layer(hidden_states, *args, **kwargs)


# ----------------------------------------------------------------------------------------------------------------- model


class InfiMMPreTrainedModel(PreTrainedModel):
    config_class = InfiMMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["InfiMMLayer", "EvaBlock"]  # noqa: RUF012
    _supports_sdpa = True


class InfiMMForConditionalGeneration(InfiMMPreTrainedModel, GenerationMixin):
    """InfiMM with its language-model head."""

    def __init__(self, config: InfiMMConfig) -> None:
        super().__init__(config)
        language = LANGUAGE_MODELS[config.language.model_type](config.language)
        every = config.cross_attn_every_n_layers
        language.model.layers = nn.ModuleList(
            InfiMMLayer(layer, config, gated=(number + 1) % every == 0) for number, layer in enumerate(language.model.layers)
        )
        parts = {"vision_encoder": EvaTower(config.visual), "perceiver": Perceiver(config), "lang_encoder": language}
        self.model = nn.ModuleDict(parts)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model["lang_encoder"].get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model["lang_encoder"].set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model["lang_encoder"].get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model["lang_encoder"].set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.model["lang_encoder"].model

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images: normalised pixels [n, 3, H, W] -> latents [n, l, v]."""
        pixels = pixel_values.to(self.model["perceiver"].latents)
        return self.model["perceiver"](self.model["vision_encoder"](pixels))

    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        image_numbers: torch.LongTensor | None = None,
        image_latents: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if labels are given.

        Args:
            input_ids: [b, s], with two tokens for each image.
            pixel_values: normalised pixels [b, t, 3, H, W]: each sequence's images, followed by padding.
            labels: [b, s], not shifted; -100 for tokens without a loss.
            image_numbers: [b, s], number of the image that each token attends to, from 1; 0 for none. By default counted from input_ids.
            image_latents: [b, t, l, v], results of `get_image_features`, to pass instead of pixel_values if images are already encoded.
        """
        kwargs.pop("return_dict", None)
        if image_numbers is None:
            image_numbers = (input_ids == self.config.image_token_id).cumsum(dim=1)
        if image_latents is None and pixel_values is not None:
            image_latents = self._encode(pixel_values)
        media = None if image_latents is None else _media(image_latents, image_numbers)
        for layer in self.model["lang_encoder"].model.layers:
            layer.media = media
        try:
            return self.model["lang_encoder"](input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        finally:
            for layer in self.model["lang_encoder"].model.layers:
                layer.media = None

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[b, t, 3, H, W] -> [b, t, l, v]."""
        return self.get_image_features(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])

    @torch.no_grad()
    def generate(self, *args: Any, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as in transformers, but encode the images only once for all steps."""
        if pixel_values is not None:
            kwargs["image_latents"] = self._encode(pixel_values)
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Add `image_numbers`, counted from the whole text, because with a cache the step's own input is only the last token."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        numbers = (input_ids == self.config.image_token_id).cumsum(dim=1)
        inputs["image_numbers"] = numbers[:, -inputs["input_ids"].shape[1] :]
        return inputs


def _media(latents: torch.Tensor, image_numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the latents [b, t, l, v] flattened to [b, t * l, v], a mask of the latents that each token attends to [b, s, t * l], and which
    sequences have images [b]."""
    numbers = torch.arange(1, latents.shape[1] + 1, device=latents.device).repeat_interleave(latents.shape[2])
    mask = image_numbers[:, :, None].to(latents.device) == numbers
    return latents.flatten(1, 2), mask, (image_numbers[:, -1] > 0).to(latents.device)


# Makes `save_pretrained` write this file, too, in every version of transformers.
InfiMMForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
