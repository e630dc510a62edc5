"""GPUs and software stacks that the planner knows: values from data sheets, and the few constants that data sheets lack.

Peaks are for dense products and come from data sheets. `Efficiency` has the fraction of them that kernels reach.
docs/planning.md explains how these constants were found, and `megatron-mm plan --measurements` measures how accurate
predictions with them are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from megatron_mm.config.precision import PrecisionConfig

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6


@dataclass(frozen=True)
class Efficiency:
    """Fractions of an architecture's peak rates that its kernels reach on shapes that fill it."""

    product: float
    """bf16 matrix products, relative to the bf16 peak, at the clock that the power limit allows in a long run."""
    product_fp8: float
    """FP8 matrix products, relative to the FP8 peak."""
    attention: float
    """Forward pass of fused attention to long sequences, relative to the bf16 peak, counting the causal half."""
    memory: float
    """Kernels that only move data, relative to the memory rate."""
    product_fp4: float = 0.0
    """FP4 matrix products, relative to the FP4 peak."""
    head_of_64: float = 0.72
    """Rate of attention with heads of 64, relative to heads of 128: there are half as many products per exponential, and exponentials have
    units of their own."""


AMPERE = Efficiency(product=0.82, product_fp8=0.0, attention=0.58, memory=0.80, head_of_64=0.97)
HOPPER = Efficiency(product=0.655, product_fp8=0.67, attention=0.56, memory=0.80)
BLACKWELL = Efficiency(product=0.52, product_fp8=0.56, attention=0.50, memory=0.80, product_fp4=0.43)
BLACKWELL_ULTRA = Efficiency(product=0.68, product_fp8=0.72, attention=0.50, memory=0.80, product_fp4=0.43)
"""`BLACKWELL` and this one come from few runs (benchmarks/anchors/chosen_on.csv), on GB200 and on GB300 with its power limit of 1400 W."""
ADA, CDNA = HOPPER, HOPPER
"""Hopper's numbers, because no runs on Ada or on AMD's CDNA were available."""
VOLTA = Efficiency(product=0.70, product_fp8=0.0, attention=0.30, memory=0.80)


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in its usual machine. Rates are per GPU and in one direction."""

    name: str
    bf16_tflops: float
    fp8_tflops: float
    memory_gb: float
    """Memory that the driver reports, in units of 1e9 bytes."""
    memory_tb_s: float
    nvlink_gb_s: float
    nvlink_domain: int
    """Number of GPUs that NVLink connects."""
    nic_gb_s: float
    """InfiniBand or RoCE rate per GPU."""
    efficiency: Efficiency
    multiprocessors: int = 132
    fp4_tflops: float = 0.0
    host: float = 1.0
    """Time that the processor of its usual machine takes for the same Python code, relative to an H100's machine."""

    def with_power(self, watts: float, *, usual: float = 700.0) -> Gpu:
        """Return the same chip with a lower power limit. The rates of products and attention scale with the square root of the power."""
        scale = min(1.0, (watts / usual) ** 0.5)
        return replace(
            self,
            efficiency=replace(
                self.efficiency,
                product=self.efficiency.product * scale,
                product_fp8=self.efficiency.product_fp8 * scale,
                product_fp4=self.efficiency.product_fp4 * scale,
                attention=self.efficiency.attention * scale,
            ),
        )


H100 = Gpu("h100-sxm", 989, 1979, 85.0, 3.35, 450, 8, 50, HOPPER)
A100 = Gpu("a100-80g", 312, 0, 85.0, 2.04, 300, 8, 25, AMPERE, multiprocessors=108, host=1.7)

GPUS: dict[str, Gpu] = {
    "h100-sxm": H100,
    "h200": replace(H100, name="h200", memory_gb=150.0, memory_tb_s=4.8),
    "b200": Gpu("b200", 2250, 4500, 191.0, 8.0, 900, 8, 50, BLACKWELL, multiprocessors=148, fp4_tflops=9000),
    "a100-80g": A100,
}
"""GPUs that `--gpu` accepts."""

