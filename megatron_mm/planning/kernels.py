"""The work of a part of the model on one GPU: matrix products, attention, memory traffic, messages. Only shapes; `costs` and `network` give
seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["tensor", "context", "expert", "expert_tensor", "data", "expert_data", "pipeline"]


Part = Literal["other", "router", "permutation", "sorting", "expert activation", "expert bias", "expert weight cast"]
"""Of element-wise kernels: routing; permutation of tokens by expert before and after their exchange; sorting of what arrived by expert; the
experts' activation and biases; what turns their weights into FP8."""


@dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, cols], `count` of them in one grouped kernel."""

    rows: float
    cols: float
    inner: float
    count: int = 1
    fp8: bool = False
    passes: float = 1.0
    """Of the module around it: the two products of a linear layer's backward pass are half a pass each."""

    @property
    def flops(self) -> float:
        return 2.0 * self.count * self.rows * self.cols * self.inner


@dataclass(frozen=True)
class Attention:
    """Fused attention of some heads: `pairs` query-key pairs that count, in documents of about `length` tokens."""

    pairs: float
    length: float
    heads: float
    head_dim: float
    causal: bool = True
    backward: bool = False
    dropout: bool = False
    windowed: bool = False
    """Queries look back on a window."""

    @property
    def flops(self) -> float:
        """Two products forward; the backward pass computes the scores again and four products more."""
        return 4.0 * self.pairs * self.heads * self.head_dim * (2.5 if self.backward else 1.0)


@dataclass(frozen=True)
class Stream:
    """Element-wise kernels that move bytes to and from memory."""

    bytes: float
    kernels: int = 1
    part: Part = "other"
    """What it is of, where stacks differ in whether and how they run it."""


@dataclass(frozen=True)
class Message:
    """A collective over a group. `bytes`: of the whole gathered or scattered tensor; of what one process sends in an all-to-all; of what
    one process passes on at each turn of a ring."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "ring"]
    bytes: float
    group: Group
    beside_product: bool = False
    """It runs under a product that does not need it, on any stack."""
    copies: int = 1
    """Of an all-to-all: how many experts each row goes to."""
    rows: float = 0.0
    """Of an all-to-all: rows that one process sends, copies counted."""
    machines: int = 0
    """Of an all-to-all: to how many machines a router's groups let a row go; 0: to all."""


Kernel = Product | Attention | Stream | Message


@dataclass(frozen=True)
class Block:
    """A layer, a tower, an output layer: what it runs for one micro-batch, forward and backward, and what it keeps in between."""

    name: str
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    parameters: float = 0.0
    """Of this process, reduced over the data-parallel group."""
    expert_parameters: float = 0.0
    """Of this process, reduced over the experts' data-parallel group."""
    frozen_parameters: float = 0.0
    fp8_parameters: float = 0.0
    """Those that products take in FP8."""
    saved: float = 0.0
    """Bytes kept for the backward pass."""
    saved_recomputed: float = 0.0
    """The same where the whole block is recomputed: its input."""
    transient: float = 0.0
    """Bytes that only live while it runs."""
    tensors: int = 0
    """Trainable parameter tensors."""
