"""Held-out images and their captions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.load.texts import document_stream
from megatron_mm.data.load.tile_decode import EncodedTiles, TileDecoder
from megatron_mm.data.plan.packing import document_images, supervised_tokens
from megatron_mm.data.sources.source import Source
from megatron_mm.data.text.documents import read_items
from megatron_mm.data.text.items import Text
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.evaluation.generation import Prompt


@dataclass(frozen=True)
class CaptionSample:
    """An image with its true and its generated caption."""

    image: np.ndarray
    """[H, W, 3] uint8, as the model sees it."""
    true: str
    generated: str


@dataclass(frozen=True)
class CaptionTask:
    """An image to caption."""

    prompt: Prompt
    true: str
    whole: int
    """Index of the tile that shows the whole image."""

    def answered(self, generated: str) -> CaptionSample:
        assert self.prompt.pixels is not None
        whole = self.prompt.pixels[self.whole]
        return CaptionSample(image=whole.permute(1, 2, 0).numpy(), true=self.true, generated=generated)


def caption_tasks(index: Source, tokenizer: Tokenizer, image: ImageInput, *, count: int) -> list[CaptionTask]:
    """Make prompts of the first `count` pairs of a source. A prompt is everything before the caption: BOS, the image, and the text prompt
    with which the pair was indexed, if any."""
    decoder = TileDecoder(image, threads=1)
    tasks = [_caption_task(index, row, tokenizer, image, decoder) for row in range(min(count, len(index)))]
    decoder.close()
    return tasks


def _caption_task(index: Source, row: int, tokenizer: Tokenizer, image: ImageInput, decoder: TileDecoder) -> CaptionTask:
    items = read_items(index, row)
    stream = document_stream(index, row, tokenizer, items, image=image)
    found = document_images(index, row, image)
    begin, end, tiles = int(found.starts[0]), int(found.ends[0]), int(found.tiles[0])
    first_counted = int(supervised_tokens(index, row, image)[end:].argmax())
    sizes = index.items(row)
    wanted = EncodedTiles(index.image(row, 0), width=int(sizes.widths[0]), height=int(sizes.heights[0]), tiles=range(tiles), count=tiles)
    prompt = Prompt(
        ids=stream[: end + first_counted],
        image_starts=[begin + len(image.before) + image.tokens * tile for tile in range(tiles)],
        pixels=decoder.decode([wanted]).pixels,
    )
    return CaptionTask(
        prompt, true="".join(item.text for item in items if isinstance(item, Text) and item.counted).strip(), whole=image.whole_tile
    )
