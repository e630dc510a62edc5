"""Compare DALI on a GPU with its CPU backend and Pillow: pixels, damaged images, images per second, and decoding during training.

    python benchmarks/gpu_dali.py [--device cpu] [--threads 16]

Each line is printed as soon as it is known. Rates are ratios to Pillow on as many threads, measured in turn in the same process. `--device
cpu` runs everything with DALI's CPU backend instead of the GPU, which tests this program itself.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from megatron_mm.config import DataConfig
from megatron_mm.data.image_transform import ImageTransform, Resize
from megatron_mm.data.load.decode import DaliDecoder, ImageDecoder, PillowDecoder, make_decoder

CPU = torch.device("cpu")
FILL = (122, 116, 104)
TRANSFORMS: tuple[tuple[Resize, int], ...] = (("squash", 378), ("crop", 224), ("pad", 336))
PARTS = ("pixels", "damaged", "training", "loader", "rates")
BATCH = 28
"""Images of a micro-batch of two sequences."""


def picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Draw smooth shapes with coloured edges and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 40), max(2, width // 40), 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    smooth[height // 3 : height // 2, width // 4 : width // 2] = (220, 30, 30)
    return Image.fromarray((smooth + rng.integers(-8, 8, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def kinds() -> dict[str, list[bytes]]:
    """Return three encoded pictures of each kind: landscape, portrait with odd sides, smaller than the target square."""
    pictures = [picture(640, 480), picture(333, 501, seed=1), picture(90, 120, seed=2)]
    return {
        "JPEG 4:2:0": [encoded(image, "JPEG", quality=88, subsampling=2) for image in pictures],
        "JPEG 4:2:2": [encoded(image, "JPEG", quality=88, subsampling=1) for image in pictures],
        "JPEG 4:4:4": [encoded(image, "JPEG", quality=88, subsampling=0) for image in pictures],
        "JPEG progressive": [encoded(image, "JPEG", quality=88, progressive=True) for image in pictures],
        "JPEG grey": [encoded(image.convert("L"), "JPEG", quality=88) for image in pictures],
        "PNG": [encoded(image, "PNG", compress_level=1) for image in pictures],
        "PNG grey": [encoded(image.convert("L"), "PNG", compress_level=1) for image in pictures],
        "WebP": [encoded(image, "WEBP", quality=88, method=0) for image in pictures],
        "PNG palette (Pillow)": [encoded(image.quantize(64), "PNG") for image in pictures],
        "JPEG CMYK (Pillow)": [encoded(image.convert("CMYK"), "JPEG") for image in pictures],
    }


def compare_pixels(device: torch.device, *, threads: int) -> None:
    print("\nlevels of 255 between DALI and Pillow: mean, 99.9th percentile, largest")
    for resize, size in TRANSFORMS:
        transform = ImageTransform(size, fill=FILL, resize=resize)
        pillow = PillowDecoder(transform, threads=threads)
        decoders: dict[str, ImageDecoder] = {f"DALI on {device.type}": DaliDecoder(transform, threads=threads, device=device)}
        if device.type != "cpu":
            decoders["DALI on cpu"] = DaliDecoder(transform, threads=threads, device=CPU)
        decoders["DALI on cpu, resizing"] = DaliDecoder(transform, threads=threads, device=CPU, resizes=True)
        for kind, blobs in kinds().items():
            expected = pillow.decode(blobs).pixels.float()
            for name, decoder in decoders.items():
                found = decoder.decode(blobs)
                assert found.ok.all(), (kind, name)
                difference = (found.pixels.cpu().float() - expected).abs().flatten().sort().values
                mean, often, most = difference.mean(), difference[int(0.999 * len(difference))], difference[-1]
                place = found.pixels.device.type
                print(f"{resize} {size}  {kind:22} {name:22} {mean:7.3f} {often:5.0f} {most:5.0f}   on {place}", flush=True)
        pillow.close()
        for decoder in decoders.values():
            decoder.close()


def damaged(device: torch.device, *, threads: int) -> None:
    """Show that a damaged image loses only itself, and that DALI decodes the next batch again."""
    print("\na damaged image among eight")
    decoder = DaliDecoder(ImageTransform(378, fill=FILL), threads=threads, device=device)
    whole = [encoded(picture(320, 240, seed=n), "JPEG", quality=88) for n in range(8)]
    for name, blob in (
        ("cut", whole[3][: len(whole[3]) // 2]),
        ("no picture", b"<html>not found</html>"),
        ("noise inside", noisy(whole[3])),
    ):
        began = time.perf_counter()
        found = decoder.decode([*whole[:3], blob, *whole[4:]])
        took = time.perf_counter() - began
        after = decoder.decode(whole)
        place = after.pixels.device.type
        print(
            f"{name:14} usable {found.ok.astype(int).tolist()} in {1e3 * took:.0f} ms; then {int(after.ok.sum())} of 8, on {place}",
            flush=True,
        )
    decoder.close()


def noisy(blob: bytes) -> bytes:
    middle = len(blob) // 2
    return blob[:middle] + bytes(np.random.default_rng(0).integers(0, 255, 400, dtype=np.uint8)) + blob[middle + 400 :]


def decoders_of(device: torch.device, transform: ImageTransform, *, threads: int) -> dict[str, Callable[[], ImageDecoder]]:
    """Return a constructor of each decoder, Pillow first."""
    made: dict[str, Callable[[], ImageDecoder]] = {
        "Pillow": lambda: PillowDecoder(transform, threads=threads),
        "DALI on cpu": lambda: DaliDecoder(transform, threads=threads, device=CPU),
    }
    if device.type != "cpu":
        made[f"DALI on {device.type}"] = lambda: DaliDecoder(transform, threads=threads, device=device)
    return made


def rates(device: torch.device, *, threads: int, rounds: int, seconds: float, sets: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield images per second of each decoder alone, in batches of `BATCH` from one thread; pixels stay where they are.

    Args:
        sets: number of sets of pictures; None: all.
    """
    pictures = [picture(640, 480, seed=n) for n in range(BATCH)]
    made_of: dict[str, Callable[[], list[bytes]]] = {
        "JPEG 640 x 480": lambda: [encoded(image, "JPEG", quality=88) for image in pictures],
        "JPEG 1600 x 1200": lambda: [encoded(image.resize((1600, 1200)), "JPEG", quality=88) for image in pictures],
        "PNG 640 x 480": lambda: [encoded(image, "PNG", compress_level=1) for image in pictures],
        "nine of ten JPEG": lambda: [encoded(image, "JPEG" if n % 10 else "PNG") for n, image in enumerate(pictures)],
    }
    for name in list(made_of)[:sets]:
        blobs = made_of[name]()
        made = {kind: make() for kind, make in decoders_of(device, ImageTransform(378, fill=FILL), threads=threads).items()}
        found: dict[str, list[float]] = {kind: [] for kind in made}
        for decoder in made.values():
            decoder.decode(blobs)
        for _ in range(rounds):
            for kind, decoder in made.items():
                found[kind].append(repeated(decoder, blobs, seconds=seconds))
        pillow = statistics.median(found["Pillow"])
        size = sum(map(len, blobs)) / len(blobs) / 1e3
        for kind, values in found.items():
            middle = statistics.median(values)
            yield {
                "case": f"{name} ({size:.0f} kB), {kind}, {threads} threads",
                "images_per_s": round(middle),
                "speed": round(middle / pillow, 3),
            }
        for decoder in made.values():
            decoder.close()


