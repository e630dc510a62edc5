"""Other loaders, set up as in their documentation, on the JPEGs of `loader_throughput.py`: batches of uint8 squares.

A loader is measured if its package is installed (`pip install webdataset litdata megatron-energon`). These decode with Pillow, as our CPU
path does, in as many worker processes as our loader has decoding threads. DALI reads and decodes by itself, on as many threads of its CPU
backend.
"""

from __future__ import annotations

import importlib.util
import io
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def square(blob: bytes, *, size: int) -> torch.Tensor:
    """Decode a JPEG to [3, size, size] uint8."""
    with Image.open(io.BytesIO(blob)) as image:
        rgb = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(rgb).transpose(2, 0, 1).copy())


def _batches(loader: Iterable[Any]) -> Iterator[int]:
    while True:
        for batch in loader:
            yield len(batch)


def rate(batches: Iterator[int], *, images: int, warm_up: int) -> float:
    """Return images per second after the first `warm_up` images."""
    done = 0
    while done < warm_up:
        done += next(batches)
    began, done = time.perf_counter(), 0
    while done < images:
        done += next(batches)
    return done / (time.perf_counter() - began)


def webdataset(path: Path, blobs: list[bytes], *, size: int, workers: int, batch: int) -> Iterator[int]:
    """webdataset's pipeline: a shuffle buffer, then decoding in worker processes of torch's DataLoader."""
    import webdataset as wds

    files = sorted(map(str, (path / "train" / "pairs").glob("*.tar")))
    dataset = wds.WebDataset(files, shardshuffle=False, empty_check=False, workersplitter=wds.split_by_worker).shuffle(100)
    dataset = dataset.to_tuple("jpg").map(partial(_first, size=size)).batched(batch, partial=False)
    return _batches(wds.WebLoader(dataset, batch_size=None, num_workers=min(workers, len(files))))


def _first(sample: tuple[bytes], *, size: int) -> torch.Tensor:
    return square(sample[0], size=size)


class _Blobs:
    """Gives litdata's writer the bytes of a picture by its number."""

    def __init__(self, blobs: list[bytes]) -> None:
        self.blobs = blobs

    def __call__(self, number: int) -> dict[str, Any]:
        return {"jpg": self.blobs[number]}


def litdata(path: Path, blobs: list[bytes], *, size: int, workers: int, batch: int) -> Iterator[int]:
    """litdata's loader: chunks streamed from the disk and decoded in worker processes."""
    import litdata as ld

    chunks = path / "litdata"
    if not chunks.exists():
        ld.optimize(_Blobs(blobs), list(range(len(blobs))), str(chunks), num_workers=1, chunk_bytes="16MB")

    return _batches(
        ld.StreamingDataLoader(Squares(str(chunks), shuffle=True, size=size), batch_size=batch, num_workers=workers, drop_last=True)
    )


if importlib.util.find_spec("litdata") is not None:
    from litdata import StreamingDataset

    class Squares(StreamingDataset):  # type: ignore[misc]
        """Pictures of litdata's chunks; defined at module level, because worker processes import it."""

        def __init__(self, folder: str, *, shuffle: bool, size: int) -> None:
            super().__init__(folder, shuffle=shuffle)
            self.size = size

        def __getitem__(self, number: Any) -> torch.Tensor:
            return square(super().__getitem__(number)["jpg"], size=self.size)


def energon(path: Path, blobs: list[bytes], *, size: int, workers: int, batch: int) -> Iterator[int]:
    """megatron-energon's loader on the same tars, which it prepares first; captions are ignored."""
    from megatron.energon import SampleDecoder, WorkerConfig, get_loader, get_train_dataset
    from megatron.energon.flavors import BaseWebdatasetFactory

    folder = path / "energon"
    if not folder.exists():
        folder.mkdir()
        tars = sorted((path / "train" / "pairs").glob("*.tar"))
        for tar in tars:
            (folder / tar.name).symlink_to(tar)
        BaseWebdatasetFactory.prepare_dataset(folder, [tar.name for tar in tars], split_parts_ratio=[("train", 1.0)], workers=1)
        (folder / ".nv-meta" / "dataset.yaml").write_text(_ENERGON)
    workers_of = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = get_train_dataset(
        folder,
        worker_config=workers_of,
        batch_size=batch,
        batch_drop_last=True,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=_energon_encoder(size, SampleDecoder(image_decode="pilrgb")),
    )
    return _batches(get_loader(dataset, worker_config=workers_of))


_ENERGON = """sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: jpg
  caption: txt
"""


def _energon_encoder(side: int, decoding: Any) -> Any:
    from megatron.energon import DefaultTaskEncoder

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
        decoder = decoding

        def encode_sample(self, sample: Any) -> torch.Tensor:
            rgb = sample.image.resize((side, side), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.asarray(rgb).transpose(2, 0, 1).copy())

        def batch(self, samples: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(samples)

        def encode_batch(self, batch: torch.Tensor) -> torch.Tensor:
            return batch

    return Encoder()


def dali(path: Path, blobs: list[bytes], *, size: int, workers: int, batch: int) -> Iterator[int]:
    """DALI's pipeline on the CPU: its own webdataset reader, decoder and resizing."""
    from nvidia.dali import fn, pipeline_def, types

    tars = sorted(map(str, (path / "train" / "pairs").glob("*.tar")))

    @pipeline_def(batch_size=batch, num_threads=workers, device_id=None, prefetch_queue_depth=2)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        jpg = fn.readers.webdataset(paths=tars, ext=["jpg"], missing_component_behavior="error", random_shuffle=True)
        images = fn.decoders.image(jpg, device="cpu", output_type=types.RGB)
        squares = fn.resize(images, size=(size, size), interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.transpose(squares, perm=[2, 0, 1])

    made = pipeline()
    made.build()

    def batches() -> Iterator[int]:
        while True:
            yield int(made.run()[0].as_tensor().shape()[0])

    return batches()


PEERS: dict[str, tuple[str, Callable[..., Iterator[int]]]] = {
    "dali": ("nvidia.dali", dali),
    "webdataset": ("webdataset", webdataset),
    "energon": ("megatron.energon", energon),
    "litdata": ("litdata", litdata),
}
"""For each peer, the module that it needs and the function that yields its batch sizes."""


def installed() -> dict[str, Callable[..., Iterator[int]]]:
    """Return the peers whose packages are installed."""
    return {name: peer for name, (module, peer) in PEERS.items() if _is_there(module)}


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
