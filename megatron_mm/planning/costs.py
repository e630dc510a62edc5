"""Seconds that matrix products, attention and memory traffic take on a GPU; there are few constants, each with a physical meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mm.planning.hardware import GIGA, MICRO, TERA, Gpu, Software
from megatron_mm.planning.kernels import Attention, Block, Kernel, Message, Product, Stream
from megatron_mm.planning.network import Network

TILE_ROWS, TILE_COLS = 128, 256
"""Of the output of a product that one multiprocessor computes at a time."""
PRODUCT_FILL = 160
"""Steps along the inner dimension that filling and draining a tile's pipeline costs."""
WAVE_SHARE = 0.5
"""Part of the last wave's idle multiprocessors that is really lost; split and persistent kernels win the rest back."""
STREAMS = 4
"""Products of as many experts run at once (Transformer Engine's grouped linear, one cuBLAS product for each expert on four streams)."""
KERNEL_GAP = 2 * MICRO
"""Between the end of a kernel and the start of the next one on the device."""

ATTENTION_RAMP = {"fused": 370.0, "flash2": 450.0, "triton": 350.0, "unfused": 0.0}
"""Tokens of a document at which causal attention reaches half of its rate (tiles on the diagonal are computed whole)."""
ATTENTION_SHARE = {"fused": 1.0, "flash2": 0.62, "triton": 0.36, "unfused": 0.0}
"""Rate on Hopper, of cuDNN's; FlashAttention 2 and before do not use its asynchronous copies and products."""
ATTENTION_SHARE_AMPERE = {"fused": 1.0, "flash2": 1.0, "triton": 0.60, "unfused": 0.0}
BACKWARD_ATTENTION = 0.86
"""Rate of the backward pass, of the forward pass's."""
FP8_ATTENTION = {False: 1.35, True: 1.10}
"""Rate in FP8, of that in bf16, forward and backward (True): cuDNN's on GB200 and GB300 at 4096 tokens with scales by block, of heads of
128 and of 192 and 128 (cudnn-frontend, benchmark/sdpa_benchmark_training/results: 1.20 to 1.58 and 0.92 to 1.33)."""
FP8_WINDOW = 0.25
"""The same of the backward pass of attention to a window (there, gpt_oss: 0.22 to 0.27)."""
PERMUTED = {"alltoall": 1.0, "allgather": 1.0, "deepep": 1.0, "hybridep": 0.35}
"""Bytes of permutation that are left to kernels beside the exchange: what HybridEP saves against DeepEP in megatron-core's moe_perf test
(benchmarks/anchors/micro.csv, deepseek in bf16)."""
ROUTING = ("router", "permutation", "sorting")
DROPOUT_ATTENTION = 0.78
"""Rate with dropout of scores: a random number for each pair."""


@dataclass(frozen=True)
class Seconds:
    """Time of a part of the model, by what takes it."""

    product: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    messages: float = 0.0
    launch: float = 0.0
    """Time of the host to launch all of it, beside the device's work. The host runs ahead where it is the faster of the two, so this is
    to be compared over a whole pass and not kernel by kernel."""

    @property
    def busy(self) -> float:
        """Of the device."""
        return self.product + self.attention + self.moved + self.messages

    @property
    def host(self) -> float:
        """Time that the device waits for the host."""
        return max(0.0, self.launch - self.busy)

    @property
    def total(self) -> float:
        return max(self.busy, self.launch)

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, name) + getattr(other, name) for name in _PARTS))

    def times(self, factor: float) -> Seconds:
        return Seconds(*(getattr(self, name) * factor for name in _PARTS))


_PARTS = ("product", "attention", "moved", "messages", "launch")


