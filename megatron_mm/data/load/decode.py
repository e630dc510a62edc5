"""Image decoding: encoded bytes -> uint8 RGB squares, by the model family's transform (`data.image_transform`).

DALI decodes ordinary JPEG, PNG and WebP. Images that DALI decodes differently from Pillow (CMYK, 16-bit, palettes, transparency, GIF) go to
Pillow at the same time. So does a whole batch in which DALI meets a damaged image, because DALI then returns nothing for that batch. On a
CPU, Pillow resizes the images that DALI has decoded, several times faster than DALI would. On a GPU, only JPEG is decoded there; DALI
decodes PNG and WebP in its threads on the CPU (`data.decode_threads`) and resizes them on the GPU.

A JPEG without an end marker goes to Pillow, which detects whether it is truncated; the GPU's decoder accepts truncated JPEGs. So does a
JPEG with other bytes between the segments before its pixels, as some cameras write it: DALI's parser refuses it, and libjpeg looks for the
next segment.

On a GPU our work has its own stream, for which this thread waits. Something inside DALI still waits for the work that training has already
queued when a batch begins: on an H200 28 JPEGs took 4.9 ms on an idle GPU and 320 ms behind 309 ms of matrix products, which took 4% longer
meanwhile. So batches are decoded ahead (`data.prefetch_steps`).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from megatron_mm.data.image_bytes import rgb_pixels
from megatron_mm.data.image_formats import MAX_PIXELS, open_image
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.platform.device import send

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodedImages:
    """A batch of images."""

    pixels: torch.Tensor
    """[n, 3, size, size] uint8; images that could not be decoded have the fill colour."""
    ok: np.ndarray
    """[images] bool: True if the image could be decoded."""


class ImageDecoder(Protocol):
    """Decodes batches of encoded images."""

    def decode(self, blobs: Sequence[bytes]) -> DecodedImages:
        """Decode images. An image that cannot be decoded does not affect the others."""
        ...

    def close(self) -> None:
        """Stop threads and free memory."""
        ...


class PillowDecoder:
    """Decodes with Pillow in threads."""

    def __init__(self, transform: ImageTransform, *, threads: int) -> None:
        self.transform = transform
        self.fill = np.array(transform.fill, dtype=np.uint8)[:, None, None]
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, blobs: Sequence[bytes]) -> DecodedImages:
        """See `ImageDecoder.decode`."""
        return self.start(blobs)()

    def start(self, blobs: Sequence[bytes]) -> Callable[[], DecodedImages]:
        """Start decoding in the threads. The returned function waits for the result."""
        pixels = self._room(len(blobs))
        found = self._threads.map(self._one, blobs, pixels)
        return lambda: DecodedImages(torch.from_numpy(pixels), np.array(list(found), dtype=bool))

    def resize(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Resize RGB images to squares: [n, 3, size, size] uint8."""
        pixels = self._room(len(images))
        list(self._threads.map(self._square, images, pixels))
        return torch.from_numpy(pixels)

    def _room(self, count: int) -> np.ndarray:
        return np.empty((count, 3, self.transform.size, self.transform.size), dtype=np.uint8)

    def _square(self, image: Image.Image, out: np.ndarray) -> None:
        out[:] = rgb_pixels(self.transform.square(image)).transpose(2, 0, 1)

    def _one(self, blob: bytes, out: np.ndarray) -> bool:
        """Decode into `out`, [3, size, size]. If that fails, fill it with the fill colour and return False."""
        try:
            with open_image(blob) as image:
                if image.width * image.height <= MAX_PIXELS:
                    self._square(image, out)
                    return True
        except Exception:  # a decoder may raise anything on damaged input; the caller counts it
            pass
        out[:] = self.fill
        return False

    def close(self) -> None:
        """See `ImageDecoder.close`."""
        self._threads.shutdown()


