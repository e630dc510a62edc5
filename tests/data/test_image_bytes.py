"""Pixels and JPEGs are those of Pillow's own functions."""

from __future__ import annotations

import errno
import io
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megatron_mm.data import image_bytes
from megatron_mm.data.image_bytes import jpeg, rgb_pixels


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def open_too_many(name: str) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 5), (448, 448), (2300, 2100)])
def test_pixels_are_those_of_the_image(width: int, height: int) -> None:
    """The last image is too large for one block of Pillow's memory."""
    image = noise(width, height)
    assert np.array_equal(rgb_pixels(image), np.asarray(image))


def test_pixels_of_a_lazy_image_and_of_a_part_of_one() -> None:
    buffer = io.BytesIO()
    noise(40, 30).save(buffer, "PNG")
    with Image.open(buffer) as lazy:
        found = rgb_pixels(lazy)
    assert np.array_equal(found, np.asarray(noise(40, 30)))
    part = noise(40, 30).crop((3, 4, 20, 11))
    assert np.array_equal(rgb_pixels(part), np.asarray(part))


@pytest.mark.parametrize("lacks", ["Pillow", "pyarrow", "pyarrow 14"])
def test_pixels_without_the_images_own_memory(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacks == "Pillow":
        monkeypatch.delattr(Image.Image, "__arrow_c_array__", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None if lacks == "pyarrow" else SimpleNamespace(array=len))
    image_bytes._arrow_array.cache_clear()
    try:
        assert np.array_equal(rgb_pixels(noise(8, 6)), np.asarray(noise(8, 6)))
    finally:
        image_bytes._arrow_array.cache_clear()


@pytest.mark.parametrize("quality", [10, 75, 95])
@pytest.mark.parametrize("memfd", ["", "missing", "refused"])
def test_a_jpeg_is_the_one_that_pillow_writes_into_memory(quality: int, memfd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the process may open no more files: the image would otherwise count as damaged."""
    if memfd == "missing":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    if memfd == "refused":
        monkeypatch.setattr(os, "memfd_create", open_too_many, raising=False)
    buffer = io.BytesIO()
    noise(60, 50).save(buffer, "JPEG", quality=quality)
    assert jpeg(noise(60, 50), quality=quality) == buffer.getvalue()
