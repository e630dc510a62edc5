"""InfiMM in plain PyTorch for one document on one process, its parameters under the names of released checkpoints.

It is written from the definition of the model and shares no code with `megatron_mm`, which is compared with it. Speed and memory do not
matter: attention is written out, and masks are whole matrices.

    model.vision_encoder    EVA-CLIP: pixels -> all tokens of the last block, before the final norm
    model.perceiver         Perceiver resampler: the tokens of an image -> its latents
    model.lang_encoder      Llama or Mistral with gated cross-attention before some of its layers

Left out: Mistral's sliding window of 4096 tokens, which is longer than any of InfiMM's training sequences. The authors' modules register
the decoder's layers and gated blocks a second time as `old_decoder_blocks` and `gated_cross_attn_layers`; here they have one name each.

Shape legend: s tokens of the document, n images, p tokens of the tower (class token first), l latents of an image, a heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support.plain_attention import attend, join_heads, rotate, split_heads


@dataclass(frozen=True)
class TowerSizes:
    """An EVA-CLIP tower."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    ffn: int
    output: int
    eva02: bool = False
    """If True (EVA02-L): three projections, SwiGLU, norms inside attention and MLP, rotary positions; else one projection, GELU MLP."""
    post_norm: bool = False
    """If True, x + norm(f(x)); else x + f(norm(x))."""
    rotary_grid: int = 16
    """Number of rotary positions that rows and columns are spread over (eva02 only)."""

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class InfiMMSizes:
    """An InfiMM."""

    tower: TowerSizes
    vocab: int
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    every: int
    """A gated block precedes each layer i (from 0) with (i + 1) % every == 0."""
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    image_token: int = 32001
    latents: int = 64
    resampler_layers: int = 6
    cross_heads: int = 8
    """Heads of the resampler's and of the gated blocks' attention."""
    cross_head_dim: int = 64
    ffn_multiplier: int = 4


EVA02_L_336 = TowerSizes(image_size=336, patch_size=14, width=1024, layers=24, heads=16, ffn=2730, output=768, eva02=True)
EVA01_G_224 = TowerSizes(image_size=224, patch_size=14, width=1408, layers=40, heads=16, ffn=6144, output=1024)
EVA02_BIGE_224 = TowerSizes(image_size=224, patch_size=14, width=1792, layers=64, heads=16, ffn=15360, output=1024, post_norm=True)
INFIMM_ZEPHYR = InfiMMSizes(tower=EVA02_L_336, vocab=32002, width=4096, ffn=14336, layers=32, heads=32, kv_heads=8, every=2)


