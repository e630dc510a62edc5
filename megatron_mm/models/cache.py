"""The key/value cache for generation: each step computes only the new tokens of each sequence.

A step is a packed micro-batch that contains only the new tokens: whole prompts at first, then one token per sequence. So there is no
padding between sequences, and the layers of all families run as in training. Worked example with two prompts of 3 and 2 tokens (capital
letters are cached, small letters are new, `_` is padding for tensor parallelism):

    step 1   a b c d e _        sequence 0 attends to a b c, sequence 1 to d e
    step 2   f g                f attends to A B C f at position 3, g attends to D E g at position 2
    step 3   h i                h attends to A B C F h ...

Rotary positions are looked up by token. Attention within whole prompts is that of training, document by document; later steps attend to the
cache, [sequences, capacity, heads, width], under a mask of what each sequence has. Each process caches its own layers and, of these, its
own heads. The data that gated blocks need about a sequence's last image is cached in the same way (`KeyValueCache.keep`).

megatron-core's own inference contexts are not suitable. The static one (0.16 and 0.19) has one length for all sequences of a batch and does
not accept packed rows, which the layers of InfiMM and Mono-InternVL require. The dynamic one needs kernels for paged attention, which exist
only for GPUs.

Shape legend: t tokens of a step's row, b sequences, r real tokens of the row, n query heads, g key/value heads, d head width, c capacity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_mm.platform.device import send


class KeyValueCache:
    """Keys and values of some sequences on one process, shared by all pipeline chunks of the process (their layer numbers differ)."""

    def __init__(self, *, images: list[bool], capacity: int) -> None:
        """
        Args:
            images: for each sequence, whether its prompt has an image.
            capacity: maximum number of tokens of a sequence.
        """
        self.images = images
        self.capacity = capacity
        self.lengths = [0] * len(images)
        """Number of cached tokens of each sequence."""
        self._kept: dict[tuple[int, str], torch.Tensor] = {}

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def filled(self) -> bool:
        """True once the prompts have been computed."""
        return any(self.lengths)

    def keep(self, layer: int, name: str, value: torch.Tensor) -> None:
        """Store a layer's tensor [b, ...] under a name."""
        self._kept[layer, name] = value

    def kept(self, layer: int, name: str) -> torch.Tensor:
        return self._kept[layer, name]

    def keys_values(self, layer: int, key_tgd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [b, c, g, d] of a layer; initially zeros, of the type of key_tgd."""
        if (layer, "key") not in self._kept:
            shape = (self.num_sequences, self.capacity, *key_tgd.shape[1:])
            for name in ("key", "value"):
                self.keep(layer, name, key_tgd.new_zeros(shape))
        return self.kept(layer, "key"), self.kept(layer, "value")

    def advance(self, counts: list[int]) -> None:
        """Count the tokens of a step that all chunks have computed."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        assert max(self.lengths) <= self.capacity, f"sequences of {max(self.lengths)} tokens in a cache of {self.capacity}"

    def forget(self, counts: list[int]) -> None:
        """Remove the last tokens of each sequence, so that later tokens overwrite them."""
        self.lengths = [length - count for length, count in zip(self.lengths, counts, strict=True)]

    def select(self, rows: list[int]) -> None:
        """Keep only these sequences, in this order; a sequence may occur several times."""
        if rows == list(range(self.num_sequences)):
            return
        self.lengths, self.images = [self.lengths[row] for row in rows], [self.images[row] for row in rows]
        index = torch.tensor(rows)
        self._kept = {key: value.index_select(0, index.to(value.device)) for key, value in self._kept.items()}


@dataclass
class CacheStep:
    """The positions of the tokens of one generation step. Made once per step, and passed to every layer with the document bounds."""

    cache: KeyValueCache
    counts: list[int]
    """New tokens of each sequence, in the order of the row; 0 for a sequence that gets none."""
    sequences: torch.Tensor
    """[r]: the sequence of each token."""
    within: torch.Tensor
    """[r]: index of each token among the new tokens of its sequence."""
    positions: torch.Tensor
    """[t]: position of each token in its sequence; 0 for padding of the row."""
    read: torch.Tensor
    """[reads]: positions in the row whose logits are needed."""
    mask: torch.Tensor | None
    """[b, 1, new, keys] bool: the cached keys that each new token attends to; None if whole prompts are computed."""
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    """[t, 1, 1, d] each: cosines and sines of the tokens' rotary angles, for all layers."""

    @classmethod
    def plan(cls, cache: KeyValueCache, counts: list[int], *, row: int, read: list[int], device: torch.device) -> CacheStep:
        """Plan a step that adds `counts` tokens to the sequences.

        Args:
            row: number of tokens in the row, including padding.
            read: positions in the row whose logits are needed.
        """
        assert not cache.filled or min(cache.lengths) > 0, "all prompts are computed in the first step"
        taken, lengths = torch.tensor(counts), torch.tensor(cache.lengths)
        sequences = torch.arange(len(counts)).repeat_interleave(taken)
        within = torch.arange(len(sequences)) - (taken.cumsum(0) - taken)[sequences]
        positions = F.pad(lengths[sequences] + within, (0, row - len(sequences)))
        mask = None
        if cache.filled:
            new, keys = max(counts), int((lengths + taken).max())
            last_seen = lengths[:, None] + torch.minimum(torch.arange(new)[None], (taken - 1).clamp(min=0)[:, None])
            mask = send((torch.arange(keys) <= last_seen[..., None])[:, None], device)
        return cls(
            cache,
            counts,
            send(sequences, device),
            send(within, device),
            send(positions, device),
            read=send(torch.tensor(read, dtype=torch.int64), device),
            mask=mask,
        )

    _additive: torch.Tensor | None = None

    def rotate_by(self, angles_t11d: torch.Tensor, *, dtype: torch.dtype) -> None:
        """Store the cosines and sines with which layers rotate queries and keys."""
        self.rotary = (angles_t11d.cos().to(dtype), angles_t11d.sin().to(dtype))

    def attend(self, layer: int, query_tnd: torch.Tensor, key_tgd: torch.Tensor, value_tgd: torch.Tensor, *, scale: float) -> torch.Tensor:
        """Write keys and values to the cache, and attend to it.

        Args:
            layer: number of the layer in the whole model.

        Returns:
            [t, n * d], zeros for padding of the row.
        """
        real = len(self.sequences)
        keys_bcgd, values_bcgd = self.cache.keys_values(layer, key_tgd)
        places = (self.sequences, self.positions[:real])
        keys_bcgd.index_put_(places, key_tgd[:real])
        values_bcgd.index_put_(places, value_tgd[:real])
        grouped = query_tnd.shape[1] != key_tgd.shape[1]
        if self.mask is None:
            out_tnd = torch.zeros_like(query_tnd)
            first = 0
            for count in self.counts:
                own = slice(first, first + count)
                query, key, value = (x[own].transpose(0, 1)[None] for x in (query_tnd, key_tgd, value_tgd))
                attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
                out_tnd[own] = attended[0].transpose(0, 1)
                first += count
            return out_tnd.flatten(1)
        one_each = real == len(query_tnd) == len(self.counts) and self.mask.shape[2] == 1
        if one_each:  # the row already is a batch of single tokens
            query_bmnd = query_tnd[:, None]
        else:
            query_bmnd = query_tnd.new_zeros(len(self.counts), self.mask.shape[2], *query_tnd.shape[1:])
            query_bmnd[self.sequences, self.within] = query_tnd[:real]
        seen = self.mask.shape[3]
        if self._additive is None:  # otherwise torch would derive it from the mask in every layer
            self._additive = torch.zeros_like(self.mask, dtype=query_tnd.dtype).masked_fill_(~self.mask, -torch.inf)
        attended_bnmd = F.scaled_dot_product_attention(
            query_bmnd.transpose(1, 2),
            keys_bcgd[:, :seen].transpose(1, 2),
            values_bcgd[:, :seen].transpose(1, 2),
            attn_mask=self._additive,
            scale=scale,
            enable_gqa=grouped,
        )
        if one_each:
            return attended_bnmd.flatten(1)
        out_tnd = torch.zeros_like(query_tnd)
        out_tnd[:real] = attended_bnmd.transpose(1, 2)[self.sequences, self.within]
        return out_tnd.flatten(1)


@dataclass
class Layout(PackedSeqParams):
    """What layers know about a micro-batch: document bounds (megatron-core's fields), and in generation the step with its cache."""

    cache: CacheStep | None = None
    padding: torch.Tensor | None = None
    """[1, t] bool, True for padding among this process's tokens; routers read it here under `models.expert_overlap`."""


def cache_of(layout: PackedSeqParams | None) -> CacheStep | None:
    """Return the generation step in a layout; None in training."""
    return getattr(layout, "cache", None)
