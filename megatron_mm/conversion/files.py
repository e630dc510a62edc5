"""Tensors in files: safetensors headers, positions of tensors, and positioned reads and writes that need no lock.

Files are read and written with plain system calls rather than through a memory map. Mapped pages count as this process's memory until the
system reclaims them, and a converter should never hold more than it is working on.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mm.platform.files import BLOCK_BYTES

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Names of types in a safetensors header."""

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)  # torch's count overflows for a header that lies

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Position of a tensor's values in a file; they are in order and without gaps."""

    path: Path
    offset: int


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    assert tensor.is_contiguous(), "only a contiguous tensor occupies one range of bytes"
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_tensor(place: Place, info: TensorInfo) -> torch.Tensor:
    """Read a stored tensor. Raises ValueError if the file ends too early."""
    tensor = torch.empty(info.shape, dtype=info.dtype)
    read_into(place, tensor)
    return tensor


def read_into(place: Place, tensor: torch.Tensor) -> None:
    """Fill a contiguous tensor from a file. Raises ValueError if the file ends too early."""
    target = tensor_bytes(tensor) if tensor.numel() else memoryview(b"")
    with place.path.open("rb", buffering=0) as file:
        done = 0
        while done < len(target):
            count = os.preadv(file.fileno(), [target[done : done + BLOCK_BYTES]], place.offset + done)
            if count == 0:
                raise ValueError(
                    f"{place.path} ends after {place.offset + done} bytes, in the middle of a tensor: it is truncated; download it again"
                )
            done += count


def write_at(descriptor: int, offset: int, data: memoryview | bytes, checksum: int = 0) -> int:
    """Write bytes at an offset; return their CRC-32, continued from `checksum`."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        block = view[done : done + BLOCK_BYTES]
        checksum = zlib.crc32(block, checksum)  # while the block is in the processor's cache
        written = 0
        while written < len(block):
            written += os.pwrite(descriptor, block[written:], offset + done + written)
        done += len(block)
    return checksum


# ------------------------------------------------------------------------------------------------------------- safetensors


def safetensors_header(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a safetensors file and the offset in the file of each tensor's bytes, in the order of `tensors`."""
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, offset = {}, 0
    for name, info in tensors.items():
        end = offset + info.num_bytes
        document[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        begins[name], offset = offset, end
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    header = struct.pack("<Q", len(text)) + text
    return header, {name: begin + len(header) for name, begin in begins.items()}


def read_safetensors_header(path: Path) -> dict[str, tuple[TensorInfo, Place]]:
    """Read the shape, type and position of each tensor of a safetensors file.

    Raises ValueError if it is not a safetensors file or is truncated, or if its tensors are named twice, overlap or leave gaps.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(8)
        length = struct.unpack("<Q", beginning)[0] if len(beginning) == 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise ValueError(
                f"{path} is not a safetensors file, or is truncated: its header of {length} bytes is longer than the "
                f"{size} bytes of the file"
            )
        text = file.read(length)
    try:
        document = json.loads(text, object_pairs_hook=lambda pairs: _no_doubles(pairs, path))
        entries = dict(_entries(document, path, data=8 + length))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a safetensors header that cannot be read ({type(error).__name__}: {error})") from None
    end = 8 + length
    for name, (info, place) in sorted(entries.items(), key=lambda item: (item[1][1].offset, item[1][0].num_bytes)):
        if place.offset != end:
            raise ValueError(f"{path}: tensor {name} begins at byte {place.offset}, but the one before it ends at {end}")
        end += info.num_bytes
    if end != size:
        raise ValueError(
            f"{path} has {size} bytes, but its tensors end at byte {end}: "
            f"it is {'truncated' if end > size else 'too long'}; download it again"
        )
    return entries


def _entries(document: dict[str, Any], path: Path, *, data: int) -> Iterator[tuple[str, tuple[TensorInfo, Place]]]:
    for name, entry in document.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: tensor {name} has the type {entry['dtype']}, but must be one of {sorted(SAFETENSORS_DTYPES)}")
        info = TensorInfo(tuple(int(size) for size in entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        if min((0, *info.shape)) < 0 or end - begin != info.num_bytes:
            raise ValueError(f"{path}: tensor {name} of shape {list(info.shape)} takes {info.num_bytes} bytes, but has {end - begin}")
        yield name, (info, Place(path, data + begin))


def _no_doubles(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubled:
        raise ValueError(f"{path} names {', '.join(doubled[:8])} more than once")
    return dict(pairs)
