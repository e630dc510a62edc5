"""Published measurements as jobs: a row of a table (columns as in benchmarks/anchors/throughput.csv) -> model, layout, GPU and step time.

A row may lack almost anything. A setting that the published source leaves out is chosen as its authors would choose it: the fastest one
that fits. A row that cannot be planned (no model shape, an unknown GPU, a cell that cannot be read, degrees that do not go together)
becomes a `Skipped` with the reason, never an exception.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mm.planning import functional_tests
from megatron_mm.planning.cells import GIB, MEASURED, UnusableRow, count, flag, has_unit, measured, precision_of, text_of, tidy
from megatron_mm.planning.decoder_job import decoder_job
from megatron_mm.planning.decoder_shape import DecoderShape, Latents
from megatron_mm.planning.hardware import Software
from megatron_mm.planning.job import Job
from megatron_mm.planning.layout import Layout
from megatron_mm.planning.published_hardware import at_precision, gpu_of
from megatron_mm.planning.published_recompute import recomputed
from megatron_mm.planning.published_software import adapters_of, document_length_of, has_latents, release_of, software_of
from megatron_mm.planning.row_checks import check, fsdp_of, gpus_of
from megatron_mm.planning.step import Prediction, StepModel

MADE_TO_FIT = 1.2
"""Fraction of a GPU's memory up to which a run is assumed to have been made to fit by cheap means (bf16 gradients and moments, FP8 weights,
recomputed norms). Its authors would prefer these to recomputing everything, which takes a third more time."""


@dataclass(frozen=True)
class Measurement:
    """A row that can be planned."""

    row: str
    source: str
    model: str
    kind: str
    """Either "dense" or "moe"."""
    group: str
    """Rows that differ only in scale or batch share a group. A held-out group is a stronger test than a held-out row."""
    jobs: tuple[Job, ...]
    """Candidates if the source leaves something out; otherwise a single job."""
    step_seconds: float | None
    memory_bytes: float | None
    state_bytes: float | None
    """Bytes allocated between steps: weights, gradients and optimizer state."""
    memory_of_last_rank: bool
    """The published memory is that of the last process, as Megatron's trainers log it; otherwise the largest of any process."""
    memory_is_reserved: bool
    """The published memory is what the allocator has reserved, as torchtitan prints it (`max_reserved_gib`); otherwise what it has
    allocated."""
    flops_per_gpu: float
    """FLOPs of a step per GPU, counting half of causal attention and no recomputation."""
    peak: float
    """Peak rate of the GPU in bf16, in FLOP/s."""
    assumed: tuple[str, ...]
    """Columns that the source leaves out."""

    def predict(self) -> Prediction:
        """Predict the fastest candidate that fits or could be made to fit; if there is none, the smallest."""
        predictions = [(StepModel(job).predict(), job) for job in self.jobs]
        fitting = [p for p, job in predictions if p.peak_bytes <= _made_to_fit(job) * job.gpu.memory_gb * 1e9]
        if fitting:
            return min(fitting, key=lambda p: p.seconds)
        return min((p for p, _ in predictions), key=lambda p: p.peak_bytes)


def _made_to_fit(job: Job) -> float:
    """JAX's policies keep anything between half of the products and nothing, so a run recomputes everything only if it must."""
    return 2 * MADE_TO_FIT if job.software.name.startswith("JAX") else MADE_TO_FIT


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be planned, and the reason."""

    row: str
    source: str
    model: str
    reason: str


def read_measurements(path: Path) -> Iterator[Measurement | Skipped]:
    """Read every row of a file. Raises ValueError if it is not a table of measurements, FileNotFoundError if it does not exist."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of measurements")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        separator = _separator(file.readline())
        file.seek(0)
        reader = csv.DictReader(file, delimiter=separator)
        names = {(name or "").strip().lower() for name in reader.fieldnames or ()}
        tests = names >= functional_tests.COLUMNS
        if not tests and not {"gpu", "hidden", "layers"} <= names:
            raise ValueError(
                f"{path} has the columns {sorted(names)}, but measurements need at least gpu, layers and hidden "
                "(separated by commas, semicolons or tabs)"
            )
        for number, raw in enumerate(reader, start=2):
            cells = {(name or "").strip().lower(): (value or "").strip() for name, value in raw.items() if isinstance(value, str)}
            if separator == ";":  # where a comma is the decimal sign
                cells.update({name: cells[name].replace(",", ".") for name in MEASURED.keys() & cells.keys() if "." not in cells[name]})
            label = cells.get("id") or f"line {number}"
            try:
                cells = functional_tests.columns_of(cells) if tests else cells
                label = cells.get("id") or label
                yield _measurement(cells, label)
            except UnusableRow as problem:
                yield Skipped(label, cells.get("source", ""), cells.get("model", ""), str(problem))
            except (ValueError, ZeroDivisionError, OverflowError, AssertionError, IndexError) as problem:
                yield Skipped(label, cells.get("source", ""), cells.get("model", ""), f"inconsistent: {problem}")


