"""The image formats that can be read: the same list for preparation, decoding and evaluation.

Pillow can open some forty formats, and for some of them (EPS) it runs an external program. So every image is opened with `open_image`,
which tries only the formats below, whatever the file is called.

Nothing is written to the console about damaged or unusual images, neither by Pillow nor by libtiff: whoever opens an image counts it if it
cannot be used.
"""

from __future__ import annotations

import ctypes
import io
import logging
import warnings
from pathlib import Path

from PIL import Image, features

IMAGE_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))
"""Pillow's names of the formats that are decoded. An animation is represented by its first frame."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
"""Extensions of files in these formats, in the order in which they are tried for the image of a pair."""
UNREAD_EXTENSIONS = ("heic", "heif", "jp2", "j2k", "jxl", "svg", "eps", "ps", "psd", "ico", "tga", "ppm", "pgm", "dng", "raw", "exr")
"""Extensions of image formats that are not decoded. A sample with such a file is rejected and counted, never treated as text."""
MAX_PIXELS = 64_000_000
"""Images with more pixels are refused when their header is read, before a decoder allocates memory for them."""
MAX_FILE_BYTES = 256 * 2**20
"""Images and documents with more bytes are refused before they are read."""


# catch_warnings around each image would not be thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _silence_libtiff() -> None:
    """Stop libtiff from writing to stderr. Pillow raises an error for what it cannot decode, but has no setting for these messages."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libtiff" in line}
    for path in mapped:
        library = ctypes.CDLL(path)  # loaded by Pillow already
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


_silence_libtiff()


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image without decoding it. Raises Pillow's error if its format is not one of `IMAGE_FORMATS`."""
    return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)


def is_image_name(extension: str) -> bool:
    """Return whether a file with this extension ("jpg", "0.png") is an image, in a format that is decoded or not."""
    last = extension.rpartition(".")[2]
    return last in IMAGE_EXTENSIONS or last in UNREAD_EXTENSIONS
