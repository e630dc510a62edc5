"""A training checkpoint -> a Hugging Face directory, tensor by tensor.

Plain transformers loads a whole model with `trust_remote_code=True`, and a decoder or an image tower alone without it. Tensors are read,
renamed, cast and written in the order of the table; the optimizer's tensors are never read. Names and shapes are checked before the first
tensor is read.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_mm.config import Experiment
from megatron_mm.conversion import parts
from megatron_mm.conversion.export_settings import write_export_settings
from megatron_mm.conversion.files import TensorInfo, safetensors_header
from megatron_mm.conversion.job import Lane, Task, cut, finish, partial_directory, run_lanes, write_values
from megatron_mm.conversion.model_card import write_model_card
from megatron_mm.conversion.reader import CheckpointReader
from megatron_mm.conversion.target import model_targets
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.registry import family_of
from megatron_mm.families.serialize import load_experiment, to_dict
from megatron_mm.hf.configs import Architecture
from megatron_mm.hf.mapping import Direct, Entry, check_names
from megatron_mm.training.checkpoint import find_checkpoint

logger = logging.getLogger(__name__)

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of the written weights; auto keeps the checkpoint's types."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LANE_BYTES = 1 << 27
"""Largest part of a file that is written as one lane, in bytes."""
_SPARE_MEMORY = 1 << 28

ExportedPart = Literal["whole", "language", "vision"]


@dataclass(frozen=True)
class Export:
    """Summary of a finished export."""

    path: Path
    num_parameters: int
    num_tensors: int
    num_shards: int
    num_bytes: int
    """Size of all tensors, in bytes."""


@dataclass(frozen=True)
class Written:
    """An entry of the table and the tensors that it is written as; or a tensor that follows from the model's configuration."""

    entry: Entry | None
    read: TensorInfo
    infos: dict[str, TensorInfo]
    constant: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.infos.values())


def convert_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    part: ExportedPart = "whole",
    architecture: Architecture = "llama",
    dtype: str = "auto",
    vocab_rows: int | None = None,
    shard_size: str = "5GB",
    verify: bool = True,
    threads: int = 4,
) -> Export:
    """Export the weights of a training checkpoint for Hugging Face transformers.

    Args:
        checkpoint: `RUN_DIR/checkpoints/step_...`, or RUN_DIR for its newest.
        out: a directory that does not exist or is empty; it appears when it is complete.
        part: the whole model, its decoder or its image tower.
        architecture: architecture as which a decoder alone is written; all of them compute the same.
        dtype: type of the written weights: auto, float32, bfloat16 or float16.
        vocab_rows: number of vocabulary rows that are written; None writes all but `padding_rows`.
        shard_size: largest size of a weights file, such as "5GB" or "500MB"; a larger tensor gets a file of its own.
        verify: check the checkpoint's checksums first.
        threads: number of threads that read and write.

    Raises ValueError if an argument is wrong, `out` is not empty, the checkpoint is incomplete or damaged, or its tensors are not those of
    its model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, but must be one of {sorted(DTYPES)}")
    limit = parse_size(shard_size)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory: choose another one or remove it")
    checkpoint = find_checkpoint(checkpoint)
    experiment, tokenizer = _describe(checkpoint)
    _check_rows(vocab_rows, experiment, tokenizer, part=part)
    if vocab_rows is None and experiment.model.decoder.padding_rows:
        vocab_rows = experiment.model.decoder.num_tokens
    table, write_files = _exporter(part, experiment, tokenizer, checkpoint, architecture=architecture, vocab_rows=vocab_rows)
    reader = CheckpointReader(checkpoint, verify=verify, threads=threads)
    plan = plan_tensors(table, _checked_infos(reader, experiment, table, checkpoint, part=part), dtype=DTYPES[dtype])
    if part == "whole":
        plan += _constants(family_of(experiment.model).constants(experiment.model))
    shards = plan_shards(plan, limit=limit)
    lanes = _lanes(shards, reader)
    fingerprint = {
        "experiment": to_dict(experiment),
        "files": reader.files,
        "lanes": [[lane.file, lane.start, [task.name for task in lane.tasks]] for lane in lanes],
        "headers": [{name: [list(i.shape), str(i.dtype)] for w in shard for name, i in w.infos.items()} for shard in shards],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial_directory(out.parent / f".{out.name}.partial", fingerprint=fingerprint) as directory:
        write_files(directory, dtype=_dtype_name(plan))
        if part == "whole":
            write_export_settings(directory, experiment)
        write_model_card(directory, experiment, checkpoint, part=part, dtype=_dtype_name(plan))
        run_lanes(lanes, directory, threads=threads, memory=max(map(_shard_bytes, shards)) + _SPARE_MEMORY)
        _write_index(shards, directory)
        finish(directory, out)
    return Export(
        path=out,
        num_parameters=sum(info.numel for written in plan if written.entry for info in written.infos.values()),
        num_tensors=sum(len(written.infos) for written in plan),
        num_shards=len(shards),
        num_bytes=sum(map(_shard_bytes, shards)),
    )


def parse_size(text: str) -> int:
    """Parse "5GB", "500MB", "2GiB" or a plain number into bytes. Raises ValueError for anything else and for 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size <= 0:
        raise ValueError(f"shard_size is {text!r}, but must be a size such as 5GB, 500MB or 2GiB")
    return size


