"""Configuration of the blocks of a model: decoder, experts, image towers, connector, resampler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mm.config.checks import require, require_positive


@dataclass(frozen=True)
class MoEConfig:
    """Sparse feed-forward layers: each token is sent to top_k of num_experts experts, each as large as a dense layer's MLP."""

    num_experts: int
    """Number of experts in a sparse layer."""
    every_n_layers: int
    """Layers n, 2n, 3n ... (counted from 1) are sparse; the others are dense."""
    top_k: int = 2
    """Number of experts per token; their weights are a softmax over the chosen experts."""
    load_balance_loss: float = 0.01
    """Coefficient of the load-balance loss (GShard)."""
    z_loss: float = 0.001
    """Coefficient of the router's z-loss (ST-MoE)."""
    capacity_factor: float | None = None
    """An expert accepts at most capacity_factor * tokens * top_k / num_experts tokens of a process and drops the rest, least likely first;
    None drops no token."""

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "every_n_layers", "top_k")
        require(self.top_k <= self.num_experts, f"moe.top_k {self.top_k} is more than moe.num_experts {self.num_experts}: use fewer")
        require(
            min(self.load_balance_loss, self.z_loss) >= 0,
            f"moe.load_balance_loss {self.load_balance_loss} and moe.z_loss {self.z_loss} must be at least 0",
        )
        require(
            self.capacity_factor is None or self.capacity_factor > 0,
            f"moe.capacity_factor is {self.capacity_factor}, but must be positive, or None",
        )

    def sparse_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the sparse layers, counted from 0: (1, 3) if every second of 4 layers is sparse."""
        return tuple(layer for layer in range(num_layers) if (layer + 1) % self.every_n_layers == 0)


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-style decoder: RMSNorm before attention and MLP, SwiGLU, rotary positions, no biases."""

    num_layers: int
    """Number of decoder layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of one of the two SwiGLU branches."""
    num_attention_heads: int
    """Number of query heads."""
    num_query_groups: int
    """Number of key/value heads; equal to num_attention_heads without grouped-query attention."""
    head_dim: int = 128
    """Width of one attention head."""
    vocab_size: int = 49152
    """Rows of the embedding table, including special tokens and padding rows."""
    padding_rows: int = 0
    """Rows at the end of the table that belong to no token, for example so that tensor parallelism can split it. They take no probability:
    neither in the loss nor in generation."""
    tied_embeddings: bool = True
    """Use the embedding table as the output layer."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_epsilon: float = 1e-5
    """Added to the mean square inside every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections use init_std / sqrt(2 * num_layers)."""
    moe: MoEConfig | None = None
    """Sparse layers; None for a dense model."""
    variant: str = "llama"
    """How the decoder differs from a Llama: a name in `megatron_mm.hf.decoder_variants.DECODER_VARIANTS`."""
    max_positions: int | None = None
    """Maximum number of positions of the original language model, tokens. Used only in exported configurations; None uses the length of
    training sequences."""
    attention_window: int | None = None
    """Mistral's sliding window, tokens. Used only in exported configurations. Training attends to whole documents, so sequences should not
    be longer than the window."""
    rotary_scaling: float | None = None
    """Factor of InternLM2's dynamic rotary scaling. Used only in exported configurations; it has an effect only beyond max_positions."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the table has rows for."""
        return self.vocab_size - self.padding_rows

    def rows_for(self, num_tokens: int) -> int:
        """Number of rows, `vocab_size`, that so many tokens and the padding rows need."""
        return num_tokens + self.padding_rows

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts, from 0."""
        return self.moe.sparse_layers(self.num_layers) if self.moe is not None else ()

    def __post_init__(self) -> None:
        require_positive(
            self, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "vocab_size"
        )
        require(
            0 <= self.padding_rows < self.vocab_size,
            f"padding_rows is {self.padding_rows}, but must be 0 or more and less than vocab_size {self.vocab_size}",
        )
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}: "
            "every key/value head serves the same number of query heads",
        )
        require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, but rotary positions rotate pairs of values: use an even number")


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer: patch convolution, class token, learned positions, pre-LN layers."""

    image_size: int
    """Side of the square input image, pixels."""
    patch_size: int
    """Side of a patch, pixels. Pixels at the right and bottom edges that do not fill a patch are dropped, as in CLIP."""
    hidden_size: int
    """Width of the tower."""
    num_layers: int
    """Transformer layers."""
    num_attention_heads: int
    """Attention heads; their width is hidden_size / num_attention_heads."""
    ffn_hidden_size: int
    """Width of the MLP."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the MLP; quick_gelu is x * sigmoid(1.702 x)."""
    norm_epsilon: float = 1e-5
    """Added to the variance inside every LayerNorm."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Per-channel mean subtracted from pixels in [0, 1] (OpenAI CLIP)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Per-channel standard deviation that pixels are divided by (OpenAI CLIP)."""
    resize: Literal["squash", "crop", "pad"] = "squash"
    """How an image is made square: squashed, as in DFN5B CLIP; cropped, as in OpenAI's CLIP; or padded (`data.image_transform`)."""

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "patch_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size")
        require(
            self.image_size >= self.patch_size,
            f"image_size {self.image_size} is smaller than one patch of {self.patch_size} pixels",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vision hidden_size {self.hidden_size} is not a multiple of its num_attention_heads {self.num_attention_heads}",
        )

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image, not counting the class token."""
        return self.grid_size**2


@dataclass(frozen=True)
class ConnectorConfig:
    """Turns the patch features of an image into a fixed number of decoder tokens (MM1, section 3.2)."""

    kind: str
    """A name in `megatron_mm.models.connectors.CONNECTORS`: average (pooling and a linear layer), attention (learned queries attend to the
    patches) or c_abstractor (Honeybee's)."""
    num_tokens: int
    """Tokens per image in the decoder's sequence; a square number for average and c_abstractor."""
    hidden_size: int = 1024
    """Inner width of the C-Abstractor (1024 in Honeybee) and of the attention pooling; unused by average pooling."""
    depth: int = 3
    """Bottleneck blocks before and after the C-Abstractor's pooling (3 in Honeybee)."""
    num_attention_heads: int = 16
    """Heads of the attention pooling."""

    @property
    def pools_to_grid(self) -> bool:
        """Whether the patches are pooled to a square grid of tokens."""
        return self.kind in ("average", "c_abstractor")

    def __post_init__(self) -> None:
        require_positive(self, "num_tokens", "hidden_size", "depth", "num_attention_heads")
        if self.pools_to_grid:
            require(
                math.isqrt(self.num_tokens) ** 2 == self.num_tokens,
                f"the {self.kind} connector pools to a square grid, but num_tokens is {self.num_tokens}: use 64 or 144, for example",
            )
        if self.kind == "attention":
            require(
                self.hidden_size % self.num_attention_heads == 0,
                f"connector hidden_size {self.hidden_size} is not a multiple of its num_attention_heads {self.num_attention_heads}",
            )


@dataclass(frozen=True)
class ModelConfig:
    """Base of every family's model configuration. `family` is the key in `megatron_mm.families.registry.FAMILIES` of the family that builds
    the model."""

    family: ClassVar[str]
    decoder: DecoderConfig


@dataclass(frozen=True)
class EvaConfig:
    """An EVA-CLIP vision transformer (arXiv 2303.15389): biases on queries and values, none on keys."""

    image_size: int
    """Side of the square input image, pixels."""
    patch_size: int
    """Side of a patch, pixels."""
    hidden_size: int
    """Width of the tower."""
    num_layers: int
    """Transformer layers."""
    num_attention_heads: int
    """Attention heads; their width is hidden_size / num_attention_heads."""
    ffn_hidden_size: int
    """Width of the MLP, or of one branch if it is a SwiGLU."""
    output_size: int
    """Width of CLIP's shared space: the rows of the head, which checkpoints contain and InfiMM does not use."""
    block: Literal["pre_norm", "post_norm"] = "pre_norm"
    """Position of the norms: pre_norm is x + f(norm(x)); post_norm is x + norm(f(x)), as in EVA02-bigE."""
    swiglu: bool = False
    """Use EVA-02's block: a SwiGLU with a LayerNorm inside, and another LayerNorm inside attention (sub-LN). Otherwise the MLP uses
    GELU."""
    rotary_grid: int | None = None
    """Apply rotary positions to the queries and keys of the patches, by row and column, scaled to a grid of this many positions per side
    (that of pre-training: 16 for EVA02-L); None uses no rotary positions."""
    norm_epsilon: float = 1e-6
    """Added to the variance inside every LayerNorm."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Per-channel mean subtracted from pixels in [0, 1] (OpenAI CLIP)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Per-channel standard deviation that pixels are divided by (OpenAI CLIP)."""
    resize: Literal["squash", "crop", "pad"] = "squash"
    """How an image is made square (`data.image_transform`); EVA-CLIP's and InfiMM's processors crop."""

    def __post_init__(self) -> None:
        names = ("image_size", "patch_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "output_size")
        require_positive(self, *names)
        require(self.image_size >= self.patch_size, f"image_size {self.image_size} is smaller than one patch of {self.patch_size} pixels")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vision hidden_size {self.hidden_size} is not a multiple of its num_attention_heads {self.num_attention_heads}",
        )
        require(
            self.rotary_grid is None or self.head_dim % 4 == 0,
            f"heads of width {self.head_dim} cannot use rotary positions by row and column: use a width that is a multiple of 4",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Patches of one image and the class token."""
        return self.grid_size**2 + 1


@dataclass(frozen=True)
class ResamplerConfig:
    """Flamingo's Perceiver resampler: the tower's features of an image -> num_latents vectors of the tower's width."""

    num_latents: int = 64
    """Number of latents per image."""
    num_layers: int = 6
    """Number of layers, each with cross-attention and a feed-forward network."""
    num_attention_heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Width of one attention head."""
    ffn_multiplier: int = 4
    """Width of the feed-forward network, as a multiple of the tower's width."""

    def __post_init__(self) -> None:
        require_positive(self, "num_latents", "num_layers", "num_attention_heads", "head_dim", "ffn_multiplier")
