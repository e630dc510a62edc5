"""Hugging Face weights -> a checkpoint with only weights, for `train --init-from`.

A single process makes it, without process groups or a GPU, tensor by tensor. Tensors that a source provides are read from there; all others
get the initial values that the model itself would draw on a CPU, from the seed and the global name. All names and shapes are checked before
anything is written.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mm.config import Experiment
from megatron_mm.conversion.checksums import combine
from megatron_mm.conversion.files import TensorInfo
from megatron_mm.conversion.job import Lane, Task, Written, cut, finish, partial_directory, run_lanes, write_archives
from megatron_mm.conversion.sources import Part, Source, open_source
from megatron_mm.conversion.target import Target, model_targets
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.registry import family_of
from megatron_mm.families.serialize import save_experiment, to_dict
from megatron_mm.hf.mapping import Direct, Entry, Positions
from megatron_mm.platform.files import checksum_of
from megatron_mm.training.checkpoint import TENSORS, completed_checkpoints

logger = logging.getLogger(__name__)

CHECKPOINT = "step_00000000"
_FILES, _SMALLEST_FILE, _LARGEST_FILE = 16, 1 << 26, 1 << 31
_SPARE_MEMORY = 1 << 28


@dataclass(frozen=True)
class Import:
    """Summary of a finished import."""

    checkpoint: Path
    num_parameters: int
    sources: dict[str, int]
    """Number of parameters read from each source, such as `language (llama)`."""
    drawn: dict[str, int]
    """Number of parameters that no source contains, by the first part of their names."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the checkpoint, or one row of a stack, and its source; without one it is drawn."""

    target: Target
    row: int | None
    entry: Entry | None
    source: Source | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target.info.shape if self.row is None else self.target.info.shape[1:]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.shape, self.target.info.dtype)

    @property
    def name(self) -> str:
        return self.target.name if self.row is None else f"{self.target.name}[{self.row}]"


def convert_from_hf(
    experiment: Experiment,
    run_dir: Path,
    *,
    whole: Path | None = None,
    language: Path | None = None,
    vision: Path | None = None,
    threads: int = 4,
    resize_positions: bool = True,
) -> Import:
    """Write RUN_DIR/checkpoints/step_00000000 with weights of Hugging Face checkpoints.

    Args:
        experiment: experiment to be trained: its model determines the shapes, its precision the type of the weights, its seed the drawn
            values.
        whole: an exported model of the same family.
        language, vision: checkpoints of the decoder and the image tower alone.
        threads: number of threads that read and write.
        resize_positions: interpolate learned positions that belong to another image size; otherwise they are an error.

    Raises ValueError, before any tensor is written, if a source is damaged or does not fit the model.
    """
    given: dict[Part, Path | None] = {"whole": whole, "language": language, "vision": vision}
    paths = {part: path for part, path in given.items() if path is not None}
    if not paths or (whole and len(paths) > 1):
        raise ValueError("use --whole DIR, or --language DIR, --vision DIR or both")
    if completed_checkpoints(run_dir):
        raise ValueError(f"{run_dir} has checkpoints already: choose another directory")
    length = experiment.data.sequence_length
    sources = [open_source(path, part, experiment.model, sequence_length=length) for part, path in paths.items()]
    tensors = _plan(model_targets(experiment), sources, resize_positions=resize_positions)
    tokenizer = _find_tokenizer(experiment, sources)
    lanes = _lanes(tensors, seed=experiment.train.seed)
    fingerprint = {
        "experiment": to_dict(experiment),
        "sources": [[source.part, source.format, source.reader.fingerprint] for source in sources],
        "tokenizer": None if tokenizer is None else checksum_of(tokenizer),
        "lanes": [[lane.file, [task.name for task in lane.tasks]] for lane in lanes],
    }
    folder = run_dir / "checkpoints"
    with partial_directory(folder / f".partial-{CHECKPOINT}-converted", fingerprint=fingerprint) as directory:
        largest = max(sum(task.num_bytes for task in lane.tasks) for lane in lanes)
        written = run_lanes(lanes, directory, threads=threads, memory=largest + _SPARE_MEMORY)
        _describe_tensors(directory / TENSORS, lanes, tensors, written)
        save_experiment(experiment, directory / "experiment.json")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, directory / "tokenizer.model")
        _write_manifest(directory, lanes, written)
        finish(directory, folder / CHECKPOINT)
    return _summary(folder / CHECKPOINT, tensors)


def _plan(targets: dict[str, Target], sources: list[Source], *, resize_positions: bool) -> list[_Tensor]:
    """Find the source of each tensor. Raises one ValueError that lists everything that does not fit."""
    found: dict[tuple[str, int | None], tuple[Entry | None, Source | None]] = {}
    problems: list[str] = []
    for given in sources:
        problems += _problems(given, targets)
        for read in given.entries:
            assert (read.ours, read.row) not in found, f"two entries write {read.ours} {read.row}"
            found[read.ours, read.row] = (read, given)
    if problems:
        raise ValueError("\n  ".join(["the sources do not fit the recipe's model:", *problems]))
    tensors = []
    for target in targets.values():
        for row in range(target.info.shape[0]) if target.stacked else [None]:
            entry, source = found.get((target.name, row), (None, None))
            tensors.append(_Tensor(target, row, entry, source))
    _warn_of_rounding(tensors)
    for line in _interpolations(tensors):
        if not resize_positions:
            raise ValueError(
                f"the weights belong to a model with another image size than the recipe's ({line}): use the recipe "
                "that they were trained with"
            )
        logger.info("%s", line)
    return tensors


def _problems(source: Source, targets: dict[str, Target]) -> Iterable[str]:
    """Yield a line for each problem: missing tensors, unknown ones, types that cannot be trained, shapes that do not fit."""
    there, where = source.reader.names(), source.reader.path
    wanted = {name for entry in source.entries for name in entry.hf}
    missing = [name for name in dict.fromkeys(name for entry in source.entries for name in entry.hf) if name not in there]
    known = [re.compile(pattern) for pattern in source.unused]
    unexpected = [name for name in there if name not in wanted and not any(pattern.fullmatch(name) for pattern in known)]
    if missing:
        yield f"{where} lacks {len(missing)} tensors: {_some(missing)}"
    if unexpected:
        yield f"{where} has {len(unexpected)} unknown tensors: {_some(unexpected)}"
    quantised = [
        f"{name} ({str(there[name].dtype).removeprefix('torch.')})" for name in sorted(wanted & there.keys()) if _is_quantised(there[name])
    ]
    if quantised:
        yield f"{where} has {len(quantised)} weights of a type that training does not support: {_some(quantised)}: use unquantised ones"
    for entry in source.entries:
        if all(name in there for name in entry.hf):
            yield from _shape_problems(entry, targets[entry.ours], [there[name] for name in entry.hf], where)


def _is_quantised(info: TensorInfo) -> bool:
    """Return whether values are integers or 8-bit floats, whose scales are stored elsewhere."""
    return not info.dtype.is_floating_point or info.dtype.itemsize < 2


def _shape_problems(entry: Entry, target: Target, found: list[TensorInfo], where: Path) -> Iterable[str]:
    """Convert meta tensors, so that shapes that do not fit are found before hours of reading."""
    ours = target.info.shape if entry.row is None else target.info.shape[1:]
    try:
        expected = [tuple(tensor.shape) for tensor in entry.to_hf(torch.empty(ours, device="meta"))]
    except ValueError as error:
        yield str(error)
        return
    if expected == [info.shape for info in found]:
        return
    try:  # other shapes may be convertible: positions of another resolution, fewer tokens
        if entry.from_hf(tuple(torch.empty(info.shape, device="meta") for info in found)).shape == torch.Size(ours):
            return
        reason = ""
    except (ValueError, RuntimeError) as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""
    for name, info, shape in zip(entry.hf, found, expected, strict=True):
        if info.shape != shape:
            yield f"{where}: {name} should be {list(shape)}, but is {list(info.shape)}{reason}"


def _warn_of_rounding(tensors: list[_Tensor]) -> None:
    """Warn of each source whose weights lose digits in the checkpoint's type."""
    for source in {id(t.source): t.source for t in tensors if t.source is not None}.values():
        pairs = {
            (source.reader.names()[name].dtype, t.target.info.dtype)
            for t in tensors
            if t.source is source and t.entry
            for name in t.entry.hf
        }
        for theirs, ours in sorted(pairs, key=str):
            if torch.promote_types(theirs, ours) != ours:
                logger.warning(
                    "weights of %s are %s and are rounded to %s, because of --train.precision; --train.precision fp32 keeps them unchanged",
                    source.reader.path,
                    str(theirs).removeprefix("torch."),
                    str(ours).removeprefix("torch."),
                )


def _interpolations(tensors: list[_Tensor]) -> Iterable[str]:
    """Yield a line for each tensor of positions that belongs to another image size."""
    for tensor in tensors:
        if isinstance(tensor.entry, Positions) and tensor.source is not None:
            rows = tensor.source.reader.names()[tensor.entry.theirs].shape[tensor.entry.axes]
            if rows != tensor.entry.num_rows:
                yield tensor.entry.describe(rows)


def _find_tokenizer(experiment: Experiment, sources: list[Source]) -> Path | None:
    """Return the tokenizer that the command line names, or else the language model's, or else the data's; None if there is none.

    Raises ValueError if it has more tokens than the model.
    """
    beside = [source.reader.folder / "tokenizer.model" for source in sources if source.part != "vision"]
    named = experiment.data.tokenizer
    found = [path for path in ([named] if named else [*beside, experiment.data.tokenizer_path]) if path.is_file()]
    if not found:
        if named:
            raise ValueError(f"tokenizer {named} does not exist: choose another --data.tokenizer")
        logger.warning("there is no tokenizer.model next to the weights, so the checkpoint has none: add one with --data.tokenizer FILE")
        return None
    special = family_of(experiment.model).special_tokens
    size, decoder = Tokenizer.open(found[0], special=special).vocab_size, experiment.model.decoder
    if size > decoder.num_tokens:
        raise ValueError(
            f"{found[0]} has {size} tokens, including those that mark images, but the model has rows for only {decoder.num_tokens}: "
            f"use --model.decoder.vocab-size {decoder.rows_for(size)} or more"
        )
    return found[0]