class DaliDecoder:
    """Decodes with NVIDIA DALI, on the CPU or in the GPU's decoder."""

    def __init__(self, transform: ImageTransform, *, threads: int, device: torch.device, resizes: bool | None = None) -> None:
        """
        Args:
            resizes: DALI also resizes, instead of Pillow; None means only on a GPU.
        """
        self.transform = transform
        self.threads = threads
        self.device = device
        self.resizes = device.type == "cuda" if resizes is None else resizes
        self._pillow = PillowDecoder(transform, threads=threads)
        self._pipeline: Any = None
        self._largest = 0
        """Maximum number of images that the pipeline takes at once."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def decode(self, blobs: Sequence[bytes]) -> DecodedImages:
        """See `ImageDecoder.decode`."""
        if self._stream is None:
            return self._decode(blobs)
        torch.cuda.set_device(self.device)  # each thread has its own current device, which is the first one by default
        with torch.cuda.stream(self._stream):
            decoded = self._decode(blobs)
            if decoded.pixels.is_cuda:
                decoded.pixels.record_stream(torch.cuda.default_stream(self.device))  # training reads them there later
        self._stream.record_event().synchronize()
        return decoded

    def _decode(self, blobs: Sequence[bytes]) -> DecodedImages:
        plain = [index for index, blob in enumerate(blobs) if is_plain(blob, self.transform)]
        other = sorted(set(range(len(blobs))) - set(plain))
        rest = self._pillow.start([blobs[index] for index in other])
        decoded = self._with_dali([blobs[index] for index in plain])
        if decoded is None:
            rest()
            return self._pillow.decode(blobs)
        ok = np.ones(len(blobs), dtype=bool)
        if not other:
            return DecodedImages(decoded, ok)
        of_pillow = rest()
        pixels = torch.empty((len(blobs), *decoded.shape[1:]), dtype=torch.uint8, device=decoded.device)
        for places, images in ((plain, decoded), (other, of_pillow.pixels)):
            pixels.index_copy_(0, send(torch.tensor(places, dtype=torch.int64), pixels.device), send(images, pixels.device))
        ok[other] = of_pillow.ok
        return DecodedImages(pixels, ok)

    def _with_dali(self, blobs: list[bytes]) -> torch.Tensor | None:
        """Decode with DALI: [n, 3, size, size]; None if DALI failed on one of the images."""
        if not blobs:
            return torch.empty((0, 3, self.transform.size, self.transform.size), dtype=torch.uint8)
        if len(blobs) > self._largest:
            self._largest = 1 << (len(blobs) - 1).bit_length()  # rebuilt only a few times
            self._pipeline = self._build(self._largest)
        pipeline = self._pipeline
        try:
            pipeline.feed_input("encoded", [np.frombuffer(blob, dtype=np.uint8) for blob in blobs])
            if self.resizes:
                for name, values in _dali_arguments(self.transform, blobs).items():
                    pipeline.feed_input(name, values)
            (images,) = pipeline.run()
        except RuntimeError as error:
            logger.warning("DALI could not decode a batch (%s); Pillow decodes it image by image", _reason(error))
            return None
        if self.resizes:
            return torch.from_dlpack(images.as_tensor()).clone()
        return self._pillow.resize([Image.fromarray(images.at(i)) for i in range(len(blobs))])

    def _build(self, size: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self.device.type == "cuda"

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=size,
            num_threads=self.threads,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,  # continues after a failed batch
        )
        def squares() -> Any:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            # jpeg_fancy_upsampling: upsample chroma as on the CPU and as Pillow does. affine: do not pin threads to cores.
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                affine=False,
            )
            if not self.resizes:
                return images
            side = self.transform.size
            given = {name: fn.external_source(name=name, dtype=types.FLOAT, ndim=0) for name in _INPUTS[self.transform.resize]}
            if self.transform.resize != "squash":
                canvas = {name: given[f"canvas_{name}"] for name in ("crop_w", "crop_h", "crop_pos_x", "crop_pos_y")}
                images = fn.crop(images, **canvas, out_of_bounds_policy="pad", fill_values=list(self.transform.fill))
            width, height = given.get("width", side), given.get("height", side)
            images = fn.resize(images, resize_x=width, resize_y=height, interp_type=types.INTERP_CUBIC, antialias=True)
            if self.transform.resize == "crop":
                images = fn.crop(images, crop=(side, side), crop_pos_x=given["crop_pos_x"], crop_pos_y=given["crop_pos_y"])
            return fn.transpose(images, perm=[2, 0, 1])

        pipeline = squares()
        pipeline.build()
        return pipeline

    def close(self) -> None:
        """See `ImageDecoder.close`."""
        self._pipeline = None
        self._pillow.close()


def _reason(error: RuntimeError) -> str:
    """Return the line of DALI's error that says what happened; the others say in which operator and at which line of our code."""
    before, _, after = str(error).partition("encountered:")
    return next((line.strip() for line in (after or before).splitlines() if line.strip()), "no reason given")


