"""Which training stack a published measurement ran on: by the words of its source, its release and its notes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from megatron_mm.planning.hardware import STACKS, Software


def fuses_exchange(stack: Software) -> Software:
    """With DeepEP or HybridEP and their overlap: a token goes to a machine once, permutation is part of the exchange, and another
    micro-batch computes meanwhile."""
    return replace(stack, hides_expert_messages=0.8, sends_once=True, expert_operations=0.25)


def has_latents(cells: Mapping[str, str]) -> bool:
    """Whether a row's model has latent attention, by its name or the row's notes."""
    text = " ".join(cells.get(name, "") for name in ("model", "notes")).lower()
    return bool(re.search(r"\bmla\b|moonlight|kimi|deepseek[-_ ]?(v[23]|r1(?!-distill))", text))


def software_of(cells: Mapping[str, str]) -> Software:
    """The stack that a source ran, by its words, and what a row says of it."""
    notes = cells.get("notes", "").lower()
    stack = _stack(cells)
    if "unfused attention" in notes:
        stack = replace(stack, attention="unfused")
    if stack.name == STACKS["bridge"].name and has_latents(cells):
        # its recipes of these models keep moments in bf16, beside float32 weights
        stack = replace(stack, optimizer_bytes=8)
    if re.search(r"async[- ]?tp", notes) and not stack.hides_tensor_messages:
        stack = replace(stack, hides_tensor_messages=ASYNC_TENSOR)
    if cells.get("overlap"):
        stack = replace(stack, hides_data_messages=cells["overlap"] == "1")
    return stack


ASYNC_TENSOR = 0.5
"""Part of the tensor-parallel messages that torch's asynchronous tensor parallelism hides."""


def _stack(cells: Mapping[str, str]) -> Software:
    text = " ".join(cells.get(name, "") for name in ("source", "ref", "notes")).lower()
    arxiv = re.search(r"arxiv\s*:?\s*(\d{4})\.", text)
    if re.search(r"llm-foundry|mosaic|composer", text):
        return STACKS["llm-foundry"]
    if re.search(r"torchtitan|fsdp2", text):
        compiled = "compile" in text or "float8" in text or "fp8" in cells.get("precision", "").lower()
        stack = STACKS["fsdp-compiled" if compiled else "fsdp-eager"]
        return replace(stack, copies_logits=False) if compiled and re.search(r"20(25|2[6-9])", text) else stack
    if re.search(r"maxtext|jax|axlearn|levanter|paxml", text):
        return STACKS["jax"]
    fused = bool(re.search(r"hybridep|deepep|ep overlap", text))
    if "bridge" in text:
        return _bridge(cells, text, fused)
    if fused:
        return fuses_exchange(STACKS["megatron"])
    if arxiv and arxiv.group(1) < "2206":
        return STACKS["megatron-2021"]
    if re.search(r"dgxc|nemo", text):
        return STACKS["nemo"]
    if cells.get("fsdp"):
        return STACKS["fsdp-compiled"]
    return STACKS["megatron"]


def _bridge(cells: Mapping[str, str], text: str, fused: bool) -> Software:
    """Megatron-Bridge. Its performance recipes exchange experts' tokens with DeepEP or HybridEP; from release 26.06 on they also overlap
    the exchange and capture the whole layer, experts included, in CUDA graphs."""
    stack = STACKS["bridge"]
    release = re.search(r"\b(2[5-9])\.(\d\d)\b", cells.get("source", ""))
    if fused or (release and release.groups() >= ("26", "06")):
        return fuses_exchange(stack)
    if "performance" in cells.get("source", "").lower():
        return replace(stack, sends_once=True, expert_operations=0.5)  # routing in CUDA graphs
    return stack
