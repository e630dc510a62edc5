"""Converts an image of any shape and mode to the square of 8-bit RGB pixels that a model sees.

A model family defines the transform of its images (`ImageInput.transform`). Training, evaluation and exported processors all use it.

How a rectangle becomes a square of `size` pixels (bicubic, antialiased, as Pillow does it):

    squash   both sides become `size`; the aspect ratio is lost                                           DFN5B CLIP, Mono-InternVL's tiles
    crop     the shorter side becomes `size`, the longer int(size * longer / shorter); the middle is cut out      OpenAI's CLIP, EVA-CLIP
    pad      the picture is centred in a square of the fill colour, which is resized to `size`             LLaVA 1.5

Worked example of `crop` to 336: 640 x 480 becomes 448 x 336, and columns 56 to 391 of it are kept. Of a picture more than 16 times as
long as wide only the middle is resized, so that a line of 30,000 x 3 pixels does not take gigabytes. For the same reason a picture whose
padded square would have more than 128 megapixels is first reduced by a whole number, by averaging.

How other kinds of pictures become RGB:

    white    transparent parts are put on white, and 16-bit values are reduced to their high byte
    pillow   as Pillow's `convert("RGB")`: transparency is dropped, which shows any colour stored under it, and 16-bit values saturate at
             255. Released processors do this, so models that are exported to the authors' code are trained with it.

EXIF orientation is never applied: no released processor of these families applies it, and img2dataset's output has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

from megatron_mm.data.image_formats import MAX_PIXELS

Resize = Literal["squash", "crop", "pad"]
ToRgb = Literal["white", "pillow"]

_BICUBIC = Image.Resampling.BICUBIC
_LARGEST_CANVAS = 2 * MAX_PIXELS
"""Largest padded square, in pixels. No picture that is at most twice as long as wide needs a larger one."""
_LONGEST = 16
"""Largest ratio of longer to shorter side at which `crop` resizes the whole picture before it cuts out the middle."""


@dataclass(frozen=True)
class Placement:
    """How a picture is cut, resized and cut again, in this order. Boxes are (left, top, width, height) in pixels before the cut."""

    canvas: tuple[int, int, int, int]
    """Box that is cut out of the picture. The part of it outside the picture has the fill colour."""
    width: int
    height: int
    """Size to which the canvas is resized."""
    window: tuple[int, int, int, int]
    """Box that is cut out of the resized canvas: always the model's square, and always inside the canvas."""


@dataclass(frozen=True)
class ImageTransform:
    """See the module's docstring."""

    size: int
    """Side of the square, pixels."""
    fill: tuple[int, int, int]
    """Colour around a padded picture."""
    resize: Resize = "squash"
    to_rgb: ToRgb = "white"
    resize_first: bool = False
    """Resize before the conversion to RGB, in the picture's own mode, as open_clip's and InfiMM's processors do. Works only if `to_rgb` is
    pillow and `resize` is not pad. A palette is then resized without interpolation."""

    def enlarged(self, times: int) -> ImageTransform:
        """Return the same transform to a square whose side is `times` as long."""
        return replace(self, size=times * self.size)

    def square(self, image: Image.Image) -> Image.Image:
        """Return the square of an opened picture of any mode."""
        if self.resize_first and self.to_rgb == "pillow" and self.resize != "pad":
            return self.resized(_straight(image)).convert("RGB")
        return self.resized(self.rgb(image))

    def rgb(self, image: Image.Image) -> Image.Image:
        """Convert an opened picture of any mode to 8-bit RGB, without resizing it."""
        return _straight(image).convert("RGB") if self.to_rgb == "pillow" else on_white(image)

    def resized(self, image: Image.Image) -> Image.Image:
        """Return the square of a picture in the picture's own mode; padding needs RGB."""
        if (times := self.reduction(*image.size)) > 1:
            image = image.reduce(times)
        place = self.place(*image.size)
        left, top, width, height = place.canvas
        if left < 0 or top < 0:
            canvas = Image.new("RGB", (width, height), self.fill)
            canvas.paste(image, (-left, -top))
            image = canvas
        elif (width, height) != image.size:
            image = image.crop((left, top, left + width, top + height))
        image = image.resize((place.width, place.height), _BICUBIC)
        left, top, width, height = place.window
        return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))

    def reduction(self, width: int, height: int) -> int:
        """Return by how many times a picture of this size is reduced before it is padded: 1 except for very long ones."""
        if self.resize != "pad":
            return 1
        return math.ceil(max(width, height) / math.isqrt(_LARGEST_CANVAS))

    def place(self, width: int, height: int) -> Placement:
        """Return how a picture of this size is converted to the square."""
        whole, square = (0, 0, width, height), (0, 0, self.size, self.size)
        if self.resize == "pad":
            side = max(width, height)
            return Placement((-((side - width) // 2), -((side - height) // 2), side, side), self.size, self.size, square)
        if self.resize == "squash":
            return Placement(whole, self.size, self.size, square)
        across, down = _excess(width, height), _excess(height, width)
        canvas = (across, down, width - 2 * across, height - 2 * down)
        wide, high = self.size, self.size
        if width > height:
            wide = int(self.size * canvas[2] / height)
        else:
            high = int(self.size * canvas[3] / width)
        # Half a pixel is rounded to the even neighbour, as in torchvision's CenterCrop.
        return Placement(canvas, wide, high, (round((wide - self.size) / 2), round((high - self.size) / 2), self.size, self.size))


def _excess(long: int, short: int) -> int:
    """Return the number of pixels to cut off either end of the long side before resizing."""
    return max(0, (long - _LONGEST * short) // 2)


def _straight(image: Image.Image) -> Image.Image:
    """Return a picture whose colours are not multiplied by its opacity; Pillow converts no other to RGB."""
    return image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode]) if image.mode in ("La", "RGBa") else image


@cache
def can_become_rgb(mode: str) -> bool:
    """Return whether pictures of one of Pillow's modes can be converted, so that `prepare` accepts no other.

    Floating-point numbers (F) have no common range: those from 0 to 1 would become a black picture.
    """
    if mode == "F":
        return False
    try:
        for to_rgb in ("white", "pillow"):
            ImageTransform(1, (0, 0, 0), to_rgb=to_rgb, resize_first=True).square(Image.new(mode, (2, 2)))
    except (ValueError, KeyError, OSError):
        return False
    return True


def on_white(image: Image.Image) -> Image.Image:
    """Convert an opened picture of any mode to 8-bit RGB, with transparent parts on white."""
    image = _straight(image)
    if image.mode.startswith("I"):  # 16 and 32 bits: Pillow would saturate, so keep the high byte
        values, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((values.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if isinstance(transparent, int):
            image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")