class InfiMMReference(nn.Module):
    """Token ids and images of one document -> logits."""

    def __init__(self, sizes: InfiMMSizes) -> None:
        super().__init__()
        self.model = Flamingo(sizes)

    def forward(self, ids_s: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            ids_s: [s] int64; every image is one image token, with the end-of-chunk token before it.
            pixels: [n, 3, H, W] normalised floats, in the order of the image tokens.

        Returns:
            [s, vocab].
        """
        return self.model(ids_s, pixels)


class Flamingo(nn.Module):
    def __init__(self, sizes: InfiMMSizes) -> None:
        super().__init__()
        self.image_token = sizes.image_token
        self.vision_encoder = EvaReference(sizes.tower)
        self.perceiver = Perceiver(sizes)
        self.lang_encoder = LanguageModel(sizes)

    def forward(self, ids_s: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        is_image_s = ids_s == self.image_token
        assert int(is_image_s.sum()) == len(pixels), f"{int(is_image_s.sum())} image tokens, but {len(pixels)} images"
        with torch.no_grad():
            features_npv = self.vision_encoder(pixels)
        return self.lang_encoder(ids_s, self.perceiver(features_npv), is_image_s.cumsum(0))


# ----------------------------------------------------------------------------------------------------------------- tower


class EvaReference(nn.Module):
    """EVA-CLIP's vision transformer; `norm` and `head` are in checkpoints, but InfiMM does not use them."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.grid**2, sizes.width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, sizes.width, sizes.patch_size, stride=sizes.patch_size)
        # One module under `rope` and under every block's `attn.rope`, as in the authors' model: checkpoints hold all these names.
        self.rope = EvaRope(sizes) if sizes.eva02 else None
        self.blocks = nn.ModuleList(EvaBlock(sizes, self.rope) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.head = nn.Linear(sizes.width, sizes.output)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] normalised floats -> [n, p, v]."""
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


class EvaBlock(nn.Module):
    def __init__(self, sizes: TowerSizes, rope: EvaRope | None) -> None:
        super().__init__()
        self.post_norm = sizes.post_norm
        self.norm1 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.attn = Eva02Attention(sizes, rope) if sizes.eva02 else Eva01Attention(sizes)
        self.norm2 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.mlp = EvaSwiGLU(sizes) if sizes.eva02 else EvaMLP(sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post_norm:
            x = x + self.norm1(self.attn(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Eva02Attention(nn.Module):
    """EVA02-L: three projections, rotary positions, a norm before the output projection."""

    def __init__(self, sizes: TowerSizes, rope: EvaRope) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.q_proj = nn.Linear(sizes.width, sizes.width, bias=False)
        self.k_proj = nn.Linear(sizes.width, sizes.width, bias=False)
        self.v_proj = nn.Linear(sizes.width, sizes.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(sizes.width))
        self.v_bias = nn.Parameter(torch.zeros(sizes.width))
        self.inner_attn_ln = nn.LayerNorm(sizes.width, eps=1e-6)
        self.proj = nn.Linear(sizes.width, sizes.width)
        self.rope = rope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = split_heads(self.q_proj(x) + self.q_bias, self.heads)
        k = split_heads(self.k_proj(x), self.heads)
        v = split_heads(self.v_proj(x) + self.v_bias, self.heads)
        q, k = self.rope(q), self.rope(k)
        return self.proj(self.inner_attn_ln(join_heads(attend(q, k, v))))


class Eva01Attention(nn.Module):
    """EVA01-g and EVA02-bigE: one projection, queries' rows first, then keys', then values'."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(sizes.width))
        self.v_bias = nn.Parameter(torch.zeros(sizes.width))
        self.proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (q + self.q_bias, k, v + self.v_bias))
        return self.proj(join_heads(attend(q, k, v)))


class EvaRope(nn.Module):
    """Rotary positions of patches (not the class token): the first half of a head's channels by the row, the second by the column.

    Neighbouring channels 2i and 2i + 1 of a half of h channels are a pair, rotated by position * 10000^(-2i / h). Patch number r of g in
    a row or column is at position r / g * rotary_grid.
    """

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        half = sizes.width // sizes.heads // 2
        angles = torch.zeros(sizes.grid, sizes.grid, 2 * half)
        for i in range(half // 2):
            for place in range(sizes.grid):
                angle = place / sizes.grid * sizes.rotary_grid * 10000.0 ** (-2 * i / half)
                angles[place, :, 2 * i : 2 * i + 2] = angle
                angles[:, place, half + 2 * i : half + 2 * i + 2] = angle
        self.register_buffer("freqs_cos", angles.flatten(0, 1).cos())
        self.register_buffer("freqs_sin", angles.flatten(0, 1).sin())

    def forward(self, x_napd: torch.Tensor) -> torch.Tensor:
        patches = x_napd[:, :, 1:]
        turned_90 = torch.stack([-patches[..., 1::2], patches[..., 0::2]], dim=-1).flatten(-2)
        return torch.cat([x_napd[:, :, :1], patches * self.freqs_cos + turned_90 * self.freqs_sin], dim=2)


class EvaSwiGLU(nn.Module):
    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.w1 = nn.Linear(sizes.width, sizes.ffn)
        self.w2 = nn.Linear(sizes.width, sizes.ffn)
        self.ffn_ln = nn.LayerNorm(sizes.ffn, eps=1e-6)
        self.w3 = nn.Linear(sizes.ffn, sizes.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class EvaMLP(nn.Module):
    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.width, sizes.ffn)
        self.fc2 = nn.Linear(sizes.ffn, sizes.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


# ----------------------------------------------------------------------------------------------------- resampler and gates


def feed_forward(width: int, multiplier: int) -> nn.Sequential:
    """LayerNorm, linear, GELU, linear: entries 0, 1, 2, 3."""
    inner = width * multiplier
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False))


