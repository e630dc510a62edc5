"""Time single parts of a model, forward and backward, on both layer backends. Used by `gpu_bench.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from benchmarks.parts import Row
from megatron_mm.config import EvaConfig, Experiment
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.flops import vision_flops
from megatron_mm.models.eva import EvaSwiGLU, PaddedSwiGLU
from megatron_mm.models.tower_graph import GraphedTower
from megatron_mm.models.vision import VisionTower
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.platform import cuda_graph
from megatron_mm.training.build import build_chunks, build_model
from megatron_mm.training.tower_graph import graph_tower

PACKINGS = {
    "one document of 4096": [4096],
    "8 of 512": [512] * 8,
    "32 of 128": [128] * 32,
    "12 of 24 to 1500": [1500, 900, 512, 400, 256, 200, 128, 64, 50, 40, 24, 22],
}
"""Lengths of the documents in a sequence, in tokens."""


def _one_layer(base: Experiment, layers: str, precision: str) -> Experiment:
    """Return a model with one decoder layer (InfiMM: with as few as have a gated block) and the whole tower, on one process."""
    fewest = base.model.gated.every_n_layers if isinstance(base.model, InfiMMConfig) else 1
    model = replace(base.model, decoder=replace(base.model.decoder, num_layers=fewest))  # type: ignore[type-var]
    parallel = replace(base.parallel, tensor=1, pipeline=1, virtual=1, expert=1, stage_layers=None, recompute="none")
    train = replace(base.train, layers=layers, precision=precision, global_batch_size=1, micro_batch_size=1)  # type: ignore[arg-type]
    return replace(base, model=model, parallel=parallel, train=train)


def _chunk(base: Experiment, layers: str, precision: str) -> tuple[torch.nn.Module, torch.device]:
    settings = _one_layer(base, layers, precision)
    topology = topologies.initialize(settings.parallel, seed=1)
    chunks = build_chunks(settings, topology)
    initialize_weights(chunks, seed=1)
    return chunks[0], topology.device


def _median_ms(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    seconds = []
    for _ in range(3 + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[3:])


def _attend(attention: torch.nn.Module, *qkv: torch.Tensor, packed: PackedSeqParams, grad: torch.Tensor) -> None:
    out = attention(*qkv, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)
    out.reshape(grad.shape).backward(grad)
    for tensor in qkv:
        tensor.grad = None


def _encode(tower: VisionTower, pixels: torch.Tensor) -> None:
    tower(pixels).float().square().mean().backward()
    tower.zero_grad()


def time_attention(base: Experiment, backends: list[tuple[str, str]], *, repeats: int) -> Iterator[Row]:
    """Time the decoder's core attention over packed documents; causal attention counts half the FLOPs of full attention."""
    decoder, slowest = base.model.decoder, {}
    for layers, precision in backends:
        chunk, device = _chunk(base, layers, precision)
        attention = next(
            module for name, module in chunk.named_modules() if name.endswith("decoder.layers.0.self_attention.core_attention")
        )
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        for name, lengths in PACKINGS.items():
            total, width = sum(lengths), decoder.head_dim
            shapes = (decoder.num_attention_heads, decoder.num_query_groups, decoder.num_query_groups)
            q, k, v = (torch.randn(total, heads, width, device=device, dtype=dtype, requires_grad=True) for heads in shapes)
            bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
            packed = PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
            )
            grad = torch.randn(total, decoder.num_attention_heads * width, device=device, dtype=dtype)

            ms = _median_ms(partial(_attend, attention, q, k, v, packed=packed, grad=grad), device, repeats)
            flops = 3 * 2 * decoder.num_attention_heads * width * sum(length**2 for length in lengths)
            slowest.setdefault(name, ms)
            yield {
                "case": f"attention, {name}: {layers} {precision}",
                "ms": round(ms, 3),
                "speed": round(slowest[name] / ms, 3),
                "tflops": round(flops / ms / 1e9, 3),
            }
        topologies.shutdown()


def time_tower(base: Experiment, backends: list[tuple[str, str]], *, images: list[int], repeats: int) -> Iterator[Row]:
    """Time the image tower by the number of images in a micro-batch."""
    slowest: dict[int, float] = {}
    for layers, precision in backends:
        chunk, device = _chunk(base, layers, precision)
        tower = next(module for module in chunk.modules() if isinstance(module, VisionTower))
        size = tower.config.image_size
        for count in images:
            pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)

            ms = _median_ms(partial(_encode, tower, pixels), device, repeats)
            slowest.setdefault(count, ms)
            yield {
                "case": f"tower, {count} images: {layers} {precision}",
                "ms": round(ms, 3),
                "speed": round(slowest[count] / ms, 3),
                "tflops": round(count * vision_flops(tower.config) / ms / 1e9, 3),
            }
        topologies.shutdown()