def _separator(header: str) -> str:
    """Return what separates the columns of a table, from its first line: a comma, a semicolon or a tab."""
    return max(",;\t", key=header.count)


def _measurement(cells: Mapping[str, str], label: str) -> Measurement:
    """Raises UnusableRow if the row cannot be planned."""
    if cells.get("unplanned"):
        raise UnusableRow(cells["unplanned"])
    gpu = gpu_of(cells)
    if gpu is None:
        raise UnusableRow(f"unknown GPU {cells.get('gpu', '')!r}")
    software = software_of(cells, gpu)
    shape = _shape(cells, software)
    length = count(cells, "seq")
    if length is None:
        raise UnusableRow("no sequence length")
    gpus = gpus_of(cells)
    layouts, assumed = _layouts(cells, shape, gpus, software)
    if count(cells, "n_gpus") is None:
        assumed.append("n_gpus")
    batch = _batch(cells, layouts[0], assumed)
    check(cells, shape, layouts[0], batch)
    flops_per_gpu = _flops(shape, length) * batch * length / gpus
    fp8 = _is_fp8(cells, assumed)
    recompute = recomputed(cells, software, gpu)
    if len(recompute) > 1:
        assumed.append("recompute")
    gpu, software = at_precision(cells, gpu, software)
    jobs = [
        decoder_job(
            shape,
            layout,
            gpu,
            software,
            sequence_length=length,
            micro_batch_size=size,
            num_micro_batches=max(1, round(batch / (size * layout.data))),
            fp8=fp8 and gpu.fp8_tflops > 0,
            recompute=choice,
            adapters=adapters_of(cells),
            document_length=document_length_of(cells),
        )
        for layout in layouts
        for size in _micro_batch_sizes(cells, batch, layout)
        for choice in recompute
    ]
    if not jobs:
        raise UnusableRow(f"batch of {batch} on a data-parallel size of {layouts[0].data}")
    model, source = cells.get("model", ""), cells.get("source", "") or "unnamed source"
    return Measurement(
        row=label,
        source=source,
        model=model,
        kind="moe" if shape.experts else "dense",
        group="|".join((source, model, cells.get("gpu", ""), cells.get("precision", ""))),
        jobs=tuple(jobs),
        step_seconds=_step_seconds(cells, tokens_per_gpu=batch * length / gpus, flops_per_gpu=flops_per_gpu),
        memory_bytes=_memory_bytes(cells),
        state_bytes=(measured(cells, "state_gb") or 0.0) * 1e9 or None,
        memory_of_last_rank=bool(re.search(r"megatron|nemo|bridge", software.name.lower())),
        memory_is_reserved="torchtitan" in source.lower(),
        flops_per_gpu=flops_per_gpu,
        peak=gpu.bf16_tflops * 1e12,
        assumed=tuple(assumed),
    )


def _batch(cells: Mapping[str, str], layout: Layout, assumed: list[str]) -> int:
    """Return the global batch; if it is not given, that of a usual number of micro-batches, which is noted as an assumption."""
    batch = count(cells, "gbs")
    if batch is None:
        assumed.append("gbs")
        each = (count(cells, "mbs") or 4) * (count(cells, "grad_accum") or max(1, layout.pipeline * 4))
        batch = each * layout.data
    return batch


def _step_seconds(cells: Mapping[str, str], *, tokens_per_gpu: float, flops_per_gpu: float) -> float | None:
    """Return the published step time, or derive it from published tokens or FLOPs per second; None if none of them is published."""
    seconds = measured(cells, "step_time_s")
    if seconds is None and (tokens := measured(cells, "tokens_per_s_per_gpu")):
        seconds = tokens_per_gpu / tokens
    if seconds is None and (tflops := measured(cells, "tflops_causal_half")):
        seconds = flops_per_gpu / (tflops * 1e12)
    return seconds


