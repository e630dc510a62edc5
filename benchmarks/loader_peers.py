"""Other loaders, as their documentation shows them, on the same JPEGs for `loader_throughput.py`: squares of uint8 in batches.

Measured where the package is installed (`pip install webdataset litdata`). They decode with Pillow, as this program's CPU path does,
in as many worker processes as our loader has decoding threads. megatron-energon is not measured.
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
    """A JPEG as [3, size, size] uint8."""
    with Image.open(io.BytesIO(blob)) as image:
        rgb = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(rgb).transpose(2, 0, 1).copy())


def _batches(loader: Iterable[Any]) -> Iterator[int]:
    while True:
        for batch in loader:
            yield len(batch)


def rate(batches: Iterator[int], *, images: int, warm_up: int) -> float:
    """Images per second, the first `warm_up` not counted."""
    done = 0
    while done < warm_up:
        done += next(batches)
    began, done = time.perf_counter(), 0
    while done < images:
        done += next(batches)
    return done / (time.perf_counter() - began)


def webdataset(path: Path, blobs: list[bytes], *, size: int, workers: int, batch: int) -> Iterator[int]:
    """webdataset's pipeline: shuffle buffer, decode in worker processes of torch's DataLoader."""
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
    """litdata's chunks, streamed from the disk, decoded in worker processes."""
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
        """Pictures of litdata's chunks; at the top of a module, because worker processes import it."""

        def __init__(self, folder: str, *, shuffle: bool, size: int) -> None:
            super().__init__(folder, shuffle=shuffle)
            self.size = size

        def __getitem__(self, number: Any) -> torch.Tensor:
            return square(super().__getitem__(number)["jpg"], size=self.size)


PEERS: dict[str, Callable[..., Iterator[int]]] = {"webdataset": webdataset, "litdata": litdata}


def installed() -> dict[str, Callable[..., Iterator[int]]]:
    """The peers that can be measured here."""
    return {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(name) is not None}
