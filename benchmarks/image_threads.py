"""How much of its time the thread that launches kernels loses to decoding threads, which share the interpreter with it.

    .venv/bin/python benchmarks/image_threads.py [--threads 1] [--seconds 2]

The main thread runs small torch operations, as it does when it launches kernels, while other threads decode pictures into tiles with JPEG
artefacts (Mono-InternVL) or into squares (MM1). The baseline copies pixels and writes JPEGs with Pillow's own functions, which hold the
interpreter's lock (`data/image_bytes.py`); it alternates with the current code. `operations` is relative to the main thread alone. Give
fewer threads than there are cores, or the threads compete for the cores as well.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))  # from wherever this is started

import numpy as np
import torch
from PIL import Image

from megatron_mm.data import image_bytes, sub_images, tiling
from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.load import decode, tile_decode
from megatron_mm.families.recipes import get_recipe
from megatron_mm.run.data import image_input


def pictures(count: int) -> list[bytes]:
    """Return JPEGs of 640 x 480 pixels."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88)
        found.append(buffer.getvalue())
    return found


def _plain_jpeg(image: Image.Image, *, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def with_pillows_copies(run: Callable[[], Any]) -> Any:
    """Run with Pillow's own functions: the baseline."""
    with patch.object(tile_decode, "jpeg", _plain_jpeg):
        for module in _READERS:
            module.rgb_pixels = np.asarray  # type: ignore[attr-defined]
        try:
            return run()
        finally:
            for module in _READERS:
                module.rgb_pixels = _RGB_PIXELS  # type: ignore[attr-defined]


_READERS = (decode, image_bytes, tile_decode, sub_images)
_RGB_PIXELS = decode.rgb_pixels


def operations(work: Callable[[], int] | None, *, threads: int, seconds: float) -> tuple[float, float]:
    """Return operations of the main thread per second, and images or tiles that the other threads decode per second."""
    stop, decoded = threading.Event(), []

    def others() -> None:
        while work is not None and not stop.is_set():
            decoded.append(work())

    running = [threading.Thread(target=others) for _ in range(threads)]
    for thread in running:
        thread.start()
    values, count = torch.zeros(64), 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(20):
            values = values + 1
            count += 1
    spent = time.perf_counter() - began
    stop.set()
    for thread in running:
        thread.join()
    return count / spent, sum(decoded) / spent


def tiles_of(image: ImageInput, blobs: Sequence[bytes]) -> Callable[[], int]:
    """Return a function that decodes the pictures into their tiles, as Mono-InternVL sees them."""
    decoder = tile_decode.TileDecoder(image, threads=1)
    assert image.tiling is not None
    columns, rows = tiling.choose_grid(640, 480, image.tiling, image.size)
    count = image.tiling.count((columns, rows))
    encoded = [
        tile_decode.EncodedTiles(blob, width=640, height=480, tiles=range(count), count=count, qualities=(85,) * count) for blob in blobs
    ]
    return lambda: len(decoder.decode(encoded).pixels)


def squares_of(transform: ImageTransform, blobs: Sequence[bytes]) -> Callable[[], int]:
    """Return a function that decodes the pictures into squares, as MM1 sees them."""
    decoder = decode.PillowDecoder(transform, threads=1)
    return lambda: len(decoder.decode(blobs).pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="decoding threads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    blobs = pictures(4)
    cases = {
        "tiles with JPEG artefacts": tiles_of(image_input(get_recipe("mono_internvl_2b_s1_1")), blobs),
        "squares of 378": squares_of(ImageTransform(378, (122, 116, 104)), blobs),
    }
    for name, work in cases.items():
        rows: dict[str, list[tuple[float, float]]] = {"alone": [], "Pillow's copies": [], "now": []}
        for _ in range(given.rounds):
            measure = lambda work=work: operations(work, threads=given.threads, seconds=given.seconds)  # noqa: E731
            rows["alone"].append(operations(None, threads=0, seconds=given.seconds))
            rows["Pillow's copies"].append(with_pillows_copies(measure))
            rows["now"].append(measure())
        alone = statistics.median(rate for rate, _ in rows["alone"])
        for label in ("Pillow's copies", "now"):
            rate, decoded = (statistics.median(values) for values in zip(*rows[label], strict=True))
            print(f"{name}, {label}: operations {rate / alone:.2f} of those alone, {decoded:.0f} decoded per second", flush=True)


if __name__ == "__main__":
    main()
