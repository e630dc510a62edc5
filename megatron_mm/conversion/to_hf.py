"""A training checkpoint -> a Hugging Face directory, tensor by tensor.

The directory loads under plain transformers with `trust_remote_code=True`. Memory stays at about one shard: tensors are read,
renamed, cast and written in the order of the table, and the optimizer's are never read. Names and shapes are checked before
the first tensor is read.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_mm.config import Experiment, load_experiment
from megatron_mm.conversion.mapping import Entry, check_names
from megatron_mm.conversion.mm1 import mm1_table
from megatron_mm.conversion.mm1_files import write_mm1_files
from megatron_mm.conversion.reader import CheckpointReader, TensorInfo
from megatron_mm.training.checkpoint import completed_checkpoints

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class HfFamily:
    """What a model family needs to be exported."""

    table: Callable[[Any], list[Entry]]
    """The table of a model config."""
    write_files: Callable[..., None]
    """Writes all but the weights: (experiment, tokenizer path, directory, dtype=...)."""


FAMILIES: dict[str, HfFamily] = {"mm1": HfFamily(table=mm1_table, write_files=write_mm1_files)}


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: Path
    num_parameters: int
    num_tensors: int
    num_shards: int
    num_bytes: int
    """Of all tensors."""


@dataclass(frozen=True)
class _Shard:
    entries: list[Entry]
    num_bytes: int


def convert_to_hf(checkpoint: Path, out: Path, *, dtype: str = "bfloat16", shard_size: str = "5GB", verify: bool = True) -> Export:
    """Export the weights of a training checkpoint for Hugging Face transformers.

    Args:
        checkpoint: `RUN_DIR/checkpoints/step_...`, or RUN_DIR for its newest.
        out: a directory that does not exist or is empty; it appears when it is complete.
        dtype: of the written weights: float32, bfloat16 or float16.
        shard_size: of one weights file at most, such as "5GB" or "500MB"; a larger tensor gets a file of its own.
        verify: check the checkpoint's checksums first.

    Raises ValueError where an argument is wrong, `out` holds something, the checkpoint is incomplete or damaged, or its
    tensors are not those of its model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, but must be one of {sorted(DTYPES)}")
    limit = parse_size(shard_size)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory: give another one or remove it")
    checkpoint = _newest(checkpoint)
    experiment, tokenizer = _describe(checkpoint)
    family = FAMILIES[experiment.model.family]
    reader = CheckpointReader(checkpoint, verify=verify)
    entries = family.table(experiment.model)
    infos = reader.names()
    check_names((entry.ours for entry in entries), infos, where=f"checkpoint {checkpoint}")
    _check_shapes(entries, infos)
    shards = plan_shards(entries, infos, limit=limit, item_size=DTYPES[dtype].itemsize)
    partial = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    try:
        family.write_files(experiment, tokenizer, partial, dtype=dtype)
        _write_weights(shards, reader, partial, dtype=DTYPES[dtype])
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Export(
        path=out,
        num_parameters=sum(_numel(infos[entry.ours], entry) for entry in entries),
        num_tensors=sum(len(entry.hf) for entry in entries),
        num_shards=len(shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
    )


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number. Raises ValueError for anything else or nothing."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size <= 0:
        raise ValueError(f"shard_size is {text!r}, but must be a size such as 5GB, 500MB or 2GiB")
    return size


def plan_shards(entries: list[Entry], infos: dict[str, TensorInfo], *, limit: int, item_size: int) -> list[_Shard]:
    """Cut the table, in its order, into files of at most `limit` bytes; an entry that is larger is a file of its own."""
    shards: list[_Shard] = []
    members: list[Entry] = []
    used = 0
    for entry in entries:
        size = _numel(infos[entry.ours], entry) * item_size
        if members and used + size > limit:
            shards.append(_Shard(members, used))
            members, used = [], 0
        members, used = [*members, entry], used + size
    return [*shards, _Shard(members, used)]


def _newest(path: Path) -> Path:
    """The newest complete checkpoint of a run directory; any other path as it is."""
    if not (path / "checkpoints").is_dir():
        return path
    complete = completed_checkpoints(path)
    if not complete:
        raise ValueError(f"{path} has no complete checkpoint")
    return complete[-1]


def _describe(checkpoint: Path) -> tuple[Experiment, Path]:
    """The experiment and the tokenizer of a checkpoint."""
    experiment_path, tokenizer = checkpoint / "experiment.json", checkpoint / "tokenizer.model"
    if not experiment_path.is_file():
        raise ValueError(f"{checkpoint} is no checkpoint (it has no experiment.json): give a directory RUN_DIR/checkpoints/step_...")
    if not tokenizer.is_file():
        raise ValueError(f"{checkpoint} has no tokenizer.model: put the run's SentencePiece model there")
    experiment = load_experiment(experiment_path)
    if experiment.model.family not in FAMILIES:
        raise ValueError(f"{checkpoint} holds a model of family {experiment.model.family!r}, but only {sorted(FAMILIES)} can be exported")
    return experiment, tokenizer


def _check_shapes(entries: list[Entry], infos: dict[str, TensorInfo]) -> None:
    """Convert tensors without content, so that a shape that does not fit is found before hours of reading."""
    for entry in entries:
        entry.to_hf(torch.empty(_shape(infos[entry.ours], entry), device="meta"))


def _write_weights(shards: list[_Shard], reader: CheckpointReader, out: Path, *, dtype: torch.dtype) -> None:
    started, total, done = time.monotonic(), sum(shard.num_bytes for shard in shards), 0
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        name = f"model-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for entry in shard.entries:
            parts = entry.to_hf(reader.read(entry.ours, row=entry.row))
            tensors.update({hf: part.to(dtype).contiguous() for hf, part in zip(entry.hf, parts, strict=True)})
        save_file(_without_shared_memory(tensors), out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        done += shard.num_bytes
        seconds = time.monotonic() - started
        logger.info("wrote %s (%.2f of %.2f GB), about %.0f s left", name, done / 1e9, total / 1e9, seconds * (total - done) / done)
    if len(shards) > 1:
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n")


def _without_shared_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parts of one tensor that are views of it, such as a gate's rows, as tensors of their own: safetensors asks for that."""
    return {name: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for name, t in tensors.items()}


def _numel(info: TensorInfo, entry: Entry) -> int:
    return torch.Size(_shape(info, entry)).numel()


def _shape(info: TensorInfo, entry: Entry) -> tuple[int, ...]:
    """Of what an entry is about: the tensor, or one of a stack."""
    return info.shape if entry.row is None else info.shape[1:]