def time_swiglu(config: EvaConfig, backend: tuple[str, str], *, images: int, device: torch.device, repeats: int) -> Iterator[Row]:
    """Time the forward pass of a SwiGLU of a frozen EVA tower with compiled kernels, in rows of its width and in padded rows.

    `difference` is that between the two outputs, relative to the first.
    """
    layers, precision = backend
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    plain_ms, plain_out = 0.0, torch.empty(0)
    with torch.device(device):
        plain, padded = EvaSwiGLU(config, dtype=dtype, fused=True), PaddedSwiGLU(config, dtype=dtype)
        x_nsv = torch.randn(images, config.num_tokens, config.hidden_size, dtype=dtype)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=getattr(parameter, "init_std", 1.0))
    padded.load_state_dict(plain.state_dict())
    flops = 6.0 * x_nsv.numel() * config.ffn_hidden_size
    for swiglu, columns in ((plain, config.ffn_hidden_size), (padded, config.ffn_hidden_size + len(padded.blank))):
        forward = torch.no_grad()(swiglu.forward)
        ms, out = _median_ms(partial(_call, forward, x_nsv), device, repeats), forward(x_nsv)
        if swiglu is plain:
            plain_ms, plain_out = ms, out
        yield {
            "case": f"SwiGLU of the tower, {images} images, rows of {columns}: {layers} {precision}",
            "ms": round(ms, 3),
            "speed": round(plain_ms / ms, 3),
            "tflops": round(flops / ms / 1e9, 3),
            "difference": float(f"{float((out - plain_out).float().norm() / plain_out.float().norm()):.2g}"),
        }


def _eager(forward: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> Callable[[], torch.Tensor]:
    return partial(forward, example)


def time_tower_graph(
    base: Experiment, backends: list[tuple[str, str]], *, images: list[int], at_once: list[int], repeats: int
) -> Iterator[Row]:
    """Time the forward pass of a frozen tower, plainly and as a CUDA graph, by the number of images in a micro-batch.

    On a CPU, the graph is replaced by the tower itself, which shows what blank images cost.

    Args:
        at_once: numbers of images per replay.
    """
    for layers, precision in backends:
        chunk, device = _chunk(base, layers, precision)
        tower = chunk.encoder.parts["vision"].requires_grad_(False)  # type: ignore[union-attr, operator]
        size = tower.config.image_size
        ways: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {"no graph": (1, torch.no_grad()(tower.forward))}
        on_gpu = device.type == "cuda"
        for number in at_once:
            static = torch.zeros(number, 3, size, size, dtype=torch.uint8, device=device)
            capture = cuda_graph.capture if on_gpu else _eager
            ways[f"graph of {number}" if on_gpu else f"no graph, {number} at once"] = (
                number,
                GraphedTower(static, capture(tower.forward, static)),
            )
        for count in images:
            pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
            calls = {name: (step, partial(_call, way, pixels)) for name, (step, way) in ways.items()}
            yield from _time_ways(calls, f"frozen tower, {count} images, {{}}: {layers} {precision}", count, device, repeats)
        topologies.shutdown()


def time_trained_graph(
    base: Experiment, backends: list[tuple[str, str]], *, images: list[int], at_once: list[int], repeats: int
) -> Iterator[Row]:
    """Time forward and backward pass of a tower that trains, plainly and as CUDA graphs, by the number of images in a micro-batch.

    Gradients are added to the buffers of the data-parallel wrapper, as in training. Only on a GPU.

    Args:
        at_once: numbers of images per replay.
    """
    for layers, precision in backends:
        settings = _one_layer(base, layers, precision)
        parallel = replace(settings.parallel, overlap_grad_reduce=False, overlap_param_gather=False)
        topology = topologies.initialize(parallel, seed=1)
        model = build_model(replace(settings, parallel=parallel), topology)
        tower = model[0].module.encoder.parts["vision"]
        eager, size, device = tower.forward, tower.config.image_size, topology.device
        ways: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {"no graph": (1, eager)}
        for number in at_once:
            graph_tower(replace(settings, parallel=parallel, kernels=replace(settings.kernels, tower_graph=number)), model)
            ways[f"graph of {number}"] = number, tower.forward
            tower.forward = eager
        for count in images:
            pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
            gradient = torch.randn_like(eager(pixels).detach())
            calls = {
                name: (step, partial(_both_passes, way, pixels, gradient))
                for name, (step, way) in ways.items()
                if not count > step > 1  # more images run without the graph
            }
            yield from _time_ways(calls, f"tower that trains, {count} images, {{}}: {layers} {precision}", count, device, repeats)
        topologies.shutdown()


def _time_ways(
    calls: dict[str, tuple[int, Callable[[], None]]], case: str, images: int, device: torch.device, repeats: int
) -> Iterator[Row]:
    """Time each way, given as (images per pass, call), and compare it with the first one."""
    plain = None
    for name, (step, call) in calls.items():
        ms = _median_ms(call, device, repeats)
        plain = plain or ms
        yield {"case": case.format(name), "ms": round(ms, 3), "speed": round(plain / ms, 3), "images_computed": -(-images // step) * step}


def _both_passes(way: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, gradient: torch.Tensor) -> None:
    way(pixels).backward(gradient)


def _call(way: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> None:
    way(pixels)
