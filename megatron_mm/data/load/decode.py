"""Image decoding: encoded bytes -> uint8 RGB squares.

Every image is squashed to the model's square with antialiased bicubic interpolation (as DFN5B CLIP was trained). What is
transparent lies on white; EXIF orientation is not applied, as img2dataset's output has none. DALI decodes ordinary JPEG, PNG and
WebP; what DALI treats otherwise than Pillow (CMYK, 16-bit, palettes, transparency, GIF) goes to Pillow, as does a batch in which
DALI meets a damaged image, because that ruins a whole DALI pipeline.
"""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from megatron_mm.data.image_formats import MAX_PIXELS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodedImages:
    """A batch of images."""

    pixels: torch.Tensor
    """[n, 3, size, size] uint8; the fill colour where decoding failed."""
    ok: np.ndarray
    """[images] bool: whether each could be decoded."""


class ImageDecoder(Protocol):
    """Decodes batches of encoded images."""

    def decode(self, blobs: Sequence[bytes]) -> DecodedImages:
        """Decode images; one that cannot be decoded costs itself alone."""
        ...

    def close(self) -> None:
        """Stop threads and free memory."""
        ...


class PillowDecoder:
    """Decodes with Pillow in threads."""

    def __init__(self, *, image_size: int, threads: int, fill: tuple[int, int, int]) -> None:
        self.image_size = image_size
        self.fill = np.array(fill, dtype=np.uint8)[:, None, None]
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, blobs: Sequence[bytes]) -> DecodedImages:
        """See `ImageDecoder.decode`."""
        pixels = np.empty((len(blobs), 3, self.image_size, self.image_size), dtype=np.uint8)
        ok = list(self._threads.map(self._one, blobs, pixels))
        return DecodedImages(torch.from_numpy(pixels), np.array(ok, dtype=bool))

    def resize(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Squares [n, 3, size, size] uint8 of RGB images."""
        pixels = np.empty((len(images), 3, self.image_size, self.image_size), dtype=np.uint8)
        list(self._threads.map(self._square, images, pixels))
        return torch.from_numpy(pixels)

    def _square(self, rgb: Image.Image, out: np.ndarray) -> None:
        out[:] = np.asarray(rgb.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)

    def _one(self, blob: bytes, out: np.ndarray) -> bool:
        """Decode into [3, size, size]; False, and the fill colour, where that fails."""
        try:
            with Image.open(io.BytesIO(blob)) as image:
                if image.width * image.height <= MAX_PIXELS:
                    self._square(to_rgb(image), out)
                    return True
        except Exception:  # a decoder may raise anything on damaged input; the caller counts it
            pass
        out[:] = self.fill
        return False

    def close(self) -> None:
        """See `ImageDecoder.close`."""
        self._threads.shutdown()


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image of any mode as 8-bit RGB, on white where it is transparent."""
    if image.mode.startswith("I"):  # 16 and 32 bits: Pillow would saturate, so keep the high byte
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


class DaliDecoder:
    """Decodes with NVIDIA DALI, on the CPU or in the GPU's decoder."""

    def __init__(self, *, image_size: int, threads: int, fill: tuple[int, int, int], device: torch.device) -> None:
        self.image_size = image_size
        self.threads = threads
        self.device = device
        self._pillow = PillowDecoder(image_size=image_size, threads=threads, fill=fill)
        self._pipelines: dict[int, Any] = {}

    def decode(self, blobs: Sequence[bytes]) -> DecodedImages:
        """See `ImageDecoder.decode`."""
        plain = [index for index, blob in enumerate(blobs) if is_plain(blob)]
        other = [index for index in range(len(blobs)) if index not in set(plain)]
        decoded = self._with_dali([blobs[index] for index in plain])
        if decoded is None:
            return self._pillow.decode(blobs)
        rest = self._pillow.decode([blobs[index] for index in other])
        pixels = torch.empty((len(blobs), 3, self.image_size, self.image_size), dtype=torch.uint8, device=decoded.device)
        ok = np.ones(len(blobs), dtype=bool)
        pixels[plain] = decoded
        pixels[other] = rest.pixels.to(decoded.device)
        ok[other] = rest.ok
        return DecodedImages(pixels, ok)

    def _with_dali(self, blobs: list[bytes]) -> torch.Tensor | None:
        """[n, 3, size, size]; None where DALI failed on one of them."""
        if not blobs:
            return torch.empty((0, 3, self.image_size, self.image_size), dtype=torch.uint8)
        size = 1 << (len(blobs) - 1).bit_length()  # pipelines have a largest batch; few sizes mean few pipelines
        try:
            if size not in self._pipelines:
                self._pipelines[size] = self._build(size)
            pipeline = self._pipelines[size]
            pipeline.feed_input("encoded", [np.frombuffer(blob, dtype=np.uint8) for blob in blobs])
            (images,) = pipeline.run()
            if self.device.type == "cuda":
                return torch.from_dlpack(images.as_tensor()).clone()
            return self._pillow.resize([Image.fromarray(images.at(i)) for i in range(len(blobs))])
        except RuntimeError as error:
            logger.warning("DALI could not decode a batch (%s); Pillow decodes it image by image", str(error).splitlines()[0])
            self._pipelines.pop(size, None)
            return None

    def _build(self, size: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self.device.type == "cuda"

        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=size,
            num_threads=self.threads,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=False,
        )
        def squares() -> Any:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False)
            if not on_gpu:
                return images  # Pillow resizes several times faster than DALI does on a CPU
            images = fn.resize(images, size=[self.image_size, self.image_size], interp_type=types.INTERP_CUBIC, antialias=True)
            return fn.transpose(images, perm=[2, 0, 1])

        pipeline = squares()
        pipeline.build()
        return pipeline

    def close(self) -> None:
        """See `ImageDecoder.close`."""
        self._pipelines.clear()
        self._pillow.close()


def is_plain(blob: bytes) -> bool:
    """Whether DALI decodes an image as Pillow does: 8-bit grey or RGB JPEG, PNG or WebP,
    neither transparent nor animated."""
    try:
        with Image.open(io.BytesIO(blob)) as image:
            usual = image.width * image.height <= MAX_PIXELS and getattr(image, "n_frames", 1) == 1
            return usual and image.format in ("JPEG", "PNG", "WEBP") and image.mode in ("RGB", "L") and "transparency" not in image.info
    except Exception:  # not an image that Pillow knows: the Pillow path counts it
        return False


def has_dali() -> bool:
    """Whether DALI's package is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def make_decoder(
    backend: Literal["auto", "dali", "pillow"], *, image_size: int, threads: int, fill: tuple[int, int, int], device: torch.device
) -> ImageDecoder:
    """The decoder that `data.decoder` names. Raises ValueError where DALI is asked for and not installed."""
    if backend == "dali" and not has_dali():
        raise ValueError("data.decoder is dali, but the package nvidia-dali is not installed: install it or use --data.decoder pillow")
    if backend == "pillow" or not has_dali():
        return PillowDecoder(image_size=image_size, threads=threads, fill=fill)
    return DaliDecoder(image_size=image_size, threads=threads, fill=fill, device=device)