def plan_tensors(table: list[Entry], infos: dict[str, TensorInfo], *, dtype: torch.dtype | None) -> list[Written]:
    """Find the tensors as which each entry is written, by converting meta tensors. Raises ValueError for a shape that does not fit."""
    plan = []
    for entry in table:
        stored = infos[entry.ours]
        read = stored if entry.row is None else TensorInfo(stored.shape[1:], stored.dtype)
        found = entry.to_hf(torch.empty(read.shape, dtype=read.dtype, device="meta"))
        written = {name: TensorInfo(tuple(tensor.shape), dtype or read.dtype) for name, tensor in zip(entry.hf, found, strict=True)}
        plan.append(Written(entry, read, written))
    return plan


def _constants(tensors: dict[str, torch.Tensor]) -> list[Written]:
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return [Written(None, infos[name], {name: infos[name]}, tensor.contiguous()) for name, tensor in tensors.items()]


def plan_shards(plan: list[Written], *, limit: int) -> list[list[Written]]:
    """Divide the table, in its order, into files of at most `limit` bytes; a larger entry is a file of its own."""
    return cut(plan, limit=limit)


def _shard_bytes(shard: list[Written]) -> int:
    return sum(written.num_bytes for written in shard)


def _dtype_name(plan: list[Written]) -> str:
    """Name of the type that most of the written values have."""
    counts: dict[torch.dtype, int] = {}
    for written in plan:
        for info in written.infos.values():
            counts[info.dtype] = counts.get(info.dtype, 0) + info.numel
    return str(max(counts, key=counts.__getitem__)).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------------- reading


def _describe(checkpoint: Path) -> tuple[Experiment, Path | None]:
    """Return a checkpoint's experiment, and its tokenizer or None."""
    tokenizer = checkpoint / "tokenizer.model"
    return load_experiment(checkpoint / "experiment.json"), tokenizer if tokenizer.is_file() else None


def _check_rows(vocab_rows: int | None, experiment: Experiment, tokenizer: Path | None, *, part: ExportedPart) -> None:
    rows = experiment.model.decoder.vocab_size
    if vocab_rows is None:
        return
    if not 0 < vocab_rows <= rows:
        raise ValueError(f"--vocab-size is {vocab_rows}, but the model has only {rows} rows: use {rows} or less")
    if tokenizer is None:
        return
    ids = Tokenizer.open(tokenizer, special=family_of(experiment.model).special_tokens)
    least = ids.vocab_size if part == "whole" else ids.num_pieces  # a decoder alone does not use the image tokens
    if vocab_rows < least:
        raise ValueError(f"--vocab-size is {vocab_rows}, but the checkpoint's tokenizer has {least} tokens: use {least} or more")


def _exporter(
    part: ExportedPart,
    experiment: Experiment,
    tokenizer: Path | None,
    checkpoint: Path,
    *,
    architecture: Architecture,
    vocab_rows: int | None,
) -> tuple[list[Entry], Callable[..., None]]:
    """Return the table of the exported part, and the function (directory, dtype=...) that writes the other files."""
    if part == "vision":
        return parts.vision_table(experiment), partial(parts.write_vision_files, experiment)
    if part == "language":
        files = partial(parts.write_language_files, experiment, tokenizer, architecture=architecture, vocab_rows=vocab_rows)
        return parts.language_table(experiment, architecture=architecture, vocab_rows=vocab_rows), files
    family, model = family_of(experiment.model), experiment.model
    family.check_export(model)
    if tokenizer is None:
        raise ValueError(f"{checkpoint} has no tokenizer.model: put the run's SentencePiece model there")
    files = partial(family.write_files, model, experiment=experiment, tokenizer=tokenizer, vocab_rows=vocab_rows)
    return family.table(model, vocab_rows=vocab_rows), files