MEASURED_GPUS: dict[str, Gpu] = {
    **GPUS,
    "a100-40g": replace(A100, name="a100-40g", memory_gb=42.4, memory_tb_s=1.555),
    "h800": replace(H100, name="h800", nvlink_gb_s=200),
    "a800": replace(A100, name="a800", nvlink_gb_s=200),
    "h20": replace(H100, name="h20", bf16_tflops=148, fp8_tflops=296, memory_gb=100, memory_tb_s=4.0, multiprocessors=78),
    "gh200": replace(H100, name="gh200", memory_gb=100.0, memory_tb_s=4.0),
    "gb200": Gpu("gb200", 2500, 5000, 199.0, 8.0, 900, 72, 50, BLACKWELL, multiprocessors=148, fp4_tflops=10000),
    "b300": Gpu("b300", 2250, 4500, 288.0, 8.0, 900, 8, 100, BLACKWELL_ULTRA, multiprocessors=148, fp4_tflops=13500).with_power(
        1100, usual=1400
    ),
    "gb300": Gpu("gb300", 2500, 5000, 288.0, 8.0, 900, 72, 100, BLACKWELL_ULTRA, multiprocessors=148, fp4_tflops=15000),
    "h100-pcie": replace(H100, name="h100-pcie", bf16_tflops=756, fp8_tflops=1513, memory_tb_s=2.0, nvlink_gb_s=26, multiprocessors=114),
    "h100-nvl": replace(H100, name="h100-nvl", bf16_tflops=835, fp8_tflops=1671, memory_gb=100, memory_tb_s=3.9, nvlink_gb_s=26),
    "l40s": Gpu("l40s", 362, 733, 48.0, 0.864, 26, 8, 25, ADA, multiprocessors=142),
    "mi300x": Gpu("mi300x", 1307, 2615, 206.0, 5.3, 448, 8, 50, CDNA, multiprocessors=304),
    "mi325x": Gpu("mi325x", 1307, 2615, 275.0, 6.0, 448, 8, 50, CDNA, multiprocessors=304),
    "mi355x": Gpu("mi355x", 2500, 5000, 309.0, 8.0, 538, 8, 50, CDNA, multiprocessors=256),
    "v100": Gpu("v100", 125, 0, 34.0, 0.9, 150, 8, 12.5, VOLTA, multiprocessors=80, host=2.0),
}
"""GPUs that published measurements may name."""


_CHIPS = sorted({name.split("-")[0] for name in MEASURED_GPUS}, key=len, reverse=True)


def gpu_named(text: str) -> Gpu | None:
    """Return the GPU with a name as in published tables: "H100", "A100-40GB", "NVIDIA H100 80GB HBM3", "8xB200"; None if it is unknown."""
    name = re.sub(r"[\s_()/]+", "-", text.strip().lower())
    if name in MEASURED_GPUS:
        return MEASURED_GPUS[name]
    for chip in _CHIPS:
        if not re.search(rf"(^|[^a-z0-9]|\dx){chip}([^0-9]|$)", name):
            continue
        if chip == "a100":
            return MEASURED_GPUS["a100-40g" if re.search(r"(?<!\d)40-?g", name) else "a100-80g"]
        if chip == "h100":
            return MEASURED_GPUS[next((kind for kind in ("h100-pcie", "h100-nvl") if kind[5:] in name.replace("nvlink", "")), "h100-sxm")]
        return MEASURED_GPUS[chip]
    return None


Dispatcher = Literal["alltoall", "allgather", "deepep", "hybridep"]
"""How tokens are sent to experts: NCCL's all-to-all of permuted copies; an all-gather of all tokens; DeepEP, which sends a token once to
each GPU and permutes there; HybridEP, which permutes while receiving."""


@dataclass(frozen=True)
class Software:
    """A training stack, described by its effects on kernels and messages."""

    name: str
    attention: str = "fused"
    """fused (cuDNN or FlashAttention 3), flash2, triton (the first FlashAttention's kernels), or unfused (scores in memory)."""
    moved: float = 1.0
    """Bytes that element-wise kernels move, relative to fused ones."""
    kernel_seconds: float = 25 * MICRO
    """Host time of an operation of torch: Python, autograd, allocator, launch."""
    module_seconds: float = 250 * MICRO
    """Host time of one pass, forward or backward, through the module around a matrix product or attention."""
    message_seconds: float = 80 * MICRO
    """Host time to start a collective."""
    tensor_seconds: float = 50 * MICRO
    """Host time per parameter tensor and step: its gradient's hook, copies from and to master weights."""
    step_seconds: float = 12e-3
    """Host time between steps: batch to the device, loss to the host, learning rate, timers."""
    image_seconds: float = 1e-3
    """Host time that decoding an image with Pillow takes from the passes in one direction, because the decoding threads share the
    interpreter with the thread that launches kernels. On an H200 whose host takes 1.6 times as long, forward passes of mm1_1b took 0.165 s
    longer with 100 images per step than with none to decode (docs/planning.md)."""
    fp8_module: float = 1.0
    """Host time of a module in FP8, relative to bf16."""
    hides_tensor_messages: float = 0.0
    """Fraction of the tensor-parallel messages that products hide."""
    scatters_sends: bool = False
    """Without sequence parallelism, too, each process of a tensor-parallel group sends only its part of the hidden states to the next stage
    (arXiv 2104.04473, section 4.1)."""
    hides_data_messages: bool = True
    """Gradients are reduced while the backward pass runs."""
    shards_optimizer: bool = True
    gradient_bytes: int = 4
    """Bytes per number of reduced gradients."""
    interference: float = 0.12
    """Time by which concurrent kernels become slower, relative to the time of the hidden message."""
    optimizer_bytes: int = 12
    """Bytes of optimizer state per trainable parameter: float32 master weights and two float32 moments."""
    fp8_weights: bool = False
    """Weights are kept only in FP8. Otherwise FP8 copies, plain and transposed, are kept in addition to bf16 weights."""
    casts_gathered_weights: bool = False
    """Shards of weights are float32 master weights, which are cast when they are gathered (torch's FSDP, `MixedPrecisionPolicy`), so no
    bf16 copy of a shard is kept beside them."""
    fuses_loss: bool = False
    """The loss keeps no float32 copy of the logits."""
    copies_logits: bool = False
    """The loss keeps several float32 copies of the logits."""
    hides_expert_messages: float = 0.0
    """Fraction of the experts' exchange that products hide."""
    expert_operations: float = 1.0
    """Number of operations around experts (router, permutation, sorting), relative to megatron-core's unfused ones."""
    dispatcher: Dispatcher = "alltoall"
    graphed: float = 0.0
    """Fraction of the host's time in layers that CUDA graphs save."""
    fuses_experts: bool = False
    """Kernels of grouped products also add biases, apply the activation and cast to FP8."""
    fp8_attention: bool = False
    """Attention computes its products in FP8."""


