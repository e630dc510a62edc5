"""Decoding for models that see images as tiles, and JPEG artefacts as an augmentation.

Pillow does all of this, in threads. DALI could resize each image of a batch to a different grid, but cutting images into different numbers
of tiles, of which a process may need only some, would take a separate operator for each grid. Also, with a single decoder the pixels,
including artefacts, do not depend on the packages that a machine has.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from megatron_mm.data.image_bytes import jpeg, rgb_pixels, squares
from megatron_mm.data.image_formats import MAX_PIXELS, open_image
from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.load.decode import DecodedImages
from megatron_mm.data.sub_images import cut_sub_images
from megatron_mm.data.tiling import tile_images


@dataclass(frozen=True)
class EncodedTiles:
    """Some tiles of an encoded image."""

    data: bytes
    width: int
    height: int
    """Size in pixels from which the plan computed the number of tiles. An image of another size is resized to it, so that the numbers
    agree."""
    tiles: range
    """Consecutive tiles to return."""
    count: int | None = None
    """Number of tiles in the plan, for images that are shown as sub-images; None for all."""
    qualities: tuple[int, ...] = ()
    """JPEG quality for each of the tiles to return. Each tile is encoded and decoded again after the image was resized and cut, as in
    Mono-InternVL's training. An image that is not cut is encoded before it is resized, unless it is too long for a JPEG. Empty leaves the
    pixels unchanged."""


_LONGEST_JPEG = 65_500
"""Longest side of a JPEG that libjpeg writes, pixels."""


class TileDecoder:
    """Decodes images and cuts them into tiles. An image that is not cut is a single tile."""

    def __init__(self, image: ImageInput, *, threads: int) -> None:
        self.image = image
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, images: Sequence[EncodedTiles]) -> DecodedImages:
        """Decode the requested tiles of all images, one image after another. Tiles of an undecodable image have the fill colour."""
        size, counts = self.image.size, [len(image.tiles) for image in images]
        pixels = np.empty((sum(counts), 3, size, size), dtype=np.uint8)
        ok = list(self._threads.map(self._one, images, np.split(pixels, np.cumsum(counts)[:-1]))) if images else []
        return DecodedImages(torch.from_numpy(pixels), np.array(ok, dtype=bool))

    def _one(self, wanted: EncodedTiles, out: np.ndarray) -> bool:
        """Decode into `out`, [tiles, 3, size, size]. If that fails, fill it with the fill colour and return False."""
        try:
            with open_image(wanted.data) as image:
                if image.width * image.height <= MAX_PIXELS:
                    out[:] = self._tiles(image, wanted)
                    return True
        except Exception:  # a decoder may raise anything on damaged input; the caller counts it
            pass
        out[:] = np.array(self.image.fill, dtype=np.uint8)[:, None, None]
        return False

    def _tiles(self, image: Image.Image, wanted: EncodedTiles) -> np.ndarray:
        """Return the requested tiles, with JPEG artefacts if any: [tiles, 3, size, size] uint8."""
        transform = self.image.transform
        if self.image.is_one_square:
            if not wanted.qualities:
                return _pixels(transform.square(image))[None]
            if max(image.size) > _LONGEST_JPEG:
                return _pixels(_degraded(transform.square(image), wanted.qualities[0]))[None]
            return _pixels(transform.square(_degraded(transform.rgb(image), wanted.qualities[0])))[None]
        tiling, sub_images = self.image.tiling, self.image.sub_images
        if sub_images is not None:
            shown = cut_sub_images(image, sub_images, transform, wanted=wanted.tiles, count=wanted.count or sub_images.count)
            for square, quality in zip(shown, wanted.qualities, strict=bool(wanted.qualities)):
                square[:] = _pixels(_degraded(Image.fromarray(square.transpose(1, 2, 0)), quality))
            return shown
        assert tiling is not None, "an image of several squares needs a tiling or sub-images"
        rgb = transform.rgb(image)
        if rgb.size != (wanted.width, wanted.height):
            rgb = rgb.resize((wanted.width, wanted.height), Image.Resampling.BICUBIC)
        tiles = tile_images(rgb, tiling, self.image.size)[wanted.tiles.start : wanted.tiles.stop]
        if wanted.qualities:
            tiles = [_degraded(tile, quality) for tile, quality in zip(tiles, wanted.qualities, strict=True)]
        return squares(tiles, self.image.size)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown()


def _pixels(rgb: Image.Image) -> np.ndarray:
    """Return an image as an array: [3, height, width] uint8."""
    return rgb_pixels(rgb).transpose(2, 0, 1)


def _degraded(rgb: Image.Image, quality: int) -> Image.Image:
    return open_image(jpeg(rgb, quality=quality))
