"""Reading single tensors of a training checkpoint, in one process and without building a model.

A checkpoint's `tensors/` is torch's distributed-checkpoint format as megatron-core writes it: every tensor under its global
name, in pieces of any layout. The pieces are put together here whatever layout wrote them.
"""

from __future__ import annotations

import io
import json
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_mm.training.safe_pickle import check_pickles

_NOT_WEIGHTS = ("optimizer.", "chained_", "generators.", "rng")
_NOT_WEIGHTS_EITHER = (".router.shares",)
"""Ends of names: what training remembers of the last step."""
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """The model's tensors in a checkpoint directory (`RUN_DIR/checkpoints/step_...`)."""

    def __init__(self, checkpoint: Path, *, verify: bool = True) -> None:
        """
        Args:
            verify: compare every file with its recorded checksum, which reads the whole checkpoint once; sizes are always
                compared.

        Raises ValueError where the directory is no complete checkpoint, or a file is missing or damaged.
        """
        self.path = checkpoint / "tensors"
        manifest = checkpoint / "manifest.json"
        if not manifest.is_file():
            raise ValueError(f"{checkpoint} is not a complete checkpoint (no manifest.json): give a directory RUN_DIR/checkpoints/step_...")
        for name, (size, checksum) in json.loads(manifest.read_text())["files"].items():
            self._check_file(self.path / name, size, checksum if verify else None)
        check_pickles(self.path)
        self._reader = _Reader(self.path)
        self._tensors = {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._reader.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_WEIGHTS) and not name.endswith(_NOT_WEIGHTS_EITHER)
        }

    def names(self) -> dict[str, TensorInfo]:
        """The model's parameters by global name; optimizer state and random-number generators are left out."""
        return dict(self._tensors)

    def read(self, name: str, *, row: int | None = None) -> torch.Tensor:
        """One tensor, on the CPU. Raises KeyError for a name that is not in `names()`.

        Args:
            row: read tensor[row] alone: one expert of a stack of experts, without the others' memory.
        """
        info = self._tensors[name]
        if row is not None:
            return self._read_row(name, row, info)
        state = {name: torch.empty(info.shape, dtype=info.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is the intent
            dcp.load(state, storage_reader=self._reader, no_dist=True)
        return state[name]

    def _read_row(self, name: str, row: int, info: TensorInfo) -> torch.Tensor:
        """Put tensor[row] together from the pieces that hold parts of it."""
        found = torch.empty(info.shape[1:], dtype=info.dtype)
        filled = 0
        entry = self._reader.metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        for piece in entry.chunks:
            offset = row - piece.offsets[0]
            if not 0 <= offset < piece.sizes[0]:
                continue
            place = self._reader.metadata.storage_data[MetadataIndex(name, piece.offsets)]
            with (self.path / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                content = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
            region = tuple(slice(begin, begin + size) for begin, size in zip(piece.offsets[1:], piece.sizes[1:], strict=True))
            found[region] = content.reshape(tuple(piece.sizes))[offset]
            filled += found[region].numel()
        if filled != found.numel():
            raise ValueError(f"checkpoint tensor {name} lacks parts of row {row}: the checkpoint is incomplete")
        return found

    @staticmethod
    def _check_file(path: Path, size: int, checksum: int | None) -> None:
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"checkpoint file {path} is missing or has not its {size} bytes: restore it")
        if checksum is None:
            return
        actual = 0
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                actual = zlib.crc32(block, actual)
        if actual != checksum:
            raise ValueError(f"checkpoint file {path} is damaged (its checksum differs): restore it")


class _Reader(dcp.FileSystemReader):
    """Torch's reader with the description read once, not for every tensor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata
