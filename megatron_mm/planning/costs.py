"""Seconds that matrix products, attention and memory traffic take on a GPU, from few constants, each with a physical meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mm.planning.hardware import AMPERE, GIGA, MICRO, TERA, Gpu, Software
from megatron_mm.planning.kernels import Attention, Block, Decoded, Kernel, Message, Product, Stream
from megatron_mm.planning.network import Network

TILE_ROWS, TILE_COLS = 128, 256
"""Size of the output tile of a product that one multiprocessor computes at a time."""
PRODUCT_FILL = 160
"""Cost of filling and draining a tile's pipeline, in steps along the inner dimension."""
WAVE_SHARE = 0.5
"""Fraction of the last wave's idle time that is really lost; split and persistent kernels recover the rest."""
STREAMS = 4
"""Number of experts whose products run at once (Transformer Engine's grouped linear: one cuBLAS product per expert, on four streams)."""
KERNEL_GAP = 2 * MICRO
"""Seconds between the end of a kernel and the start of the next one on the device."""

ATTENTION_RAMP = {"fused": 370.0, "flash2": 450.0, "triton": 350.0, "unfused": 0.0}
"""Document length, in tokens, at which causal attention reaches half of its rate (tiles on the diagonal are computed whole)."""
ATTENTION_SHARE = {"fused": 1.0, "flash2": 0.62, "triton": 0.36, "unfused": 0.0}
"""Rate on Hopper relative to cuDNN's. FlashAttention 2 and earlier do not use Hopper's asynchronous copies and products."""
ATTENTION_SHARE_AMPERE = {"fused": 1.0, "flash2": 1.0, "triton": 0.60, "unfused": 0.0}
"""The same on Ampere, for which FlashAttention 2 was written."""
BACKWARD_ATTENTION = 0.86
"""Rate of the backward pass relative to the forward pass."""
FP8_ATTENTION = {False: 1.35, True: 1.10}
"""Rate in FP8 relative to bf16, of the forward (False) and the backward pass (True): cuDNN's on GB200 and GB300 at 4096 tokens with
block scales, for heads of 128 and of 192 and 128 (cudnn-frontend, benchmark/sdpa_benchmark_training/results: 1.20 to 1.58 and 0.92 to
1.33)."""
FP8_WINDOW = 0.25
"""Rate in FP8 relative to bf16 in the backward pass of windowed attention (gpt_oss in the same results: 0.22 to 0.27)."""
PERMUTED = {"alltoall": 1.0, "allgather": 1.0, "deepep": 1.0, "hybridep": 0.35}
"""Fraction of the permutation's bytes that kernels outside of the exchange still move. HybridEP's follows from its advantage over DeepEP in
megatron-core's moe_perf test (benchmarks/anchors/micro.csv, deepseek in bf16)."""
ROUTING = ("router", "permutation", "sorting")
DROPOUT_ATTENTION = 0.78
"""Rate with dropout of scores, which needs a random number for each pair, relative to attention without."""


@dataclass(frozen=True)
class Seconds:
    """Time of a part of the model, by kind of work."""

    product: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    messages: float = 0.0
    launch: float = 0.0
    """Time that the host needs to launch all of it, concurrently with the device's work. A faster host runs ahead, so compare this over a
    whole pass, not kernel by kernel."""

    @property
    def busy(self) -> float:
        """Time that the device works."""
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
    """Computes seconds on a GPU, with a software stack and a layout's network."""

    gpu: Gpu
    software: Software
    network: Network

    def block(self, block: Block, *, backward: bool) -> Seconds:
        return self.kernels(block.backward if backward else block.forward)

    def kernels(self, kernels: tuple[Kernel, ...]) -> Seconds:
        """Add up kernels that run one after another. A hidden message counts only as far as it outlasts the work that hides it."""
        product = attention = moved = messages = beside = ring = host = 0.0
        software = self.software
        for kernel in kernels:
            if isinstance(kernel, Product):
                product += self.product(kernel)
                module = software.module_seconds * (software.fp8_module if kernel.fp8 else 1.0)
                host += software.kernel_seconds if kernel.plain else kernel.passes * module + (kernel.count - 1) * software.kernel_seconds
            elif isinstance(kernel, Attention):
                attention += self.attention(kernel)
                host += software.kernel_seconds if kernel.plain else software.module_seconds
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
            elif isinstance(kernel, Decoded):
                host += kernel.images * software.image_seconds
        # Messages can be hidden only for as long as the products run.
        messages += max(0.0, beside - 0.9 * product)
        # Keys and values are sent while attention to the previous ones is computed.
        messages += max(0.0, ring - attention) + software.interference * min(ring, attention)
        return Seconds(product, attention, moved, messages, host * self.gpu.host * (1 - software.graphed))

    def _hidden(self, message: Message) -> float:
        if message.beside_product:
            return 1.0
        if message.group == "tensor":
            return self.software.hides_tensor_messages
        return self.software.hides_expert_messages if message.group == "expert" else 0.0

    def product(self, product: Product) -> float:
        """Time of a product, limited by arithmetic (with tiles and waves that are not full) or by memory."""
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
        share = (ATTENTION_SHARE_AMPERE if gpu.efficiency == AMPERE else ATTENTION_SHARE)[kind]
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
        """Time of batched products over all pairs, and of scores in memory, which are written, masked, normalised, dropped out and read."""
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
        """Fraction of a stream's bytes that the stack moves."""
        software = self.software
        if stream.part == "permutation":
            return PERMUTED[software.dispatcher]
        if stream.part == "sorting":
            return 1.0 if software.dispatcher == "alltoall" else 0.0  # the others sort by expert on arrival
        if stream.part in ("expert activation", "expert bias"):
            return 0.0 if software.fuses_experts else 1.0
        if stream.part == "expert weight cast":
            return 0.0 if software.fp8_weights else 1.0
        return 1.0

    def optimizer(self, parameters: float) -> float:
        """Time of Adam on this many parameters of a process: gradients are copied to float32 if necessary, their norm is computed, master
        weights and moments are read and written, weights are written."""
        copied = 6 if self.software.gradient_bytes < 4 else 0
        return (18 + copied + 2 * self.software.optimizer_bytes) * parameters / (self.gpu.memory_tb_s * TERA * self.gpu.efficiency.memory)

    @property
    def memory_bytes(self) -> float:
        return self.gpu.memory_gb * GIGA