def _memory_bytes(cells: Mapping[str, str]) -> float | None:
    """Published peak memory in bytes. Without a unit, Megatron-Bridge's numbers are in 1e9 bytes, others in GiB unless notes say GB."""
    memory, notes = measured(cells, "mem_gib"), cells.get("notes", "")
    if has_unit(cells, "mem_gib"):
        return memory * GIB if memory else None
    in_gb = "bridge" in cells.get("source", "").lower() or re.search(r"\bGB\b", re.sub(r"\d+\s*GB", "", notes))
    return memory * (1e9 if in_gb else GIB) if memory else None


def _is_fp8(cells: Mapping[str, str], assumed: list[str]) -> bool:
    """Return whether products run in FP8 or in a narrower format; a narrower format is noted as an assumption."""
    precision = precision_of(cells)
    if re.search(r"fp4|float4|int4|int8|fp6", precision):
        assumed.append("precision")
        return True
    return bool(re.search(r"fp8|float8|e4m3|e5m2|hybrid", precision))


def _flops(shape: DecoderShape, length: int) -> float:
    """FLOPs of training on one token."""
    sparse = len(shape.sparse_layers)
    products = shape.num_layers * shape.attention_parameters + (shape.num_layers - sparse) * shape.mlp_parameters(shape.ffn)
    products += sparse * (shape.top_k * shape.mlp_parameters(shape.expert_ffn) + shape.mlp_parameters(shape.shared_ffn))
    products += shape.vocab * shape.hidden_size
    return 3 * (2 * products + 2 * shape.num_layers * shape.heads * shape.score_dim * length)