def _checked_infos(
    reader: CheckpointReader, experiment: Experiment, table: list[Entry], checkpoint: Path, *, part: ExportedPart
) -> dict[str, TensorInfo]:
    """Return the stored tensors. Raises ValueError if their names or shapes are not those of the checkpoint's own model."""
    infos, where = reader.names(), f"checkpoint {checkpoint}"
    wanted = {entry.ours for entry in table}
    check_names(wanted, infos if part == "whole" else wanted & infos.keys(), where=where)
    if part == "language":
        _check_language(infos.keys() - wanted, experiment)
    targets = model_targets(experiment)
    left_out = sum(info.numel for name, info in infos.items() if name not in wanted)
    if left_out:
        logger.info("%s parameters of the model are not exported (image parts, gated blocks and similar)", f"{left_out:,}")
    wrong = [
        f"{name} should be {list(targets[name].info.shape)}, but is {list(infos[name].shape)}"
        for name in infos
        if name in wanted and infos[name].shape != targets[name].info.shape
    ]
    if wrong:
        raise ValueError("\n  ".join([f"{where} does not contain the model of its experiment.json:", *wrong]))
    return infos


def _check_language(left_out: Collection[str], experiment: Experiment) -> None:
    """Raise ValueError if a tensor of the decoder is neither exported nor one that its family leaves out on purpose."""
    extras = family_of(experiment.model).language_extras
    lost = sorted(name for name in left_out if name.startswith("language.") and not any(re.fullmatch(extra, name) for extra in extras))
    if lost:
        raise ValueError(
            f"--part language would lose {len(lost)} tensors of the decoder of {experiment.recipe} that are in no table: "
            f"{', '.join(lost)}. Add them to `DecoderVariant.entries`, or to `Family.language_extras` if a plain decoder has no such part"
        )


# ------------------------------------------------------------------------------------------------------------------- writing


def _lanes(shards: list[list[Written]], reader: CheckpointReader) -> list[Lane]:
    """Divide each file into ranges of bytes that can be written in parallel."""
    lanes: list[Lane] = []
    for number, shard in enumerate(shards, start=1):
        file = _file_name(number, len(shards))
        header, begins = safetensors_header({name: info for written in shard for name, info in written.infos.items()})
        size = len(header) + _shard_bytes(shard)
        for group in cut(shard, limit=_LANE_BYTES):
            start = begins[next(iter(group[0].infos))]
            lanes.append(Lane(file, tuple(_task(written, reader) for written in group), write_values, start, header, size))
    return lanes


def _task(written: Written, reader: CheckpointReader) -> Task:
    as_it_is = isinstance(written.entry, Direct) and all(info == written.read for info in written.infos.values())
    memory = written.read.num_bytes * (1 if as_it_is else 2) + (0 if as_it_is else written.num_bytes)
    return Task(", ".join(written.infos), written.num_bytes, memory, partial(_read, written, reader))


def _read(written: Written, reader: CheckpointReader) -> list[torch.Tensor]:
    if written.entry is None:
        assert written.constant is not None
        return [written.constant]
    found = written.entry.to_hf(reader.read(written.entry.ours, row=written.entry.row))
    cast = [tensor.to(info.dtype) for tensor, info in zip(found, written.infos.values(), strict=True)]
    for name, before, after in zip(written.infos, found, cast, strict=True):
        if after.dtype is torch.float16 and before.dtype is not torch.float16 and not torch.equal(before.isfinite(), after.isfinite()):
            raise ValueError(f"{name} has values that float16 cannot hold: use --dtype bfloat16 or float32")
    return cast


def _file_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def _write_index(shards: list[list[Written]], directory: Path) -> None:
    """Write the index that names each tensor's file, if there is more than one file."""
    if len(shards) == 1:
        return
    weight_map = {
        name: _file_name(number, len(shards)) for number, shard in enumerate(shards, start=1) for written in shard for name in written.infos
    }
    document: dict[str, Any] = {"metadata": {"total_size": sum(map(_shard_bytes, shards))}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n")
