"""Finds the training stack of a published measurement from its source, release and notes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from megatron_mm.planning.bridge_recipes import ALL_GRAPHED, OVERLAPPED, Release, Setting, setting_of
from megatron_mm.planning.cells import count, precision_of, text_of
from megatron_mm.planning.decoder_job import Adapters
from megatron_mm.planning.hardware import STACKS, Dispatcher, Gpu, Software
from megatron_mm.planning.row_checks import fsdp_of


def with_experts(stack: Software, cells: Mapping[str, str], setting: Setting | None) -> Software:
    """Set how tokens are sent to experts, as stated in a row (dispatcher, overlap, CUDA graphs), or else in its source's recipe."""
    text = text_of(cells, "source", "ref", "notes", "dispatcher")
    if setting is not None:
        stack = setting.of(stack)
    for words, dispatcher in _DISPATCHERS.items():
        if re.search(words, text):
            stack = replace(stack, dispatcher=dispatcher)
            break
    if re.search(r"(ep|1f1b|a2a|moe)[- ]?(\w+[- ])?overlap", text):
        stack = replace(stack, hides_expert_messages=OVERLAPPED)
    if re.search(r"full[- ]iteration (cuda )?graph", text):
        stack = replace(stack, graphed=ALL_GRAPHED)
    if re.search(r"token-?drop|capacity factor", text):
        stack = replace(stack, expert_operations=stack.expert_operations * COUNTED_OPERATIONS)
    if stack.dispatcher in ("deepep", "hybridep"):
        stack = replace(stack, expert_operations=stack.expert_operations * FUSED_OPERATIONS)
    return stack


_DISPATCHERS: dict[str, Dispatcher] = {
    r"hybrid-?ep": "hybridep",
    r"deep-?ep": "deepep",
    r"all-?gather dispatch|dispatch\w* all-?gather": "allgather",
    r"\ba2a\b(?! overlap)|\ball-?to-?all\b": "alltoall",
}
"""Regular expression for the text of a row -> dispatcher."""
FUSED_OPERATIONS = 0.5
"""Operations around experts with DeepEP or HybridEP, whose exchange includes permutation, relative to megatron-core's all-to-all."""
COUNTED_OPERATIONS = 0.6
"""Relative operations around experts if every expert gets the same number of tokens, so that nothing waits for counts
(`layer_sections`)."""


def has_latents(cells: Mapping[str, str]) -> bool:
    """Return whether a row's model has latent attention, according to its name or the row's notes."""
    text = text_of(cells, "model", "notes")
    return bool(re.search(r"\bmla\b|moonlight|kimi|deepseek[-_ ]?(v[23]|r1(?!-distill))", text))


def software_of(cells: Mapping[str, str], gpu: Gpu) -> Software:
    """Return the stack of a row, from the text about its source and from the row's other columns."""
    notes = cells.get("notes", "").lower()
    stack = _stack(cells)
    if "unfused attention" in notes:
        stack = replace(stack, attention="unfused")
    if stack.name == STACKS["bridge"].name and has_latents(cells):
        # its recipes for these models keep moments in bf16 and master weights in float32
        stack = replace(stack, optimizer_bytes=8)
    if re.search(r"async[- ]?tp", notes) and not stack.hides_tensor_messages:
        stack = replace(stack, hides_tensor_messages=ASYNC_TENSOR)
    if (count(cells, "experts") or 0) > 1:
        stack = with_experts(stack, cells, recipe_setting(cells, gpu))
    if cells.get("overlap"):
        stack = replace(stack, hides_data_messages=cells["overlap"] == "1")
    return stack


ASYNC_TENSOR = 0.5
"""Fraction of the tensor-parallel messages that torch's asynchronous tensor parallelism hides."""


def _stack(cells: Mapping[str, str]) -> Software:
    text = text_of(cells, "source", "ref", "notes")
    arxiv = re.search(r"arxiv\s*:?\s*(\d{4})\.", text)
    if re.search(r"llm-foundry|mosaic|composer", text):
        return STACKS["llm-foundry"]
    if re.search(r"torchtitan|fsdp2", text):
        compiled = "compile" in text or "float8" in text or "fp8" in cells.get("precision", "").lower()
        stack = STACKS["fsdp-compiled" if compiled else "fsdp-eager"]
        if re.search(r"transformer[- ]?engine|\bte\b", text):  # its modules, as in megatron-core; its attention is cuDNN's
            module = STACKS["megatron"]
            stack = replace(stack, moved=module.moved, attention=module.attention, module_seconds=module.module_seconds)
        return replace(stack, copies_logits=False) if compiled and re.search(r"20(25|2[6-9])", text) else stack
    if re.search(r"maxtext|jax|axlearn|levanter|paxml", text):
        return STACKS["jax"]
    if "bridge" in text:
        return STACKS["bridge"]
    if (arxiv and arxiv.group(1) < "2206") or "megatron-deepspeed" in text:  # a fork of Megatron-LM of 2021
        return STACKS["megatron-2021"]
    if re.search(r"dgxc|nemo", text):
        return STACKS["nemo"]
    if fsdp_of(cells):
        return STACKS["fsdp-compiled"]
    return STACKS["megatron"]


def recipe_setting(cells: Mapping[str, str], gpu: Gpu) -> Setting | None:
    """Return the experts' setting in the performance recipe of a row from Megatron-Bridge; None for other rows."""
    source = cells.get("source", "").lower()
    if "bridge" not in source or "performance" not in source:
        return None
    expert = count(cells, "ep")
    return setting_of(
        model=cells.get("model", ""),
        gpu=gpu.name,
        precision=precision_of(cells),
        release=release_of(source) or LATEST,
        on_machines=expert is not None and expert > gpu.nvlink_domain,
    )


LATEST: Release = (26, 8, 0)
"""Release that is assumed for a row that names none."""


def release_of(source: str) -> Release | None:
    """Release (year, month, number) of NVIDIA's container that a source names, as in "NeMo performance summary 25.04"; None if it names
    none."""
    found = re.search(r"(?<![\d.])(2[4-9])\.(0\d|1[0-2])(?:\.(\d\d))?\b", source)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def adapters_of(cells: Mapping[str, str]) -> Adapters:
    """Return which products have low-rank adapters, which alone are then trained: by default all, and in Megatron-Bridge's performance
    recipes the projections to queries, keys and values (perf_recipes: `peft.target_modules`)."""
    text = text_of(cells, "model", "source", "ref", "notes")
    if not re.search(r"\bq?lora\b|\bdora\b|\bpeft\b|adapter", text):
        return "none"
    return "queries" if re.search(r"bridge performance", text) else "all"


def document_length_of(cells: Mapping[str, str]) -> float | None:
    """Mean number of tokens in a document if several are packed into a sequence: Megatron-Bridge's recipes for fine-tuning pack SQuAD."""
    text = text_of(cells, "source", "notes")
    return SQUAD_TOKENS if "bridge" in text and re.search(r"\bsft\b|\blora\b|fine-?tun", text) else None


SQUAD_TOKENS = 200.0
"""About the length of a paragraph of SQuAD with a question and its answer."""