def repeated(decoder: ImageDecoder, blobs: list[bytes], *, seconds: float) -> float:
    """Return the decoding rate in images per second."""
    began, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - began) < seconds:
        done += len(decoder.decode(blobs).ok)
    return done / taken


def whole_loader(device: torch.device, *, threads: int, rounds: int) -> None:
    from loader_throughput import loader_rate, make_data  # beside this program

    print(f"\nimages per second of the whole loader, JPEGs of 640 x 480, {threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        make_data(path, images=256, size=(640, 480))
        backends: tuple[tuple[str, Literal["pillow", "dali"], torch.device], ...] = (
            ("Pillow", "pillow", CPU),
            ("DALI on cpu", "dali", CPU),
            *((("Pillow to GPU", "pillow", device), (f"DALI on {device.type}", "dali", device)) if device.type != "cpu" else ()),
        )
        found: dict[str, list[float]] = {name: [] for name, _, _ in backends}
        for _ in range(rounds):
            for name, backend, place in backends:
                data = DataConfig(path=path, decoder=backend, decode_threads=threads, read_threads=4)
                found[name].append(loader_rate(path, data, image_size=378, steps=20, device=place))
        for name, values in found.items():
            middle = statistics.median(values)
            print(f"{name:14} {middle:8.0f} images/s   {middle / statistics.median(found['Pillow']):5.2f} of Pillow", flush=True)


def beside_training(device: torch.device, *, threads: int) -> Iterator[dict[str, Any]]:
    """Time batches while another stream is busy with matrix products (8192 x 8192 x 8192 in bf16), and the products while batches are
    decoded. Needs a GPU."""
    blobs = [encoded(picture(640, 480, seed=n), "JPEG", quality=88) for n in range(BATCH)]
    left = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    kinds: tuple[Literal["dali", "pillow"], ...] = ("dali", "pillow")
    for kind in kinds:
        decoder = make_decoder(kind, ImageTransform(378, fill=FILL), threads=threads, device=device)
        decoder.decode(blobs)

        products(left, 20)
        torch.cuda.synchronize()
        idle = [timed(decoder, blobs) for _ in range(10)]
        begin, end = products(left, 200)
        end.synchronize()
        alone = begin.elapsed_time(end)
        begin, end = products(left, 200)
        busy = []
        while not end.query():
            busy.append(timed(decoder, blobs))
        beside = begin.elapsed_time(end)
        yield {
            "case": f"a batch of {BATCH} by {kind}, beside a stream of matrix products",
            "ms": round(1e3 * statistics.median(busy), 1),
            "ms_on_idle_gpu": round(1e3 * statistics.median(idle), 1),
            "batches": len(busy),
            "products_ms": round(beside, 1),
            "products_ms_alone": round(alone, 1),
        }
        decoder.close()


def products(left: torch.Tensor, count: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Queue `count` matrix products; return the events before and after them."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        torch.mm(left, left)
    end.record()
    return begin, end


def timed(decoder: ImageDecoder, blobs: list[bytes]) -> float:
    """Return the seconds that one batch takes."""
    began = time.perf_counter()
    decoder.decode(blobs)
    return time.perf_counter() - began


def show(rows: Iterator[dict[str, Any]]) -> None:
    """Print a line for each row."""
    print()
    for row in rows:
        print(row["case"], *(f"{name} {value}" for name, value in row.items() if name != "case"), sep="  ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1), help="decoding threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each rate, in turn (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each rate (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if given.device == "cuda" else CPU
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{name}, torch {torch.__version__}, {os.cpu_count()} cores")
    work: dict[str, Callable[[], None]] = {
        "pixels": lambda: compare_pixels(device, threads=given.threads),
        "damaged": lambda: damaged(device, threads=given.threads),
        "training": lambda: show(
            beside_training(device, threads=given.threads) if device.type == "cuda" else iter(({"case": "needs a GPU"},))
        ),
        "loader": lambda: whole_loader(device, threads=given.threads, rounds=given.rounds),
        "rates": lambda: show(rates(device, threads=given.threads, rounds=given.rounds, seconds=given.seconds)),
    }
    for part in given.parts:
        work[part]()


if __name__ == "__main__":
    main()
