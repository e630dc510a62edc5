"""Reads only those parts of a checkpoint file that a process needs.

What upstream lacks: torch's reader of distributed checkpoints reads a whole stored piece for each box of it that is needed (torch 2.13,
`FileSystemReader.read_data`). After a change of layout, a process needs a few boxes of a large piece, and its neighbours need others, so
the piece is read once for every box. Here only the bytes from the first to the last element of a box are read, provided that the piece is
stored in the file as it is in memory; otherwise the whole piece is read.

Worked example: in a stored piece of 4 rows and 3 columns, the box of rows 1 and 2 is elements 3 to 8, 24 bytes in fp32. For the box of
columns 1 and 2 in all rows, elements 1 to 11 are read, and those of column 0 are left out.

In addition, the description of all pieces (`.metadata`), which every process would read from the file, can be passed in instead
(`give_metadata`).
"""

from __future__ import annotations

import functools
import io
import os
import pickle
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

METADATA = ".metadata"
"""Name of the file that describes all pieces."""
_given: dict[str, bytes] = {}


def install() -> None:
    """Make torch's reader read parts, and use given metadata; does nothing when called again."""
    if not hasattr(FileSystemReader.read_data, "reads_parts"):
        _read_parts.reads_parts = True  # type: ignore[attr-defined]
        FileSystemReader.read_data = _read_parts  # type: ignore[method-assign]
        FileSystemReader.read_metadata = _given_or_read(FileSystemReader.read_metadata)  # type: ignore[method-assign]


def give_metadata(folder: Path, data: bytes | None) -> None:
    """Provide the contents of the file `METADATA` of a folder, so that it is not read; None removes them."""
    if data is None:
        _given.pop(os.path.abspath(folder), None)
    else:
        _given[os.path.abspath(folder)] = data


def _given_or_read(read: Any) -> Any:
    @functools.wraps(read)
    def metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        data = _given.get(os.path.abspath(self.path))
        if data is None:
            return read(self, *args, **kwargs)
        found = pickle.loads(data)  # the bytes of a file whose pickles were checked
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    return metadata


def _read_parts(self: Any, plan: Any, planner: Any) -> Any:
    """Replacement of `FileSystemReader.read_data`."""
    wanted: dict[str, dict[Any, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for item in plan.items:
        wanted[self.storage_data[item.storage_index].relative_path][item.storage_index].append(item)
    for name, pieces in wanted.items():
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as file:
            for index, items in sorted(pieces.items(), key=lambda entry: self.storage_data[entry[0]].offset):
                stored = self.storage_data[index]
                if items[0].type == LoadItemType.BYTE_IO:
                    file.seek(stored.offset)
                    planner.load_bytes(items[0], io.BytesIO(file.read(stored.length)))
                    continue
                piece = _Piece(self._slice_file(file, stored), file, stored.offset)
                for item in items:
                    values = piece.box(item.storage_offsets, item.lengths)
                    target = planner.resolve_tensor(item).detach()
                    assert target.size() == values.size(), f"{index}: expected {target.size()}, but the checkpoint has {values.size()}"
                    target.copy_(values)
                    planner.commit_tensor(item, target)
    done: Future[None] = Future()
    done.set_result(None)
    return done


class _Piece:
    """A stored tensor in its file."""

    def __init__(self, view: Any, file: Any, offset: int) -> None:
        """
        Args:
            view: view of the piece's bytes in the file.
            offset: position of these bytes in the file.
        """
        self.view, self.file = view, file
        tensor = torch.load(view, map_location="meta", weights_only=True)  # its description, without its elements
        self.tensor = tensor
        self.begin = offset + tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
        self.whole: torch.Tensor | None = None

    def box(self, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """The elements of a box, [*lengths]."""
        if not self.tensor.is_contiguous() or self.whole is not None:
            return self._of_whole(offsets, lengths)
        if 0 in lengths:
            return torch.empty(tuple(lengths), dtype=self.tensor.dtype)
        strides, size = self.tensor.stride(), self.tensor.itemsize
        first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
        last = first + sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True))
        data = bytearray((last + 1 - first) * size)
        self.file.seek(self.begin + first * size)
        read = self.file.readinto(data)
        if read != len(data):
            raise OSError(f"{getattr(self.file, 'name', 'a checkpoint file')} ends {len(data) - read} bytes too early")
        return torch.frombuffer(data, dtype=self.tensor.dtype).as_strided(tuple(lengths), strides)

    def _of_whole(self, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        if self.whole is None:
            self.view.seek(0)
            self.whole = torch.load(self.view, map_location="cpu", weights_only=True)
        found = self.whole
        for dimension, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
            found = found.narrow(dimension, offset, length)
        return found