# --------------------------------------------------------------------------------------------------------------------- writing


def _lanes(tensors: list[_Tensor], *, seed: int) -> list[Lane]:
    """Divide the tensors into files of about equal size."""
    tasks = [_task(tensor, seed=seed) for tensor in tensors]
    limit = min(max(sum(task.num_bytes for task in tasks) // _FILES, _SMALLEST_FILE), _LARGEST_FILE)
    groups = cut(tasks, limit=limit)
    return [Lane(f"{TENSORS}/__0_{number}.distcp", tuple(group), write_archives) for number, group in enumerate(groups)]


def _task(tensor: _Tensor, *, seed: int) -> Task:
    size = tensor.info.num_bytes
    if tensor.entry is None or tensor.source is None:
        return Task(tensor.name, size, size + 4 * tensor.info.numel, partial(_drawn, tensor, seed))
    infos = [tensor.source.reader.names()[name] for name in tensor.entry.hf]
    as_it_is = isinstance(tensor.entry, Direct) and infos[0].dtype == tensor.info.dtype
    memory = size if as_it_is else size + 2 * sum(info.num_bytes for info in infos)
    return Task(tensor.name, size, memory, partial(_read, tensor))


def _drawn(tensor: _Tensor, seed: int) -> list[torch.Tensor]:
    return [tensor.target.draw(seed=seed, row=tensor.row)[None] if tensor.row is not None else tensor.target.draw(seed=seed, row=None)]


def _read(tensor: _Tensor) -> list[torch.Tensor]:
    assert tensor.entry is not None and tensor.source is not None
    reader = tensor.source.reader
    given = {name: reader.read(name) for name in tensor.entry.hf}
    for name, values in given.items():
        if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all():  # the sum is the cheaper check
            count = int((~values.isfinite()).sum())
            raise ValueError(
                f"{reader.path}: {name} has {count} of {values.numel()} values that are not finite: "
                "download it again, or use an earlier checkpoint"
            )
    found = tensor.entry.from_hf(tuple(given.values())).to(tensor.info.dtype)
    return [found[None] if tensor.row is not None else found]


def _describe_tensors(folder: Path, lanes: list[Lane], tensors: list[_Tensor], written: list[Written]) -> None:
    """Write the files that torch's and megatron-core's readers need besides the tensors: shapes, types and positions of all pieces."""
    metadata: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for tensor, where in zip(tensors, written, strict=True):
        target = tensor.target
        entry = metadata.setdefault(
            target.name, TensorStorageMetadata(TensorProperties(dtype=target.info.dtype), torch.Size(target.info.shape), [])
        )
        sizes = torch.Size(target.info.shape if tensor.row is None else (1, *tensor.shape))
        offsets = torch.Size([tensor.row or 0, *[0] * (len(sizes) - 1)][: len(sizes)])
        entry.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
        file = Path(lanes[where.lane].file).name
        places[MetadataIndex(target.name, offsets)] = _StorageInfo(relative_path=file, offset=where.offset, length=where.length)
    with (folder / ".metadata").open("wb") as file_:
        pickle.dump(Metadata(state_dict_metadata=dict(metadata), storage_data=places), file_)
    torch.save({}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _write_manifest(directory: Path, lanes: list[Lane], written: list[Written]) -> None:
    """Write the size and CRC-32 of every file. For the tensors' files they are combined from their parts, without reading the files
    again."""
    files: dict[str, list[int]] = {}
    for where in written:
        name = Path(lanes[where.lane].file).name
        size, checksum = files.get(name, [0, 0])
        files[name] = [size + where.length, combine(checksum, where.checksum, where.length)]
    for path in sorted((directory / TENSORS).iterdir()):
        if path.name not in files:
            files[path.name] = [path.stat().st_size, checksum_of(path)]
    document = {"step": 0, "world_size": 1, "weights_only": True, "files": files}
    (directory / "manifest.json").write_text(json.dumps(document, indent=1) + "\n")


def _summary(checkpoint: Path, tensors: list[_Tensor]) -> Import:
    read: dict[str, int] = {}
    drawn: dict[str, int] = {}
    for tensor in tensors:
        if tensor.source is not None:
            name = f"{tensor.source.part} ({tensor.source.format})"
            read[name] = read.get(name, 0) + tensor.info.numel
        else:
            part = tensor.target.name.partition(".")[0]
            drawn[part] = drawn.get(part, 0) + tensor.info.numel
    return Import(checkpoint, sum(read.values()) + sum(drawn.values()), read, drawn)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
