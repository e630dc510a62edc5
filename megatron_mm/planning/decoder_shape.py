"""The shape of a decoder, its tokens and its trainable parts, as far as they determine the kernels."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.config import DecoderConfig

Recompute = frozenset[str]
"""What is recomputed: "full" (whole layers), "every second layer" (for `decoder_job`), or modules such as "core_attn", "mlp", "layernorm",
"moe", "moe_act"."""


@dataclass(frozen=True)
class Latents:
    """Multi-head latent attention: queries, keys and values come from narrow latents. Defaults are the sizes of all DeepSeek models."""

    queries: int = 0
    """Width of the queries' latent; 0 if they have none."""
    keys: int = 512
    """Width of the latent of keys and values."""
    rotary: int = 64
    """Width of the part of a head with rotary positions; all heads share this part of the key."""
    plain: int = 128
    """Width of the part of a head without positions."""
    value: int = 128

    @property
    def key_dim(self) -> int:
        return self.rotary + self.plain


@dataclass(frozen=True)
class DecoderShape:
    """The properties of a decoder that determine its kernels."""

    num_layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    vocab: int
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    sparse_layers: tuple[int, ...] = ()
    capacity: float = 1.0
    """Tokens of the experts on the most loaded process, relative to the mean."""
    tied: bool = False
    dropout: bool = False
    causal: bool = True
    rotary: bool = True
    """Queries and keys are rotated, into new tensors."""
    fuses_rotary: bool = True
    """One kernel rotates. Otherwise separate ones do, as where scaled positions (YaRN) have a factor."""
    latents: Latents | None = None
    norms_heads: bool = False
    """Queries and keys are normalised (Qwen3, OLMo 2, Gemma 3)."""
    expert_biases: bool = False
    """Experts have biases and a clamped activation (GPT-OSS)."""
    window: int = 0
    """Attention window of every second layer, in tokens; 0 if no layer has one."""
    routed_machines: int = 0
    """Number of machines to which the router's groups limit a token; 0 for no limit."""
    predicted_ahead: int = 0
    """Number of additional layers that predict further tokens (multi-token prediction), each followed by an output layer and a loss."""

    @classmethod
    def of(cls, decoder: DecoderConfig, *, imbalance: float = 1.0) -> DecoderShape:
        moe = decoder.moe
        return cls(
            num_layers=decoder.num_layers,
            hidden_size=decoder.hidden_size,
            heads=decoder.num_attention_heads,
            kv_heads=decoder.num_query_groups,
            head_dim=decoder.head_dim,
            ffn=decoder.ffn_hidden_size,
            gated=True,
            vocab=decoder.vocab_size,
            experts=moe.num_experts if moe else 0,
            top_k=moe.top_k if moe else 0,
            expert_ffn=decoder.ffn_hidden_size if moe else 0,
            sparse_layers=decoder.sparse_layers,
            capacity=imbalance if moe else 1.0,
            tied=decoder.tied_embeddings,
        )

    @property
    def branches(self) -> int:
        return 2 if self.gated else 1

    def widths(self, tensor: int) -> tuple[float, float]:
        """Widths of the queries and of the keys on one process of a tensor-parallel group, which hold a head each at least."""
        return self.heads * self.head_dim / tensor, self.kv_heads * self.head_dim / min(tensor, self.kv_heads or 1)

    def mlp_parameters(self, ffn: int) -> float:
        return (self.branches + 1) * self.hidden_size * ffn

    @property
    def score_dim(self) -> float:
        """Mean of the head widths of keys and of values, which determines the FLOPs of a query-key pair."""
        return self.head_dim if self.latents is None else (self.latents.key_dim + self.latents.value) / 2

    @property
    def attention_parameters(self) -> float:
        if self.latents is not None:
            small, wide, heads = self.latents, self.hidden_size, self.heads
            queries = small.queries * (wide + heads * small.key_dim) if small.queries else wide * heads * small.key_dim
            keys = wide * (small.keys + small.rotary) + small.keys * heads * (small.plain + small.value)
            return queries + keys + heads * small.value * wide
        return self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    def parameters(self) -> float:
        """Number of parameters of the whole model, without norms."""
        sparse = len(self.sparse_layers)
        total = self.num_layers * self.attention_parameters + (self.num_layers - sparse) * self.mlp_parameters(self.ffn)
        expert = (
            self.experts * self.mlp_parameters(self.expert_ffn) + self.mlp_parameters(self.shared_ffn) + self.hidden_size * self.experts
        )
        return total + sparse * expert + self.vocab * self.hidden_size * (1 if self.tied else 2)


@dataclass(frozen=True)
class Tokens:
    """The part of a micro-batch on one context-parallel rank."""

    tokens: float
    """t: number of computed tokens, padding included."""
    pairs: float
    """Causal query-key pairs (half of the sum of squared lengths) on this process."""
    length: float
    """Length of a token's document, averaged over tokens."""
    windowed: bool = False
    """Whether attention is limited to a window."""

    @classmethod
    def whole(cls, *, sequences: float, length: float, context: int = 1) -> Tokens:
        """Tokens of sequences that consist of one document each."""
        return cls(tokens=sequences * length / context, pairs=sequences * length * length / 2 / context, length=length)


@dataclass(frozen=True)
class Trained:
    """What the backward pass computes for a block."""

    weights: bool = True
    inputs: bool = True
    """Gradients of its inputs, which are needed if something before it is trainable."""
