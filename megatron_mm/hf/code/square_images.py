"""Images -> normalised squares, as in training. Part of the checkpoint: imports only NumPy, Pillow and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image


class SquareImageProcessor(BaseImageProcessor):
    """Make each image square (bicubic), scale it to [0, 1], subtract mean and divide by std, as in training. EXIF orientation is ignored.

    Args:
        size: {"height": pixels, "width": pixels}; both must be equal.
        image_mean, image_std: values for red, green and blue.
        resize: "squash" changes the aspect ratio, "crop" cuts out the centre, "pad" adds a border of the mean colour.
        to_rgb: "white" puts transparent parts on white and keeps the high byte of 16-bit values; "pillow" calls `convert("RGB")`.
        resize_first: with "pillow", and unless `resize` is "pad", resize in the image's own mode, before the conversion to RGB.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        resize: str = "squash",
        to_rgb: str = "white",
        resize_first: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = size or {"height": 378, "width": 378}
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resize = resize
        self.to_rgb = to_rgb
        self.resize_first = resize_first

    def preprocess(self, images: Any, return_tensors: str | None = None, low_resolution: Any = False, **kwargs: Any) -> BatchFeature:
        """One image or a list (Pillow, NumPy or torch) -> `pixel_values` [squares of all images, 3, H, W] float32.

        Args:
            low_resolution: show an image of several squares only as its overview; one value for all images, or one for each.
        """
        images = images if isinstance(images, list | tuple) else [images]
        low = [low_resolution] * len(images) if isinstance(low_resolution, bool) else list(low_resolution)
        shape = (0, 3, self.size["height"], self.size["width"])
        squares = [square for image, is_low in zip(images, low, strict=True) for square in self.squares(image, is_low)]
        pixels = np.stack(squares) if squares else np.zeros(shape, dtype=np.float32)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def squares(self, image: Any, low_resolution: bool = False) -> list[np.ndarray]:
        """Convert an image (Pillow, NumPy or torch) to squares [3, H, W] float32: one here, several in families that divide images."""
        return [self._pixels(image)]

    def _pixels(self, image: Any, times: int = 1) -> np.ndarray:
        """Convert an image to one square [3, times * H, times * W] float32."""
        image = to_pillow(image)
        fill = tuple(round(255 * channel) for channel in self.image_mean)
        own_mode = self.resize_first and self.to_rgb == "pillow" and self.resize != "pad"
        if not own_mode:
            image = image.convert("RGB") if self.to_rgb == "pillow" else on_white(image)
        square = _RESIZES[self.resize](image, times * self.size["height"], fill)
        return self._normalised(square)

    def _normalised(self, image: Image.Image) -> np.ndarray:
        """Normalise the pixels of an image: [3, height, width] float32."""
        scaled = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        normalised = (scaled - np.float32(self.image_mean)) / np.float32(self.image_std)
        return normalised.transpose(2, 0, 1)


def to_pillow(image: Any) -> Image.Image:
    """Convert an image to a Pillow image. It may be one already, or a NumPy or torch array: [height, width] grey, or with 1, 3 or 4
    channels first or last; integers from 0 to 255, or floats from 0 to 1.

    Raises ValueError for anything else, and for an image without pixels.
    """
    if isinstance(image, Image.Image):
        return image
    if not hasattr(image, "shape"):
        raise ValueError(f"an image is a {type(image).__name__}, but must be a Pillow image or an array: open files with PIL.Image.open")
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"an image has shape {array.shape}, but must be [height, width] or have 1, 3 or 4 channels first or last")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.ndim == 2:
        array = array[..., None]
    colours = (array.shape[0] in (3, 4), array.shape[-1] in (3, 4))
    first = colours[0] if any(colours) else array.shape[-1] != 1  # if both are possible, decide as transformers does
    return to_pil_image(array, input_data_format="channels_first" if first else "channels_last")


def on_white(image: Image.Image) -> Image.Image:
    """Convert a Pillow image to RGB, with transparent parts on white and the high byte of 16-bit values."""
    if image.mode.startswith("I"):  # Pillow itself would clip values at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def _squash(image: Image.Image, size: int, fill: tuple[int, ...]) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int, fill: tuple[int, ...]) -> Image.Image:
    """Resize the shorter side to `size` and cut out the centre. If one side is more than 16 times the other, only its middle is resized."""
    across, down = (max(0, (a - 16 * b) // 2) for a, b in (image.size, image.size[::-1]))
    image = image.crop((across, down, image.width - across, image.height - down))
    width, height = image.size
    scaled = (int(size * width / height), size) if width > height else (size, int(size * height / width))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in scaled)
    return image.crop((left, top, left + size, top + size))


def _pad(image: Image.Image, size: int, fill: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), fill)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return _squash(canvas, size, fill)


_RESIZES = {"squash": _squash, "crop": _crop, "pad": _pad}
