"""The work of a part of the model on one GPU: matrix products, attention, memory traffic, messages. It has only shapes; `costs` and
`network` compute seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Group = Literal["tensor", "context", "expert", "expert_tensor", "data", "expert_data", "pipeline"]


Part = Literal["other", "router", "permutation", "sorting", "expert activation", "expert bias", "expert weight cast"]
"""Purpose of element-wise kernels: routing; permutation of tokens by expert before and after their exchange; sorting of received tokens by
expert; the experts' activation and biases; casting their weights to FP8."""


@dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, cols], `count` of them in one grouped kernel."""

    rows: float
    cols: float
    inner: float
    count: int = 1
    fp8: bool = False
    passes: float = 1.0
    """Passes through the module around it. The two products of a linear layer's backward pass are half a pass each."""
    plain: bool = False
    """It is an operation of torch, without the Python code of a module of Transformer Engine or megatron-core around it."""

    @property
    def flops(self) -> float:
        return 2.0 * self.count * self.rows * self.cols * self.inner


@dataclass(frozen=True)
class Attention:
    """Fused attention of `heads` heads with `pairs` unmasked query-key pairs, in documents of about `length` tokens."""

    pairs: float
    length: float
    heads: float
    head_dim: float
    causal: bool = True
    backward: bool = False
    dropout: bool = False
    windowed: bool = False
    """Whether attention is limited to a window."""
    plain: bool = False
    """As for `Product`."""

    @property
    def flops(self) -> float:
        """FLOPs of two products in the forward pass; the backward pass recomputes the scores and has four more products."""
        return 4.0 * self.pairs * self.heads * self.head_dim * (2.5 if self.backward else 1.0)


@dataclass(frozen=True)
class Stream:
    """Element-wise kernels that move bytes to and from memory."""

    bytes: float
    kernels: int = 1
    part: Part = "other"
    """Purpose of the kernels, if software stacks differ in whether and how they run them."""


@dataclass(frozen=True)
class Message:
    """A collective operation over a group. `bytes` is the size of the whole gathered or scattered tensor, of the data that one process
    sends in an all-to-all, or of the data that one process passes on in each step of a ring."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "ring"]
    bytes: float
    group: Group
    beside_product: bool = False
    """Whether it runs at the same time as a product that does not need it, on any stack."""
    copies: int = 1
    """Number of experts to which an all-to-all sends each row."""
    rows: float = 0.0
    """Number of rows that one process sends in an all-to-all, counting copies."""
    machines: int = 0
    """Number of machines to which a router's groups limit a row of an all-to-all; 0 for no limit."""


@dataclass(frozen=True)
class Decoded:
    """Images that threads of this process decode with Pillow meanwhile. They cost the host time, and the device none."""

    images: float


Kernel = Product | Attention | Stream | Message | Decoded


@dataclass(frozen=True)
class Block:
    """A part of the model, such as a layer or an output layer: its kernels for one micro-batch, and the bytes that it keeps."""

    name: str
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    parameters: float = 0.0
    """Trainable parameters of this process whose gradients are reduced over the data-parallel group."""
    expert_parameters: float = 0.0
    """Trainable parameters of this process whose gradients are reduced over the experts' data-parallel group."""
    frozen_parameters: float = 0.0
    fp8_parameters: float = 0.0
    """Parameters that products use in FP8."""
    saved: float = 0.0
    """Bytes kept for the backward pass."""
    transient: float = 0.0
    """Bytes that are allocated only while it runs."""
    tensors: int = 0
    """Number of trainable parameter tensors."""