_CANVAS = ("canvas_crop_w", "canvas_crop_h", "canvas_crop_pos_x", "canvas_crop_pos_y")
_INPUTS = {"squash": (), "pad": _CANVAS, "crop": (*_CANVAS, "width", "height", "crop_pos_x", "crop_pos_y")}
"""Inputs of the pipeline for each image, by the transform's way of resizing."""


def _dali_arguments(transform: ImageTransform, blobs: list[bytes]) -> dict[str, list[np.ndarray]]:
    """Return the `_INPUTS` of each image: sides in pixels, and positions of boxes in DALI's convention."""
    names = _INPUTS[transform.resize]
    rows = []
    for blob in blobs if names else []:
        with open_image(blob) as image:  # reads only the header
            width, height = image.size
        place = transform.place(width, height)
        left, top, canvas_width, canvas_height = place.canvas
        canvas = (canvas_width, canvas_height, _position(left, width - canvas_width), _position(top, height - canvas_height))
        left, top, size, _ = place.window
        rows.append((*canvas, place.width, place.height, _position(left, place.width - size), _position(top, place.height - size)))
    return {name: [np.array(row[number], dtype=np.float32) for row in rows] for number, name in enumerate(names)}


def _position(begin: int, room: int) -> float:
    """Return where a box begins, as a fraction of the space in which it can move. DALI multiplies the two and rounds."""
    return begin / room if room else 0.0


_JPEG_BEGIN, _JPEG_END, _JPEG_PIXELS = b"\xff\xd8", b"\xff\xd9", b"\xda"
_PNG_DEPTH = 24
"""Position of the bits per channel in a PNG: in its first chunk."""
_BEHIND = 64
"""Number of last bytes in which to look for a JPEG's end marker. Some writers append a few bytes to it, mostly zeros."""


def is_plain(blob: bytes, transform: ImageTransform | None = None) -> bool:
    """Return whether DALI decodes an image as Pillow does: an 8-bit grey or RGB JPEG, PNG or WebP that is neither transparent nor animated,
    and, if it is a JPEG, has an end marker and nothing between its segments.

    A picture that the transform reduces before it pads it is left to Pillow, too.
    """
    if blob.startswith(_JPEG_BEGIN) and (_JPEG_END not in blob[-_BEHIND:] or not _has_regular_segments(blob)):
        return False
    try:
        with open_image(blob) as image:
            usual = image.width * image.height <= MAX_PIXELS and getattr(image, "n_frames", 1) == 1
            usual = usual and (transform is None or transform.reduction(*image.size) == 1)
            usual = usual and not (image.format == "PNG" and blob[_PNG_DEPTH] > 8)  # Pillow calls 16-bit colours RGB, too
            return usual and image.format in ("JPEG", "PNG", "WEBP") and image.mode in ("RGB", "L") and "transparency" not in image.info
    except Exception:  # Pillow cannot open it: the Pillow path counts it as bad
        return False


def _has_regular_segments(jpeg: bytes) -> bool:
    """Return whether the segments of a JPEG follow one another up to its pixels. A segment is 0xFF (once or more), a code, and, after its
    length in two bytes, its contents."""
    at = len(_JPEG_BEGIN)
    while jpeg[at : at + 1] == b"\xff":
        while jpeg[at : at + 1] == b"\xff":
            at += 1
        code, length = jpeg[at : at + 1], int.from_bytes(jpeg[at + 1 : at + 3], "big")
        if code == _JPEG_PIXELS:
            return True
        if b"\xd0" <= code <= b"\xd9" or length < 2:  # a restart, a second begin or an end; or no segment at all
            return False
        at += 1 + length
    return False


def has_dali() -> bool:
    """Return whether DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def make_decoder(
    backend: Literal["auto", "dali", "pillow"], transform: ImageTransform, *, threads: int, device: torch.device
) -> ImageDecoder:
    """Create the decoder named by `data.decoder`. Raises ValueError if DALI is required but not installed."""
    if backend == "dali" and not has_dali():
        raise ValueError("data.decoder is dali, but the package nvidia-dali is not installed: install it or use --data.decoder pillow")
    if backend == "pillow" or not has_dali():
        return PillowDecoder(transform, threads=threads)
    return DaliDecoder(transform, threads=threads, device=device)
