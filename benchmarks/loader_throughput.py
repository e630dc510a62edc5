"""Images per second of the whole loader, compared with bare decoding and resizing of the same bytes on the same number of threads.

    .venv/bin/python benchmarks/loader_throughput.py [--threads 2] [--decoder pillow]

The loader plans, reads byte ranges, decodes and lays out batches; the baseline only decodes bytes that are already in memory.
Other loaders that are installed are measured in turn with it (`loader_peers.py`): DALI's own pipeline against the loader with DALI, the
others, which decode with Pillow, against the loader with Pillow. Pictures are JPEGs of photographic size; all resize to --image-size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from loader_peers import installed, rate
from PIL import Image

from megatron_mm.config import DataConfig
from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.load.decode import has_dali, make_decoder
from megatron_mm.data.load.loader import Loader, RankView
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.plan import Plan
from megatron_mm.data.prepare.index import prepare_index
from megatron_mm.data.sources.index import open_split
from megatron_mm.data.sources.shards import TarWriter
from megatron_mm.data.text.tokenizer import Tokenizer, train_tokenizer

SHARDS = 4
FILL = (122, 116, 104)
CPU = torch.device("cpu")


def make_data(path: Path, *, images: int, size: tuple[int, int]) -> None:
    """Write a data set of noise over gradients, which compresses about as badly as photographs."""
    import io

    rng = np.random.default_rng(0)
    (path / "train" / "pairs").mkdir(parents=True)
    tars = [TarWriter(path / "train" / "pairs" / f"{number}.tar") for number in range(SHARDS)]
    ramp = np.linspace(0, 200, size[0])[None, :, None] + np.linspace(0, 40, size[1])[:, None, None]
    for number in range(images):
        coarse = rng.integers(0, 60, (size[1] // 8, size[0] // 8, 3)).repeat(8, axis=0).repeat(8, axis=1)
        pixels = (ramp[: coarse.shape[0], : coarse.shape[1]] + coarse).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
        tars[number % SHARDS].add(f"{number:05d}.jpg", buffer.getvalue())
        tars[number % SHARDS].add(f"{number:05d}.txt", f"picture number {number} of {images}".encode())
    for tar in tars:
        tar.close()
    train_tokenizer([f"picture number {n} of {images}" for n in range(images)], path / "tokenizer.model", vocab_size=320)
    prepare_index(path)


def loader_rate(path: Path, data: DataConfig, *, image_size: int, steps: int, device: torch.device = CPU) -> float:
    """Return images per second over `steps` batches, after the batches decoded ahead."""
    tokenizer = Tokenizer.open(data.tokenizer_path)
    plan = Plan(
        open_split(path, "train", sources=["pairs"]),
        weights=[1.0],
        limits=Limits(1024, 16),
        image=ImageInput(size=image_size, fill=FILL, tokens=64),
        packing_window=256,
        seed=0,
        global_batch_size=4,
        micro_batch_size=1,
    )
    view = RankView(data_rank=0, data_size=1, tensor_rank=0, tensor_size=1, needs_text=True, needs_pixels=True)
    loader = Loader(plan, tokenizer=tokenizer, data=data, view=view, start=plan.initial_state(), device=device)
    for _ in range(data.prefetch_steps + 1):  # decoded before the clock starts
        next(loader)
    began, images = time.perf_counter(), 0
    for _ in range(steps):
        images += sum(batch.num_images for batch in next(loader).micro_batches)
    seconds = time.perf_counter() - began
    loader.close()
    return images / seconds


def bare_rate(blobs: list[bytes], data: DataConfig, *, image_size: int, batch: int, images: int, device: torch.device = CPU) -> float:
    """Return images per second of the decoder alone, in batches of `batch` images."""
    decoder = make_decoder(data.decoder, ImageTransform(image_size, fill=FILL), threads=data.decode_threads, device=device)
    decoder.decode(blobs[:batch])
    began, done = time.perf_counter(), 0
    while done < images:
        first = done % (len(blobs) - batch + 1)
        done += len(decoder.decode(blobs[first : first + batch]).ok)
    seconds = time.perf_counter() - began
    decoder.close()
    return done / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="decoding threads (default: %(default)s)")
    parser.add_argument("--images", type=int, default=256, help="pictures of the data set (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=378, help="pixels (default: %(default)s)")
    parser.add_argument("--decoder", choices=["pillow", "dali"], action="append", help="(default: all that are installed)")
    parser.add_argument("--rounds", type=int, default=3, help="loader and baseline in turn, so many times (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        make_data(path, images=arguments.images, size=(640, 480))
        (index,) = open_split(path, "train", sources=["pairs"])
        blobs = [index.image(row, 0) for row in range(len(index))]
        print(f"{len(blobs)} JPEGs of 640 x 480 pixels, {sum(map(len, blobs)) / len(blobs) / 1e3:.0f} kB each; {arguments.threads} threads")
        for backend in arguments.decoder or ["pillow", *(["dali"] if has_dali() else [])]:
            data = DataConfig(path=path, decoder=backend, decode_threads=arguments.threads, read_threads=2)
            rounds = []
            for _ in range(arguments.rounds):
                ours = loader_rate(path, replace(data), image_size=arguments.image_size, steps=10)
                rounds.append((ours, bare_rate(blobs, data, image_size=arguments.image_size, batch=14, images=10 * 4 * 14)))
            ratios = sorted(ours / bare for ours, bare in rounds)  # of consecutive runs, because the load of other programs varies
            loader, bare = (statistics.median(rates) for rates in zip(*rounds, strict=True))
            print(
                f"{backend:8} loader {loader:7.0f} images/s   bare decode + resize {bare:7.0f} images/s   "
                f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )
        for name, peer in installed().items():
            backend = "dali" if name == "dali" else "pillow"
            data = DataConfig(path=path, decoder=backend, decode_threads=arguments.threads, read_threads=2)
            rounds = []
            for _ in range(arguments.rounds):
                batches = peer(path, blobs, size=arguments.image_size, workers=arguments.threads, batch=14)
                theirs = rate(batches, images=10 * 4 * 14, warm_up=8 * 14)
                del batches  # and its worker processes
                rounds.append((loader_rate(path, data, image_size=arguments.image_size, steps=10), theirs))
            ratios = sorted(ours / theirs for ours, theirs in rounds)
            loader, theirs = (statistics.median(rates) for rates in zip(*rounds, strict=True))
            print(
                f"{backend:8} loader {loader:7.0f} images/s   {name:20} {theirs:7.0f} images/s   "
                f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