def _shape(cells: Mapping[str, str], software: Software) -> DecoderShape:
    layers, hidden = count(cells, "layers"), count(cells, "hidden")
    if layers is None or hidden is None:
        raise UnusableRow("the model's layers or hidden size are missing")
    heads = count(cells, "heads") or max(1, hidden // 128)
    head_dim = count(cells, "head_dim") or max(1, hidden // heads)
    experts = count(cells, "experts") or 0
    expert_ffn = count(cells, "moe_ffn") or count(cells, "ffn") or 4 * hidden
    is_gated = flag(cells, "gated_mlp")
    if is_gated is None:
        is_gated = not re.match(r"(gpt|mpt|bert|opt|bloom)", cells.get("model", "").lower())
    top_k = count(cells, "topk") or (2 if experts else 0)
    names = text_of(cells, "model", "notes")
    is_gpt_oss = bool(re.search(r"gpt[-_ ]?oss", names))
    return DecoderShape(
        num_layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=count(cells, "kv_heads") or heads,
        head_dim=head_dim,
        ffn=count(cells, "ffn") or (expert_ffn * top_k if experts else 4 * hidden),
        gated=is_gated,
        vocab=count(cells, "vocab") or 50304,
        experts=experts if experts > 1 else 0,
        top_k=top_k,
        expert_ffn=expert_ffn if experts else 0,
        shared_ffn=_shared_ffn(cells, hidden, expert_ffn) if experts else 0,
        sparse_layers=tuple(range(_dense_layers(cells), layers)) if experts > 1 else (),
        latents=_latents(cells, hidden),
        rotary=is_gated,
        tied=cells.get("tied") == "1",
        norms_heads=bool(re.search(r"qwen-?3|olmo-?2|gemma-?3|qk[-_ ]?(layer)?norm", names)),
        expert_biases=is_gpt_oss,
        window=128 if is_gpt_oss else 0,
        fuses_rotary=not is_gpt_oss,
        routed_machines=_routed_machines(names),
        predicted_ahead=1 if re.search(r"\bmtp\b", names) and not re.search(r"(no|without) mtp", names) else 0,
        dropout=_drops_out(cells, software),
        capacity=1.0 if re.search(r"token-drop|cf\s*=\s*1\b|force|balanc", cells.get("notes", "").lower()) else 1.08,
    )


def _drops_out(cells: Mapping[str, str], software: Software) -> bool:
    """Return whether there is dropout: in GPT-3's models, except in NeMo 2 (GPTConfig175B), which NeMo's tables since 25.02 are of."""
    source = cells.get("source", "").lower()
    newer = source.startswith("nemo") and (release_of(source) or (0, 0, 0)) >= (25, 2, 0)
    return cells.get("model", "").lower().startswith("gpt") and software.attention != "unfused" and not newer


def _routed_machines(names: str) -> int:
    """Machines that the router's groups allow for a token; 0 for no limit. A fake gate deals experts out in turn, so that a token's experts
    are neighbours, on one machine."""
    if re.search(r"fake[- ]balanced", names):
        return 1
    return 4 if re.search(r"deepseek[-_ ]?(v3|r1(?!-distill))", names) else 0


def _latents(cells: Mapping[str, str], hidden: int) -> Latents | None:
    """Return the latents of models with latent attention; large models have a latent for queries, too."""
    return Latents(queries=1536 if hidden >= 5120 else 0) if has_latents(cells) else None


def _shared_ffn(cells: Mapping[str, str], hidden: int, expert_ffn: int) -> int:
    """Return the total width of shared experts. If a row does not give it, models with latent attention have two if small, one if large."""
    given = count(cells, "shared_ffn")
    if given is None and cells.get("shared_ffn", "") in ("", "-") and _latents(cells, hidden):
        return expert_ffn * (1 if hidden >= 5120 else 2)
    return given or 0


def _dense_layers(cells: Mapping[str, str]) -> int:
    """Return the number of leading layers without experts, from notes such as "26 MLA+MoE + 1 dense layer"."""
    found = re.search(r"(\d+) dense layer", cells.get("notes", "").lower())
    return int(found.group(1)) if found else 0


def _layouts(cells: Mapping[str, str], shape: DecoderShape, gpus: int, software: Software) -> tuple[list[Layout], list[str]]:
    """Return the layout, or several if the virtual pipeline size is not given; and the columns that are assumed."""
    tensor, pipeline, context = (count(cells, name) or 1 for name in ("tp", "pp", "cp"))
    if shape.num_layers < pipeline:
        raise UnusableRow(f"{shape.num_layers} layers on {pipeline} pipeline stages")
    expert = count(cells, "ep") or 1
    notes, source = cells.get("notes", "").lower(), cells.get("source", "").lower()
    fsdp = fsdp_of(cells)
    sharding = cells.get("sharding") or ("optimizer" if software.shards_optimizer else "none")
    if "fsdp" in software.name.lower() and cells.get("dp"):
        sharding = "full"
    if fsdp and fsdp not in ("0", "1"):
        sharding = "gradients" if "grad" in fsdp.lower() else "full"
    layout = Layout(
        gpus=gpus,
        tensor=tensor,
        pipeline=pipeline,
        expert=expert if shape.experts else 1,
        expert_tensor=_expert_tensor(cells, shape, tensor, gpus // pipeline),
        context=context,
        sequence=tensor > 1
        and cells.get("sequence") != "0"
        and "no sp" not in cells.get("recompute", "").lower()
        and not re.search(r"2104\.04473|sc21", cells.get("ref", "").lower()),
        sharding=sharding,  # type: ignore[arg-type]
        folded="w/ folding" in notes or "folding" not in source,
    )
    per_rank = shape.num_layers // pipeline
    given = count(cells, "vpp")
    if (
        given is None
        and not tidy(cells.get("vpp", ""))
        and pipeline > 1
        and not re.search(r"\b1f1b\b", notes.replace("interleaved 1f1b", ""))
    ):
        options = [v for v in range(1, 9) if shape.num_layers % (pipeline * v) == 0]
        if max(options, default=1) == 1:
            options += [v for v in (2, 3, 4) if shape.num_layers >= pipeline * v]
        if "interleaved" in notes:
            options = [v for v in options if v > 1] or options or [1]
        return [replace(layout, virtual=v) for v in options or [1]], ["vpp"]
    if given and given > per_rank:
        given = per_rank
    return [replace(layout, virtual=given if given and pipeline > 1 else 1)], []


def _expert_tensor(cells: Mapping[str, str], shape: DecoderShape, tensor: int, gpus_of_stage: int) -> int:
    """Tensor-parallel size of experts. By default megatron-core splits experts like other layers, and Megatron-Bridge does not split them.
    Experts are also not split if there are too few GPUs."""
    if not shape.experts:
        return 1
    whole = "w/ folding" in cells.get("notes", "").lower() or "bridge" in cells.get("source", "").lower()
    degree = min(tensor, count(cells, "etp") or (1 if whole else tensor))
    return degree if (count(cells, "ep") or 1) * degree <= gpus_of_stage else 1


def _micro_batch_sizes(cells: Mapping[str, str], batch: int, layout: Layout) -> list[int]:
    given, accumulated = count(cells, "mbs"), count(cells, "grad_accum")
    each = max(1, round(batch / max(1, layout.data)))
    if given:
        return [min(given, each)]
    if accumulated:
        return [max(1, round(each / accumulated))]
    return [size for size in (1, 2, 4, 8) if each % size == 0 and (size == 1 or each // size >= layout.pipeline)]
