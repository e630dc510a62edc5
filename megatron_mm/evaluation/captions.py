"""Held-out images and their captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_mm.data.documents import read_texts
from megatron_mm.data.index import SourceIndex
from megatron_mm.data.shards import read_range
from megatron_mm.data.tile_decode import EncodedTiles, TileDecoder
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.evaluation.generation import Prompt
from megatron_mm.models.base import ImageInput


@dataclass(frozen=True)
class CaptionSample:
    """An image with what it shows and what the model says of it."""

    image: np.ndarray
    """[H, W, 3] uint8, as the model sees it."""
    true: str
    generated: str


@dataclass(frozen=True)
class CaptionTask:
    """An image to caption."""

    prompt: Prompt
    true: str

    def answered(self, generated: str) -> CaptionSample:
        whole = self.prompt.pixels[-1]  # of several tiles the last one is the thumbnail
        return CaptionSample(image=whole.permute(1, 2, 0).numpy(), true=self.true, generated=generated)


def caption_tasks(index: SourceIndex, tokenizer: Tokenizer, image: ImageInput, *, count: int) -> list[CaptionTask]:
    """The first `count` pairs of a source as prompts: BOS and the image."""
    decoder = TileDecoder(image, threads=1)
    tasks = []
    for sample in index.samples[:count]:
        path = index.shard_path(int(sample["shard"]))
        items = index.items[sample["first_item"] : sample["first_item"] + sample["num_items"]]
        picture = items[items["is_image"] == 1][:1]
        tiles = int(image.num_tiles(picture["width"], picture["height"])[0])
        offset, size, width, height = (int(picture[name][0]) for name in ("offset", "size", "width", "height"))
        wanted = EncodedTiles(read_range(path, offset, size), width=width, height=height, tiles=range(tiles))
        pixels = decoder.decode([wanted]).pixels
        texts = read_texts(index.kind, read_range(path, int(sample["offset"]), int(sample["size"])))
        ids = [tokenizer.bos_id, *image.ids(tokenizer.special_id, tiles=tiles)]
        starts = [1 + len(image.before) + image.tokens * tile for tile in range(tiles)]
        tasks.append(CaptionTask(Prompt(ids=ids, image_starts=starts, pixels=torch.as_tensor(pixels)), true=" ".join(texts)))
    decoder.close()
    return tasks
