"""Held-out images and their captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_mm.data.decode import PillowDecoder
from megatron_mm.data.documents import read_texts
from megatron_mm.data.index import SourceIndex
from megatron_mm.data.shards import read_range
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
        return CaptionSample(image=self.prompt.pixels[0].permute(1, 2, 0).numpy(), true=self.true, generated=generated)


def caption_tasks(index: SourceIndex, tokenizer: Tokenizer, image: ImageInput, *, count: int) -> list[CaptionTask]:
    """The first `count` pairs of a source as prompts: BOS and the image."""
    decoder = PillowDecoder(image_size=image.size, threads=1, fill=image.fill)
    tasks = []
    for sample in index.samples[:count]:
        path = index.shard_path(int(sample["shard"]))
        items = index.items[sample["first_item"] : sample["first_item"] + sample["num_items"]]
        picture = items[items["is_image"] == 1][0]
        pixels = decoder.decode([read_range(path, int(picture["offset"]), int(picture["size"]))]).pixels
        texts = read_texts(index.kind, read_range(path, int(sample["offset"]), int(sample["size"])))
        ids = [tokenizer.bos_id, *image.ids(tokenizer.special_id)]
        starts = [1 + len(image.before)]
        tasks.append(CaptionTask(Prompt(ids=ids, image_starts=starts, pixels=torch.as_tensor(pixels)), true=" ".join(texts)))
    decoder.close()
    return tasks