MEGATRON = Software("megatron-core with Transformer Engine", fp8_module=1.5)
"""The factor for FP8 modules was measured on this trainer's steps of mm1_1b (`benchmarks/planning_own_runs.py`)."""
_FLAT = Software(
    "",
    kernel_seconds=8 * MICRO,
    module_seconds=40 * MICRO,
    tensor_seconds=10 * MICRO,
    step_seconds=4e-3,
    fp8_weights=True,
    casts_gathered_weights=True,
)
"""Plain modules, a layer's gradients in one tensor, an optimizer that updates all tensors at once; weights are cast when they are used."""
_COMPILED = replace(_FLAT, kernel_seconds=4 * MICRO, module_seconds=10 * MICRO, message_seconds=20 * MICRO)

STACKS: dict[str, Software] = {
    "megatron": MEGATRON,
    "nemo": replace(MEGATRON, name="NeMo", hides_tensor_messages=0.7, gradient_bytes=2, fp8_weights=True, fuses_loss=True),
    "bridge": replace(MEGATRON, name="Megatron-Bridge", gradient_bytes=2, hides_tensor_messages=0.7, fp8_weights=True, fuses_loss=True),
    "megatron-2021": Software(
        "Megatron-LM before FlashAttention",
        attention="unfused",
        moved=1.45,
        hides_data_messages=False,
        shards_optimizer=False,
        scatters_sends=True,
    ),
    "llm-foundry": replace(
        _FLAT,
        name="Composer and FSDP, eager",
        attention="triton",
        moved=1.95,
        gradient_bytes=2,
        interference=0.3,
        fuses_loss=True,
    ),
    "fsdp-eager": replace(_FLAT, name="FSDP, eager", attention="flash2", moved=2.6, gradient_bytes=2, interference=0.3, copies_logits=True),
    "fsdp-compiled": replace(
        _COMPILED, name="FSDP, compiled", attention="flash2", moved=1.1, gradient_bytes=2, interference=0.2, copies_logits=True
    ),
    "jax": replace(_COMPILED, name="JAX and XLA", moved=1.0, gradient_bytes=2, hides_tensor_messages=0.5),
}
"""Software stacks of the published measurements."""

OURS = replace(MEGATRON, name="this trainer with Transformer Engine")
"""This trainer."""


def with_precision(software: Software, precision: PrecisionConfig, *, single: bool = False) -> Software:
    """Apply an experiment's formats of gradients, moments and weights.

    Args:
        single: the experiment trains in float32, so gradients are float32, too.
    """
    moments = sum(2 if format == "bf16" else 4 for format in (precision.exp_avg, precision.exp_avg_sq))
    gradients = 2 if precision.gradients == "bf16" and not single else 4
    fp8_weights = software.fp8_weights or precision.fp8_weights
    return replace(software, gradient_bytes=gradients, optimizer_bytes=4 + moments, fp8_weights=fp8_weights)


def with_host(software: Software, factor: float) -> Software:
    """Multiply all times of the host by `factor`."""
    names = ("kernel_seconds", "module_seconds", "message_seconds", "tensor_seconds", "step_seconds", "image_seconds")
    return replace(software, **{name: factor * getattr(software, name) for name in names})
