"""Finds the position of the values of a piece in a file of a distributed checkpoint.

torch's distributed checkpoint stores every piece in the format of `torch.save`: an uncompressed zip archive, in which a small pickle
describes the tensor and a record contains its values. The archive's directory and the pickle are enough to find the values, so that they
can be read directly to their destination. Only numbers and names of types are unpickled.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mm.conversion.files import Place, TensorInfo, read_into

_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Header of a member of a zip archive: signature, length of the name, length of the extra field that follows the name."""


@dataclass(frozen=True)
class Piece:
    """A stored piece of a tensor."""

    place: Place
    """Position of its storage's first value."""
    info: TensorInfo
    strides: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """Read its values into a tensor of its shape."""
        storage = torch.empty(self.info.numel, dtype=self.info.dtype)
        read_into(self.place, storage)
        return storage.as_strided(self.info.shape, self.strides)

    def read_into(self, target: torch.Tensor) -> None:
        """Read its values into a view of its shape, directly if both are contiguous."""
        if target.is_contiguous() and self.strides == target.stride():
            read_into(self.place, target)
        else:
            target.copy_(self.read())

    def read_row_into(self, target: torch.Tensor, *, row: int) -> None:
        """Read its row [row] into a view of the row's shape; other rows are read only if rows are not stored one after another."""
        shape, strides = self.info.shape[1:], self.strides[1:]
        count = torch.Size(shape).numel()
        if self.info.shape[0] > 1 and self.strides[0] != count:
            target.copy_(self.read()[row])
            return
        part = Place(self.place.path, self.place.offset + row * count * self.info.dtype.itemsize)
        Piece(part, TensorInfo(shape, self.info.dtype), strides).read_into(target)


def find_piece(path: Path, *, offset: int, length: int, name: str) -> Piece:
    """Find the piece whose archive is in these bytes of a file.

    Raises ValueError that names the tensor if the bytes hold something else.
    """
    with path.open("rb", buffering=0) as file:
        try:
            with zipfile.ZipFile(_Window(file.fileno(), offset, length)) as archive:
                members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
                described = _Described(io.BytesIO(archive.read(members["data.pkl"]))).load()
            data = members[f"data/{described.key}"]
            header = os.pread(file.fileno(), _LOCAL_HEADER.size, offset + data.header_offset)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, AttributeError, TypeError, EOFError, struct.error) as error:
            raise ValueError(f"{path}: a piece of {name} cannot be read ({type(error).__name__}: {error}): restore it") from None
    begin = offset + data.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    stored = data.compress_type == zipfile.ZIP_STORED
    info = TensorInfo(described.shape, described.dtype)
    spread = torch.empty_strided(described.shape, described.strides, dtype=info.dtype, device="meta").untyped_storage().nbytes()
    if signature != b"PK\x03\x04" or not stored or described.first != 0 or not spread == info.num_bytes == data.file_size:
        raise ValueError(
            f"{path}: the piece of {name} is not stored in the format of torch's distributed checkpoints: write the checkpoint again"
        )
    return Piece(Place(path, begin), info, described.strides)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str


@dataclass(frozen=True)
class _Tensor:
    key: str
    dtype: torch.dtype
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuilt(storage: _Storage, first: int, shape: tuple[int, ...], strides: tuple[int, ...], *unused: Any) -> _Tensor:
    return _Tensor(storage.key, storage.dtype, int(first), tuple(shape), tuple(strides))


class _Described(pickle.Unpickler):
    """Unpickles the description of a tensor as plain numbers; a pickle that names any other function or class is an error."""

    def find_class(self, module: str, name: str) -> Callable[..., Any] | torch.dtype:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *unused: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, _ = pid
        return _Storage(dtype, str(key))


class _Window(io.RawIOBase):
    """A range of bytes of a file, as a file of its own."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self.descriptor, self.offset, self.length, self.position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.position)
        data = os.pread(self.descriptor, left if size < 0 else min(size, left), self.offset + self.position)
        self.position += len(data)
        return data
