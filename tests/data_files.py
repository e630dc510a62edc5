"""Pictures and shards for tests."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_mm.data.shards import TarWriter


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 30), form: str = "JPEG") -> bytes:
    """An encoded picture of noise, `size` = (width, height)."""
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
    """A small PNG whose header claims side x side pixels."""
    data = bytearray(picture(form="PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A shard of these files, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tar = TarWriter(path)
    for name, data in members.items():
        tar.add(name, data)
    tar.close()
    return path
