"""Mono-InternVL-2B in plain PyTorch for one document on one process, its parameters under the names of released checkpoints.

It is written from the definition of the model and shares no code with `megatron_mm`, which is compared with it. Every layer computes both
of its feed-forward networks for every token and keeps one result.

    vision_model      a convolution and learned positions: a tile -> patches
    mlp1              four neighbouring patches -> one image token of the language model's width
    language_model    InternLM2 with a second feed-forward network, for image tokens, in every layer

Shape legend: s tokens of the document, k tiles, g patches along one side of a tile, v patch width, h width of the language model, a heads,
d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support.plain_attention import attend, join_heads, rotate, split_heads


@dataclass(frozen=True)
class MonoSizes:
    """A Mono-InternVL."""

    image_size: int = 448
    patch_size: int = 14
    patch_width: int = 1024
    vocab: int = 92553
    width: int = 2048
    ffn: int = 8192
    layers: int = 24
    heads: int = 16
    kv_heads: int = 8
    rope_theta: float = 1e6
    rms_eps: float = 1e-5
    image_token: int = 92546
    """<IMG_CONTEXT>, the token whose embeddings image features replace; <img> and </img> are text tokens."""


MONO_INTERNVL_2B = MonoSizes()


class MonoReference(nn.Module):
    """Token ids and tiles of one document -> logits."""

    def __init__(self, sizes: MonoSizes) -> None:
        super().__init__()
        self.image_token = sizes.image_token
        self.vision_model = nn.Module()
        self.vision_model.embeddings = PatchEmbeddings(sizes)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * sizes.patch_width),
            nn.Linear(4 * sizes.patch_width, sizes.width),
            nn.GELU(),
            nn.Linear(sizes.width, sizes.width),
        )
        self.language_model = InternLM2(sizes)

    def forward(self, ids_s: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """
        Args:
            ids_s: [s] int64; a tile is g * g / 4 image tokens.
            tiles: [k, 3, H, W] normalised floats, in the order of their tokens.

        Returns:
            [s, vocab].
        """
        is_image_s = ids_s == self.image_token
        features_h = self.encode(tiles).flatten(0, 1)
        assert int(is_image_s.sum()) == len(features_h), f"{int(is_image_s.sum())} image tokens, but {len(features_h)} features"
        x_sh = self.language_model.model.tok_embeddings(ids_s)
        x_sh = x_sh.masked_scatter(is_image_s[:, None], features_h)
        return self.language_model(x_sh, is_image_s)

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """[k, 3, H, W] -> image tokens [k, g * g / 4, h]."""
        return self.mlp1(pixel_unshuffle(self.vision_model.embeddings(tiles)).flatten(1, 2))


class PatchEmbeddings(nn.Module):
    """Patches with learned positions; the class embedding and the positions' first row are in checkpoints but not used."""

    def __init__(self, sizes: MonoSizes) -> None:
        super().__init__()
        self.grid = sizes.image_size // sizes.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, sizes.patch_width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + self.grid**2, sizes.patch_width))
        self.patch_embedding = nn.Conv2d(3, sizes.patch_width, sizes.patch_size, stride=sizes.patch_size)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """[k, 3, H, W] -> [k, H / patch, W / patch, v]; positions are stretched to tiles of another size than the model's."""
        patches = self.patch_embedding(tiles)
        positions = self.position_embedding[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        positions = F.interpolate(positions, size=patches.shape[2:], mode="bicubic", align_corners=False)
        return (patches + positions).permute(0, 2, 3, 1)


def pixel_unshuffle(x_kggv: torch.Tensor) -> torch.Tensor:
    """Squares of 2 x 2 patches become one of four times the width: [k, g, g, v] -> [k, g / 2, g / 2, 4 v].

    Worked example, with patches numbered row by row:

         0  1  2  3
         4  5  6  7    ->    (0 1 4 5)    (2 3 6 7)
         8  9 10 11          (8 9 12 13)  (10 11 14 15)
        12 13 14 15

    Neighbours in a row are joined first: (0 1) (2 3) ... Rows and columns are transposed, so that vertical neighbours become adjacent, and
    neighbours are joined again: (0 1 4 5) ... Then they are transposed back; an earlier version of the released code ("v1") left that out.
    """
    x = x_kggv.unflatten(2, (-1, 2)).flatten(3)  # [k, g, g / 2, 2 v]
    x = x.transpose(1, 2)  # [k, g / 2 columns, g rows, 2 v]
    x = x.unflatten(2, (-1, 2)).flatten(3)  # [k, g / 2 columns, g / 2 rows, 4 v]
    return x.transpose(1, 2)


class InternLM2(nn.Module):
    """Llama with other names and packed projections, and a second feed-forward network for image tokens."""

    def __init__(self, sizes: MonoSizes) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(sizes.vocab, sizes.width)
        self.model.layers = nn.ModuleList(InternLM2Layer(sizes) for _ in range(sizes.layers))
        self.model.norm = nn.RMSNorm(sizes.width, eps=sizes.rms_eps)
        self.output = nn.Linear(sizes.width, sizes.vocab, bias=False)

    def forward(self, x_sh: torch.Tensor, is_image_s: torch.Tensor) -> torch.Tensor:
        """Embeddings [s, h] -> logits [s, vocab]."""
        for layer in self.model.layers:
            x_sh = layer(x_sh, is_image_s)
        return self.output(self.model.norm(x_sh))


class InternLM2Layer(nn.Module):
    def __init__(self, sizes: MonoSizes) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(sizes.width, eps=sizes.rms_eps)
        self.attention = InternLM2Attention(sizes)
        self.ffn_norm = nn.RMSNorm(sizes.width, eps=sizes.rms_eps)
        self.feed_forward = FeedForward(sizes)
        self.feed_forward_ve = FeedForward(sizes)

    def forward(self, x_sh: torch.Tensor, is_image_s: torch.Tensor) -> torch.Tensor:
        x_sh = x_sh + self.attention(self.attention_norm(x_sh))
        normed_sh = self.ffn_norm(x_sh)
        return x_sh + torch.where(is_image_s[:, None], self.feed_forward_ve(normed_sh), self.feed_forward(normed_sh))


class InternLM2Attention(nn.Module):
    """Causal, with grouped queries; rows of the one projection are grouped by key/value head: its queries, its key, its value.

    Worked example: 4 heads on 2 key/value heads. Rows, in blocks of d, are q0 q1 k0 v0 q2 q3 k1 v1.
    """

    def __init__(self, sizes: MonoSizes) -> None:
        super().__init__()
        self.kv_heads, self.theta = sizes.kv_heads, sizes.rope_theta
        self.queries = sizes.heads // sizes.kv_heads
        head_dim = sizes.width // sizes.heads
        self.wqkv = nn.Linear(sizes.width, (sizes.heads + 2 * sizes.kv_heads) * head_dim, bias=False)
        self.wo = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x_sh: torch.Tensor) -> torch.Tensor:
        groups = self.wqkv(x_sh).unflatten(1, (self.kv_heads, self.queries + 2, -1))
        parts = groups[:, :, : self.queries], groups[:, :, -2:-1], groups[:, :, -1:]
        q, k, v = (split_heads(part.flatten(1)[None], part.shape[1] * part.shape[2]) for part in parts)
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        k, v = (x.repeat_interleave(self.queries, dim=1) for x in (k, v))
        causal = torch.ones(len(x_sh), len(x_sh), dtype=torch.bool).tril()
        return self.wo(join_heads(attend(q, k, v, mask=causal))[0])


class FeedForward(nn.Module):
    """SwiGLU: w1 is the gate projection, w3 the up projection, w2 the down projection."""

    def __init__(self, sizes: MonoSizes) -> None:
        super().__init__()
        self.w1 = nn.Linear(sizes.width, sizes.ffn, bias=False)
        self.w3 = nn.Linear(sizes.width, sizes.ffn, bias=False)
        self.w2 = nn.Linear(sizes.ffn, sizes.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
