"""Megatron-LM's functional tests as measurements: converts rows of benchmarks/anchors/megatron_ci_memory.csv to the columns of
throughput.csv.

The tests run small models on machines with eight GPUs, where the host limits the step time. No published throughput shows this, so the
planner's times of the host were chosen from these tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

COLUMNS = {"test", "plat", "num-layers", "hidden-size"}
"""Columns by which a file of functional tests is recognised."""

_NAMES = {
    "layers": "num-layers",
    "hidden": "hidden-size",
    "heads": "num-attention-heads",
    "kv_heads": "num-query-groups",
    "ffn": "ffn-hidden-size",
    "moe_ffn": "ffn-hidden-size",
    "seq": "seq-length",
    "mbs": "micro-batch-size",
    "gbs": "global-batch-size",
    "tp": "tensor-model-parallel-size",
    "pp": "pipeline-model-parallel-size",
    "cp": "context-parallel-size",
    "ep": "expert-model-parallel-size",
    "experts": "num-experts",
    "topk": "moe-router-topk",
    "gpu": "plat",
    "step_time_s": "it_med",
}
GPT2_VOCABULARY = 50257
"""Vocabulary size, which is padded to a multiple of 128 times the tensor-parallel size."""
GPUS = 8
"""GPUs of a test's machine. Tests with "release" in their names ran on an unknown, larger number of GPUs."""


def columns_of(row: Mapping[str, str]) -> dict[str, str]:
    """Convert a row to the columns of throughput.csv, with Megatron-LM's defaults for arguments that are not given.

    Additional columns: `state_gb` (allocated between steps), `sharding` (of the optimizer), `sequence` (parallelism), `tied` (embeddings),
    `overlap` (of the reduction), `unplanned` (reason why a row cannot be planned).
    """
    cells = {name: row.get(source, "") for name, source in _NAMES.items()}
    name = row.get("test", "")
    if not re.match(r"(gpt|moe|mixtral)/", name) or "grpo" in name:
        return {**cells, "unplanned": "it does not train a plain decoder"}
    if "release" in name or "fsdp" in name:
        return {**cells, "unplanned": "the number of GPUs is unknown"}
    if re.search(r"cudagraph|mtp|offload|a2a_ovlp|muon|op_fuser|frozen|tp_comm|tp_overlap|nondeterministic", name):
        return {**cells, "unplanned": "it tests a feature that the planner does not model"}
    tensor = int(cells["tp"] or 1)
    unit = 128 * tensor
    stage_layers, each = int(cells["layers"] or 0) // int(cells["pp"] or 1), row.get("num-layers-per-virtual-pipeline-stage", "")
    sharded = row.get("use-distributed-optimizer") == "true"
    etp = re.search(r"etp(\d+)", name)
    memory = row.get("memmax", "")
    return {
        **cells,
        "id": "|".join((name, row.get("plat", ""), row.get("env", ""))),
        "source": "Megatron-LM functional tests",
        "model": "gpt of the functional tests",
        "n_gpus": str(GPUS),
        "vpp": str(stage_layers // int(each)) if each else "1",
        "etp": etp.group(1) if etp else "",
        "gated_mlp": "1" if row.get("swiglu") == "true" else "0",
        "vocab": row.get("vocab-size") or str(-(-GPT2_VOCABULARY // unit) * unit),
        "recompute": row.get("recompute-granularity") or "none",
        "precision": "fp8" if row.get("fp8-format") else "bf16",
        "state_gb": row.get("mem", ""),
        "mem_gib": str(float(memory) * 1e9 / 2**30) if memory else "",
        "sharding": "optimizer" if sharded else "none",
        "sequence": "1" if row.get("sequence-parallel") == "true" else "0",
        "tied": "0" if "untie" in name else "1",
        "overlap": "1" if "overlap_grad_reduce" in name else "0",
        "notes": "unfused attention" if row.get("transformer-impl") == "local" else "",
    }
