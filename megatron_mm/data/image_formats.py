"""The image formats that can be read: the same list for preparation, decoding and evaluation.

Pillow can open some forty formats, and for some of them (EPS) it runs an external program. So every image is opened with `open_image`,
which tries only the formats below, whatever the file is called.
"""

from __future__ import annotations

import io

from PIL import Image, features

IMAGE_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))
"""Pillow's names of the formats that are decoded. Of an animation the first frame is used."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
"""How files of these formats end, in the order in which the image of a pair is looked for."""
UNREAD_EXTENSIONS = ("heic", "heif", "jp2", "j2k", "jxl", "svg", "eps", "ps", "psd", "ico", "tga", "ppm", "pgm", "dng", "raw", "exr")
"""Images, by their names, of formats that are not decoded. A sample with one of these is rejected and counted, never taken for a text."""
MAX_PIXELS = 64_000_000
"""Larger images are refused by their header, before a decoder allocates anything for them."""
MAX_FILE_BYTES = 256 * 2**20
"""Larger images and documents are refused before they are read."""


def open_image(data: bytes) -> Image.Image:
    """An encoded image, opened but not decoded. Raises what Pillow raises where it is of no format of `IMAGE_FORMATS`."""
    return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)


def is_image_name(extension: str) -> bool:
    """Whether a file with this extension ("jpg", "0.png") is an image, of a format that is read or not."""
    last = extension.rpartition(".")[2]
    return last in IMAGE_EXTENSIONS or last in UNREAD_EXTENSIONS
