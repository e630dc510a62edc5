"""Pictures, shards, and an experiment on them, for tests."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_mm.config import Experiment
from megatron_mm.data.sources.shards import TarWriter
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel.topology import Topology

ALONE = Topology(
    device=torch.device("cpu"),
    rank=0,
    world_size=1,
    tensor_rank=0,
    tensor_size=1,
    pipeline_rank=0,
    pipeline_size=1,
    virtual_size=1,
    data_rank=0,
    data_size=1,
)
"""The topology of a single process."""


def experiment(path: Path, **data: Any) -> Experiment:
    """Return `debug_mm1` on a data set, decoded by Pillow, with these fields of `DataConfig` changed."""
    base = get_recipe("debug_mm1")
    return replace(base, data=replace(base.data, path=path, decoder="pillow", packing_window=64, **data))


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 30), form: str = "JPEG") -> bytes:
    """Return an encoded picture of noise; `size` is (width, height)."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(buffer, form)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """Return a small PNG whose header claims side x side pixels."""
    data = bytearray(picture(form="PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write a shard of these files, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tar = TarWriter(path)
    for name, data in members.items():
        tar.add(name, data)
    tar.close()
    return path


def rot(path: Path, content: bytes) -> None:
    """Change a shard's content but not its modification time, so that a run still takes it for the indexed shard."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def blank_ranges(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Overwrite ranges (offset, size) of a shard with zeros, keeping its modification time."""
    content = bytearray(path.read_bytes())
    for offset, size in ranges:
        content[offset : offset + size] = bytes(size)
    rot(path, bytes(content))
