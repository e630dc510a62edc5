"""Reading single tensors of a training checkpoint, in one process and without building a model.

A checkpoint's `tensors/` has torch's distributed-checkpoint format as megatron-core writes it: every tensor under its global name, in
pieces. This module assembles the pieces, whatever layout wrote them.
"""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_mm.conversion.files import TensorInfo
from megatron_mm.conversion.pieces import Piece, find_piece
from megatron_mm.platform.files import checksum_of
from megatron_mm.training.checkpoint import belongs_to_model
from megatron_mm.training.safe_pickle import check_pickles

_NOT_EXPORTED = (".router.shares",)
"""Suffixes of names of tensors that hold state of the last training step and are not weights."""


class CheckpointReader:
    """The model's tensors in a checkpoint directory (`RUN_DIR/checkpoints/step_...`). May be used by several threads."""

    def __init__(self, checkpoint: Path, *, verify: bool = True, threads: int = 1) -> None:
        """
        Args:
            verify: compare every file with its recorded checksum, which reads the whole checkpoint once; sizes are always
                compared.
            threads: number of threads that compute checksums.

        Raises ValueError if the directory is not a complete checkpoint, or a file is missing or damaged.
        """
        self.path = checkpoint / "tensors"
        manifest = checkpoint / "manifest.json"
        if not manifest.is_file():
            raise ValueError(
                f"{checkpoint} is not a complete checkpoint (no manifest.json): specify a directory RUN_DIR/checkpoints/step_..."
            )
        self.files: dict[str, list[int]] = json.loads(manifest.read_text())["files"]
        for name, (size, _) in self.files.items():
            _check_size(self.path / name, size)
        if verify:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda item: _check_sum(self.path / item[0], item[1][1]), self.files.items()))
        check_pickles(self.path)
        metadata: Metadata = pickle.loads((self.path / ".metadata").read_bytes())  # safe: checked just above
        self._stored = metadata.storage_data
        self._rows: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        self._entries = {name: e for name, e in metadata.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}

    def names(self) -> dict[str, TensorInfo]:
        """Return the model's parameters by global name, without optimizer state and random-number generators."""
        return {name: info for name, info in self.all_names().items() if is_weight(name)}

    def all_names(self) -> dict[str, TensorInfo]:
        """Return all tensors by global name."""
        return {name: TensorInfo(tuple(entry.size), entry.properties.dtype) for name, entry in self._entries.items()}

    def read(self, name: str, *, row: int | None = None) -> torch.Tensor:
        """Read one tensor, to the CPU. Raises KeyError for an unknown name, ValueError if pieces of the tensor are missing.

        Args:
            row: read only tensor[row], for example one expert of a stack, without memory for the others.
        """
        entry = self._entries[name]
        if row is None:
            found = torch.empty(entry.size, dtype=entry.properties.dtype)
            filled = sum(self._copy(name, chunk, found, offsets=chunk.offsets) for chunk in entry.chunks)
        else:
            found = torch.empty(entry.size[1:], dtype=entry.properties.dtype)
            chunks = self._rows.get(name) or self._rows.setdefault(name, _chunks_by_row(entry))
            filled = sum(self._copy_row(name, chunk, found, row=row) for chunk in chunks.get(row, []))
        if filled != found.numel():
            part = "" if row is None else f" of row {row}"
            raise ValueError(f"checkpoint tensor {name} lacks parts{part}: the checkpoint is incomplete")
        return found

    def _copy(self, name: str, chunk: ChunkStorageMetadata, target: torch.Tensor, *, offsets: torch.Size) -> int:
        place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, chunk.sizes, strict=True))
        self._piece(name, chunk).read_into(target[place])
        return chunk.sizes.numel()

    def _copy_row(self, name: str, chunk: ChunkStorageMetadata, target: torch.Tensor, *, row: int) -> int:
        place = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
        self._piece(name, chunk).read_row_into(target[place], row=row - chunk.offsets[0])
        return chunk.sizes[1:].numel()

    def _piece(self, name: str, chunk: ChunkStorageMetadata) -> Piece:
        stored = self._stored[MetadataIndex(name, chunk.offsets)]
        piece = find_piece(self.path / stored.relative_path, offset=stored.offset, length=stored.length, name=name)
        if piece.info != TensorInfo(tuple(chunk.sizes), self._entries[name].properties.dtype):
            raise ValueError(
                f"{piece.place.path}: a piece of {name} should be {list(chunk.sizes)} of {self._entries[name].properties.dtype}, but is "
                f"{list(piece.info.shape)} of {piece.info.dtype}: the checkpoint is damaged"
            )
        return piece


def is_weight(name: str) -> bool:
    """Return whether a stored tensor is one of the model's parameters."""
    return belongs_to_model(name) and not name.endswith(_NOT_EXPORTED)


def _check_size(path: Path, size: int) -> None:
    advice = "restore it or convert another checkpoint"
    if not path.is_file():
        raise ValueError(f"checkpoint file {path} is missing: {advice}")
    if (found := path.stat().st_size) != size:
        raise ValueError(f"checkpoint file {path} is {found} bytes long, expected {size}: {advice}")


def _check_sum(path: Path, checksum: int) -> None:
    if (found := checksum_of(path)) != checksum:
        raise ValueError(
            f"checkpoint file {path} is damaged (its CRC-32 is {found:08x}, expected {checksum:08x}): "
            "restore it or convert another checkpoint"
        )


def _chunks_by_row(entry: TensorStorageMetadata) -> dict[int, list[ChunkStorageMetadata]]:
    found: dict[int, list[ChunkStorageMetadata]] = defaultdict(list)
    for chunk in entry.chunks:
        for row in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
            found[row].append(chunk)
    return dict(found)
