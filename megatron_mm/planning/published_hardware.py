"""Finds the GPU, the network and the precision of a published measurement, from its columns and notes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from megatron_mm.planning.cells import precision_of
from megatron_mm.planning.hardware import Gpu, Software, gpu_named

GPUS_OF_MACHINE = 8


def gpu_of(cells: Mapping[str, str]) -> Gpu | None:
    """Return the row's GPU with the power limit, the kind of memory and the network that its notes state; None if it is unknown."""
    gpu, notes = gpu_named(cells.get("gpu", "")), cells.get("notes", "")
    if gpu is None:
        return None
    watts = re.search(r"(\d{3,4})\s*W\b", notes)
    if watts and gpu.name.startswith("h100"):
        gpu = gpu.with_power(float(watts.group(1)))
    if "hbm2e" in notes.lower() and gpu.name.startswith("h100"):
        gpu = replace(gpu, memory_tb_s=2.4)
    rate = _network_rate(notes)
    return replace(gpu, nic_gb_s=rate) if rate else gpu


def _network_rate(notes: str) -> float | None:
    """Rate of the network in GB/s per GPU, from notes such as "1600 Gbps node-node interconnect" or "400 Gb/s per GPU"."""
    found = re.search(r"(\d[\d,]*)\s*G(?:bps|bit/s|b/s)\b([^;,.]*)", notes)
    if found is None:
        return None
    each = float(found.group(1).replace(",", "")) / 8
    if re.search(r"per GPU|a GPU|/GPU", found.group(2)):
        return each
    return each / GPUS_OF_MACHINE if re.search(r"node|machine|host|server|instance", found.group(2)) else None


def at_precision(cells: Mapping[str, str], gpu: Gpu, software: Software) -> tuple[Gpu, Software]:
    """Adapt rates to the row's precision: for FP4, replace those of FP8; for float32 on tensor cores, halve those of bf16 and double the
    moved bytes."""
    precision = precision_of(cells)
    if re.search(r"fp4|float4|int4", precision) and gpu.fp4_tflops:
        rates = replace(gpu.efficiency, product_fp8=gpu.efficiency.product_fp4)
        gpu = replace(gpu, fp8_tflops=gpu.fp4_tflops, efficiency=rates)
    if re.search(r"fp32|tf32|float32|single", precision):
        gpu = replace(gpu, bf16_tflops=gpu.bf16_tflops / 2)
        software = replace(software, moved=2 * software.moved)
    return gpu, software
