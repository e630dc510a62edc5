"""Samples per second of `prepare index`, compared with a plain walk of the same tars, and its memory for few and for many shards.

    .venv/bin/python benchmarks/prepare_rate.py [--samples 2000] [--shards 1000 10000]

The walk reads every member of every tar with Python's tarfile and does nothing with it; both use one process. Pictures are JPEGs of 640 x
480, noise over gradients. To measure memory, three tiny shards are linked under many names; a process of its own indexes each number of
shards, twice, the second time with nothing changed. Two more processes open the index, one as a run's first process does (it checks each
shard) and one as all others do, and plan a batch. Peak memory is per process; the memory of its imports alone is also printed.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import resource
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.plan import Plan
from megatron_mm.data.prepare.index import IndexOptions, prepare_index
from megatron_mm.data.sources.index import open_index
from megatron_mm.data.sources.shards import TarWriter
from megatron_mm.data.text.tokenizer import train_tokenizer


def write_tar(path: Path, *, samples: int, size: tuple[int, int]) -> None:
    """Write a shard of pairs."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    tar = TarWriter(path)
    ramp = np.linspace(0, 200, size[0])[None, :, None] + np.linspace(0, 40, size[1])[:, None, None]
    for number in range(samples):
        coarse = rng.integers(0, 60, (-(-size[1] // 8), -(-size[0] // 8), 3)).repeat(8, axis=0).repeat(8, axis=1)[: size[1], : size[0]]
        buffer = io.BytesIO()
        Image.fromarray((ramp + coarse).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
        tar.add(f"{number:06d}.jpg", buffer.getvalue())
        tar.add(f"{number:06d}.txt", f"picture number {number} of {samples}, a grey ramp with noise".encode())
    tar.close()


def walk(path: Path) -> None:
    """Baseline: read every member of a tar."""
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                file.read()


def index_of_many(path: Path, connection: object) -> None:
    """Index twice; send the seconds of both and this process's peak memory in MB."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        prepare_index(path)
        seconds.append(time.perf_counter() - began)
    connection.send((*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))  # type: ignore[attr-defined]


def open_of_many(path: Path, check: bool, connection: object) -> None:
    """Open an index and plan a batch from it; send the seconds of both, and this process's peak memory before and after, in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    index = open_index(path / "train" / "pairs", check=check)
    opened = time.perf_counter()
    plan = Plan(
        [index], weights=[1.0], limits=Limits(4096, 16), image=ImageInput(size=378, fill=(0, 0, 0), tokens=144), packing_window=4096,
        seed=0, global_batch_size=512, micro_batch_size=1,
    )  # fmt: skip
    plan.batch(plan.initial_state())
    planned = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    connection.send((opened - began, planned - opened, before, peak))  # type: ignore[attr-defined]


def in_a_process(function: Callable[..., None], *arguments: object) -> tuple[float, ...]:
    """Call a function in a process of its own; return what it sends."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=function, args=(*arguments, theirs))
    process.start()
    sent: tuple[float, ...] = ours.recv()
    process.join()
    return sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="pictures for the rate (default: %(default)s)")
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10000], help="for the memory (default: 1000 10000)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rate"
        shard = path / "train" / "pairs" / "0.tar"
        write_tar(shard, samples=arguments.samples, size=(640, 480))
        model = Path(folder) / "tokenizer.model"
        train_tokenizer([f"picture number {n}, a grey ramp with noise" for n in range(500)], model, vocab_size=320)
        began = time.perf_counter()
        walk(shard)
        plain = arguments.samples / (time.perf_counter() - began)
        print(f"plain tar walk      {plain:9.0f} samples/s")
        for verify in ("full", "sample", "header"):
            shutil.rmtree(path / "train" / "pairs" / "index", ignore_errors=True)
            began = time.perf_counter()
            prepare_index(path, tokenizer=model, options=IndexOptions(verify=verify))  # type: ignore[arg-type]
            ours = arguments.samples / (time.perf_counter() - began)
            print(f"prepare, {verify:10} {ours:9.0f} samples/s   ratio {ours / plain:.3f}", flush=True)
        for count in arguments.shards:
            many = Path(folder) / f"many{count}"
            tiny = [Path(folder) / f"{number}.tar" for number in range(3)]
            for number, tar in enumerate(tiny):
                write_tar(tar, samples=number + 1, size=(16 + number, 16))
            (many / "train" / "pairs").mkdir(parents=True)
            shutil.copy(model, many / "tokenizer.model")
            for number in range(count):
                os.link(tiny[number % 3], many / "train" / "pairs" / f"{number:06d}.tar")
            first, again, peak = in_a_process(index_of_many, many)
            samples, meta = len(open_index(many / "train" / "pairs")), (many / "train" / "pairs" / "index" / "meta.json").stat().st_size
            print(
                f"{count:7} shards, {samples} samples: {first:.1f} s ({1e3 * first / count:.2f} ms a shard), again with nothing changed "
                f"{again:.1f} s; peak memory {peak:.0f} MB; meta.json {meta} bytes",
                flush=True,
            )
            for who, check in (("first process", True), ("any other", False)):
                opened, planned, before, peak = in_a_process(open_of_many, many, check)
                print(
                    f"{'':7} {who:14} opens in {1e3 * opened:8.1f} ms, plans a batch in {1e3 * planned:6.1f} ms; "
                    f"peak memory {peak:.0f} MB (imports alone {before:.0f})",
                    flush=True,
                )
            shutil.rmtree(many)


if __name__ == "__main__":
    main()