@dataclass(frozen=True)
class Costs:
    """Seconds on a GPU, under a software stack, in a layout's network."""

    gpu: Gpu
    software: Software
    network: Network

    def block(self, block: Block, *, backward: bool) -> Seconds:
        return self.kernels(block.backward if backward else block.forward)

    def kernels(self, kernels: tuple[Kernel, ...]) -> Seconds:
        """One after another; messages that the stack hides cost what sticks out."""
        product = attention = moved = messages = beside = ring = host = 0.0
        software = self.software
        for kernel in kernels:
            if isinstance(kernel, Product):
                product += self.product(kernel)
                module = software.module_seconds * (software.fp8_module if kernel.fp8 else 1.0)
                host += kernel.passes * module + (kernel.count - 1) * software.kernel_seconds
            elif isinstance(kernel, Attention):
                attention += self.attention(kernel)
                host += software.module_seconds
            elif isinstance(kernel, Stream):
                moved += self.stream(kernel)
                share = software.expert_operations if kernel.part in ROUTING else 1.0
                host += kernel.kernels * software.kernel_seconds * share * (1.0 if self._share(kernel) else 0.0)
            elif isinstance(kernel, Message):
                seconds = self.network.seconds(kernel)
                if kernel.kind == "ring":
                    ring += seconds
                    host += 2 * software.message_seconds * (self.network.groups[kernel.group].size - 1)
                    continue
                hidden = self._hidden(kernel)
                beside += seconds * hidden
                messages += seconds * (1 - hidden)
                host += software.message_seconds
        # What is hidden cannot exceed what it hides under.
        messages += max(0.0, beside - 0.9 * product)
        # Keys and values travel under attention to those that came before.
        messages += max(0.0, ring - attention) + software.interference * min(ring, attention)
        return Seconds(product, attention, moved, messages, host * self.gpu.host * (1 - software.graphed))

    def _hidden(self, message: Message) -> float:
        if message.beside_product:
            return 1.0
        if message.group == "tensor":
            return self.software.hides_tensor_messages
        return self.software.hides_expert_messages if message.group == "expert" else 0.0

    def product(self, product: Product) -> float:
        """Bound by arithmetic (with tiles and waves that are not full) or by memory."""
        gpu = self.gpu
        fp8 = product.fp8 and gpu.fp8_tflops > 0
        peak = (gpu.fp8_tflops * gpu.efficiency.product_fp8 if fp8 else gpu.bf16_tflops * gpu.efficiency.product) * TERA
        rows, cols = max(1.0, product.rows), max(1.0, product.cols)
        tiles = math.ceil(rows / TILE_ROWS) * math.ceil(cols / TILE_COLS)
        padded = tiles * TILE_ROWS * TILE_COLS / (rows * cols)
        waves = tiles * (product.count if self.software.fuses_experts else min(product.count, STREAMS)) / gpu.multiprocessors
        wave_loss = 1 + WAVE_SHARE * (math.ceil(waves) / waves - 1)
        fill = 1 + PRODUCT_FILL * (2 if fp8 else 1) / max(1.0, product.inner)
        arithmetic = product.flops / peak * min(padded, 4.0) * wave_loss * fill
        width = 1 if fp8 else 2
        moved = product.count * (width * (rows * product.inner + product.inner * cols) + 2 * rows * cols)
        return max(arithmetic, moved / (gpu.memory_tb_s * TERA * gpu.efficiency.memory)) + KERNEL_GAP

    def attention(self, attention: Attention) -> float:
        gpu, kind = self.gpu, self.software.attention
        if kind == "unfused":
            return self._unfused(attention)
        share = (ATTENTION_SHARE_AMPERE if gpu.multiprocessors == 108 else ATTENTION_SHARE)[kind]
        rate = gpu.bf16_tflops * TERA * gpu.efficiency.attention * share
        ramp = ATTENTION_RAMP[kind] if attention.causal else ATTENTION_RAMP[kind] * 0.4
        rate *= attention.length / (attention.length + ramp)
        if attention.head_dim < 128:
            least = gpu.efficiency.head_of_64
            rate *= least + (1 - least) * max(0, attention.head_dim - 64) / 64
        if attention.backward:
            rate *= BACKWARD_ATTENTION
        if attention.dropout:
            rate *= DROPOUT_ATTENTION
        if self.software.fp8_attention:
            rate *= FP8_WINDOW if attention.windowed and attention.backward else FP8_ATTENTION[attention.backward]
        return attention.flops / rate + KERNEL_GAP

    def _unfused(self, attention: Attention) -> float:
        """Batched products over all pairs, and scores that go through memory: written, masked, normalised, dropped out, read."""
        pairs = attention.pairs * (2 if attention.causal else 1)
        products = (4 if attention.backward else 2) * 2.0 * pairs * attention.heads * attention.head_dim
        bytes_of_a_pair = 22 if attention.backward else 13
        rate = self.gpu.bf16_tflops * TERA * self.gpu.efficiency.product * attention.head_dim / (attention.head_dim + 96)
        return products / rate + self.stream(Stream(bytes_of_a_pair * pairs * attention.heads, kernels=6), factor=1.0)

    def stream(self, stream: Stream, *, factor: float | None = None) -> float:
        share = self._share(stream)
        moved = stream.bytes * share * (self.software.moved if factor is None else factor)
        return moved / (self.gpu.memory_tb_s * TERA * self.gpu.efficiency.memory) + (KERNEL_GAP * stream.kernels if share else 0.0)

    def _share(self, stream: Stream) -> float:
        """Of a stream's bytes, that the stack moves."""
        software = self.software
        if stream.part == "permutation":
            return PERMUTED[software.dispatcher]
        if stream.part == "sorting":
            return 1.0 if software.dispatcher == "alltoall" else 0.0  # the others permute what arrived by expert at once
        if stream.part in ("expert activation", "expert bias"):
            return 0.0 if software.fuses_experts else 1.0
        if stream.part == "expert weight cast":
            return 0.0 if software.fp8_weights else 1.0
        return 1.0

    def optimizer(self, parameters: float) -> float:
        """Adam on so many parameters of this process: norm of gradients (copied into float32 where they are not), master weights and
        moments read and written, weights written."""
        copied = 6 if self.software.gradient_bytes < 4 else 0
        return (18 + copied + 2 * self.software.optimizer_bytes) * parameters / (self.gpu.memory_tb_s * TERA * self.gpu.efficiency.memory)

    @property
    def memory_bytes(self) -> float:
        return self.gpu.memory_gb * GIGA
