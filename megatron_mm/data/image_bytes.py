"""Pixels and JPEGs of Pillow's images, without stopping the interpreter's other threads.

Pillow holds the interpreter's lock while it copies pixels into bytes (`numpy.asarray(image)`) and while it writes a file into memory. One
of the other threads launches the GPU's kernels. `benchmarks/image_threads.py` shows how much of its time it loses.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels of an RGB image, [height, width, 3] uint8, read-only; if possible without a copy."""
    assert image.mode == "RGB", f"image has mode {image.mode}, but its pixels are read as RGB"
    image.load()
    to_array = _arrow_array()
    if to_array is not None and hasattr(image, "__arrow_c_array__"):  # Pillow 11.2 and newer
        try:
            shared = to_array(image)
        except (TypeError, ValueError):  # pyarrow before 14; or the image is in several blocks of memory: it is too large for one
            return np.asarray(image)
        return np.frombuffer(shared.values.buffers()[1], dtype=np.uint8).reshape(image.height, image.width, 4)[..., :3]
    return np.asarray(image)


def squares(images: Sequence[Image.Image], size: int) -> np.ndarray:
    """Return RGB images of `size` x `size` pixels in one array: [k, 3, size, size] uint8."""
    found = np.empty((len(images), 3, size, size), dtype=np.uint8)
    for place, image in zip(found, images, strict=True):
        place[:] = rgb_pixels(image).transpose(2, 0, 1)
    return found


def jpeg(image: Image.Image, *, quality: int) -> bytes:
    """Return an image as a JPEG of this quality (0 to 100)."""
    with _file() as file:
        image.save(file, "JPEG", quality=quality)
        file.seek(0)
        return file.read()


def _file() -> BinaryIO:
    """An empty file in memory; if possible one with a file descriptor, because Pillow gives up the lock while it writes to one."""
    try:
        return cast(BinaryIO, open(os.memfd_create("jpeg"), "w+b", buffering=0))
    except (AttributeError, OSError):  # only Linux has it; some sandboxes forbid it; or too many files are open
        return io.BytesIO()


@functools.cache
def _arrow_array() -> Callable[[Any], Any] | None:
    try:
        import pyarrow  # takes a third of a second, and only runs with images need it
    except ImportError:  # for example in a container whose packages were added one by one: decoders would call every image damaged
        return None
    return pyarrow.array