class Perceiver(nn.Module):
    """Learned latents attend to the tokens of an image and to themselves in every layer."""

    def __init__(self, sizes: InfiMMSizes) -> None:
        super().__init__()
        width = sizes.tower.width
        self.latents = nn.Parameter(torch.zeros(sizes.latents, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(sizes), feed_forward(width, sizes.ffn_multiplier)]) for _ in range(sizes.resampler_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features_npv: torch.Tensor) -> torch.Tensor:
        """[n, p, v] -> [n, l, v]."""
        x_nlv = self.latents.expand(len(features_npv), -1, -1)
        for attention, ffn in self.layers:
            x_nlv = x_nlv + attention(features_npv, x_nlv)
            x_nlv = x_nlv + ffn(x_nlv)
        return self.norm(x_nlv)


class PerceiverAttention(nn.Module):
    def __init__(self, sizes: InfiMMSizes) -> None:
        super().__init__()
        width, inner = sizes.tower.width, sizes.cross_heads * sizes.cross_head_dim
        self.heads = sizes.cross_heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features_npv: torch.Tensor, latents_nlv: torch.Tensor) -> torch.Tensor:
        latents_nlv = self.norm_latents(latents_nlv)
        k, v = self.to_kv(torch.cat([self.norm_media(features_npv), latents_nlv], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(x, self.heads) for x in (self.to_q(latents_nlv), k, v))
        return self.to_out(join_heads(attend(q, k, v)))


class GatedBlock(nn.Module):
    """Cross-attention and feed-forward, each through a gate that starts closed."""

    def __init__(self, sizes: InfiMMSizes) -> None:
        super().__init__()
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff_gate = nn.Parameter(torch.zeros(1))
        self.attn = MaskedCrossAttention(sizes)
        self.ff = feed_forward(sizes.width, sizes.ffn_multiplier)

    def forward(self, x_sh: torch.Tensor, latents_nlv: torch.Tensor, text_time_s: torch.Tensor) -> torch.Tensor:
        if len(latents_nlv) == 0:  # a document without images skips the whole block
            return x_sh
        x_sh = x_sh + self.attn_gate.tanh() * self.attn(x_sh, latents_nlv, text_time_s)
        return x_sh + self.ff_gate.tanh() * self.ff(x_sh)


class MaskedCrossAttention(nn.Module):
    """A token attends to the latents of the last image before it or at it, and to nothing if there is none.

    Worked example, with i for an image token: the document `a i b i c` has text times 0 1 1 2 2. `a` gets 0; the first `i` and `b` attend
    to the first image; the second `i` and `c` to the second.
    """

    def __init__(self, sizes: InfiMMSizes) -> None:
        super().__init__()
        inner = sizes.cross_heads * sizes.cross_head_dim
        self.heads = sizes.cross_heads
        self.norm = nn.LayerNorm(sizes.width)
        self.to_q = nn.Linear(sizes.width, inner, bias=False)
        self.to_kv = nn.Linear(sizes.tower.width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, sizes.width, bias=False)

    def forward(self, x_sh: torch.Tensor, latents_nlv: torch.Tensor, text_time_s: torch.Tensor) -> torch.Tensor:
        num_images, num_latents = latents_nlv.shape[:2]
        k, v = self.to_kv(latents_nlv.flatten(0, 1)).chunk(2, dim=-1)
        q, k, v = (split_heads(x[None], self.heads) for x in (self.to_q(self.norm(x_sh)), k, v))
        image_of_key = torch.arange(1, num_images + 1).repeat_interleave(num_latents)
        attended = attend(q, k, v, mask=text_time_s[:, None] == image_of_key)
        attended = torch.where(text_time_s[:, None] == 0, 0.0, attended)
        return self.to_out(join_heads(attended)[0])


# --------------------------------------------------------------------------------------------------------- language model


class LanguageModel(nn.Module):
    """Llama and Mistral: RMSNorm, grouped queries, rotary positions over half-split channels, SwiGLU, no biases."""

    def __init__(self, sizes: InfiMMSizes) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(sizes.vocab, sizes.width)
        self.model.layers = nn.ModuleList(FlamingoLayer(sizes, index) for index in range(sizes.layers))
        self.model.norm = nn.RMSNorm(sizes.width, eps=sizes.rms_eps)
        self.lm_head = nn.Linear(sizes.width, sizes.vocab, bias=False)

    def forward(self, ids_s: torch.Tensor, latents_nlv: torch.Tensor, text_time_s: torch.Tensor) -> torch.Tensor:
        x_sh = self.model.embed_tokens(ids_s)
        for layer in self.model.layers:
            x_sh = layer(x_sh, latents_nlv, text_time_s)
        return self.lm_head(self.model.norm(x_sh))


class FlamingoLayer(nn.Module):
    def __init__(self, sizes: InfiMMSizes, index: int) -> None:
        super().__init__()
        self.gated_cross_attn_layer = GatedBlock(sizes) if (index + 1) % sizes.every == 0 else None
        self.decoder_layer = DecoderLayer(sizes)

    def forward(self, x_sh: torch.Tensor, latents_nlv: torch.Tensor, text_time_s: torch.Tensor) -> torch.Tensor:
        if self.gated_cross_attn_layer is not None:
            x_sh = self.gated_cross_attn_layer(x_sh, latents_nlv, text_time_s)
        return self.decoder_layer(x_sh)


class DecoderLayer(nn.Module):
    def __init__(self, sizes: InfiMMSizes) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(sizes.width, eps=sizes.rms_eps)
        self.self_attn = SelfAttention(sizes)
        self.post_attention_layernorm = nn.RMSNorm(sizes.width, eps=sizes.rms_eps)
        self.mlp = GatedMLP(sizes)

    def forward(self, x_sh: torch.Tensor) -> torch.Tensor:
        x_sh = x_sh + self.self_attn(self.input_layernorm(x_sh))
        return x_sh + self.mlp(self.post_attention_layernorm(x_sh))


class SelfAttention(nn.Module):
    def __init__(self, sizes: InfiMMSizes) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.theta = sizes.heads, sizes.kv_heads, sizes.rope_theta
        kv_width = sizes.width // sizes.heads * sizes.kv_heads
        self.q_proj = nn.Linear(sizes.width, sizes.width, bias=False)
        self.k_proj = nn.Linear(sizes.width, kv_width, bias=False)
        self.v_proj = nn.Linear(sizes.width, kv_width, bias=False)
        self.o_proj = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x_sh: torch.Tensor) -> torch.Tensor:
        q = rotate(split_heads(self.q_proj(x_sh)[None], self.heads), self.theta)
        k = rotate(split_heads(self.k_proj(x_sh)[None], self.kv_heads), self.theta)
        v = split_heads(self.v_proj(x_sh)[None], self.kv_heads)
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
        causal = torch.ones(len(x_sh), len(x_sh), dtype=torch.bool).tril()
        return self.o_proj(join_heads(attend(q, k, v, mask=causal))[0])


class GatedMLP(nn.Module):
    def __init__(self, sizes: InfiMMSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.width, sizes.ffn, bias=False)
        self.up_proj = nn.Linear(sizes.width, sizes.ffn, bias=False)
        self.down_proj = nn.Linear(sizes.ffn, sizes.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
