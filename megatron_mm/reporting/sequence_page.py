"""One HTML page of packed micro-batches as a model sees them: tokens, documents, the loss mask, images and their tiles.

The page is self-contained (pictures are data URIs; there are no scripts, and no fonts or styles from elsewhere), so it can be mailed, and
opened without a network.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image

from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.text.tokenizer import Tokenizer

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #1a1a1a; background: #fff }
h2 { margin-top: 2em; border-bottom: 2px solid #888 }
.document { border: 1px solid #bbb; border-radius: 6px; margin: .8em 0; padding: .5em .8em }
.document.padding { background: #eee; color: #666 }
.facts { color: #555; font-size: 12px; margin-bottom: .4em }
.token { white-space: pre-wrap; border-radius: 3px; padding: 1px 0; border-right: 1px solid #ddd }
.token.learned { background: #c9efcf }
.token.special { color: #8a2be2; font-family: monospace; font-size: 12px }
.image { display: inline-block; vertical-align: middle; margin: 4px; text-align: center; font-size: 11px; color: #555 }
.image img { display: block; border: 1px solid #888; image-rendering: auto }
"""


@dataclass(frozen=True)
class PageNotes:
    """Information on the page around the micro-batches."""

    title: str
    sources: Sequence[str]
    """Names of the mixture's sources, in the order of `PackedBatch.source_ids`."""
    image_tokens: int
    """Number of positions for the features of an image, or of a tile."""
    bad: dict[str, int]
    """Number of texts and images that could not be read, by source."""
    max_image_pixels: int = 224
    """Maximum side of a shown picture, pixels; larger ones are reduced."""


def sequence_page(batches: Sequence[PackedBatch], tokenizer: Tokenizer, notes: PageNotes) -> str:
    """The page of some micro-batches. This process must have all of their pixels."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(notes.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(notes.title)}</h1>",
        '<p><span class="token learned">green</span>: the model is taught to predict this token (its loss mask is 1). '
        '<span class="token special">violet</span>: a control token. A box is a document: no token attends to another box. '
        "Pictures show the pixels that the image tower receives.</p>",
    ]
    if notes.bad:
        parts.append(f"<p>Could not be read: {html.escape(str(notes.bad))}; they are replaced by blanks or padding.</p>")
    for number, batch in enumerate(batches):
        parts += _micro_batch(batch, number, tokenizer, notes)
    return "\n".join([*parts, "</body></html>", ""])


def _micro_batch(batch: PackedBatch, number: int, tokenizer: Tokenizer, notes: PageNotes) -> list[str]:
    supervised, tokens = int((batch.loss_mask > 0).sum()), int(batch.is_token.sum())
    bounds = batch.cu_seqlens.tolist()
    parts = [
        f'<h2 id="batch-{number}">Micro-batch {number}</h2>',
        f'<p class="facts">{tokens:,} tokens and {batch.num_tokens - tokens:,} of padding in {len(bounds) - 1} documents, '
        f"{batch.num_images} images or tiles, {supervised:,} tokens in the loss</p>",
    ]
    pictures = dict(zip(batch.image_starts.tolist(), _pictures(batch, notes), strict=True))
    for begin, end in pairwise(bounds):
        parts.append(_document(batch, begin, end, pictures, tokenizer, notes))
    return parts


def _document(batch: PackedBatch, begin: int, end: int, pictures: dict[int, str], tokenizer: Tokenizer, notes: PageNotes) -> str:
    if end > begin and not bool(batch.is_token[begin]):
        return f'<div class="document padding"><div class="facts">{end - begin} tokens of padding</div></div>'
    learned = np.zeros(end - begin, dtype=bool)  # the loss mask is at the position before the predicted token
    learned[1:] = batch.loss_mask[begin : end - 1].numpy() > 0
    ids, spans, place = batch.token_ids[begin:end].tolist(), [], begin
    while place < end:
        if place in pictures:
            spans.append(pictures[place])
            place += max(1, notes.image_tokens)
            continue
        spans.append(_token(ids[place - begin], bool(learned[place - begin]), tokenizer))
        place += 1
    source = notes.sources[int(batch.source_ids[begin])]
    facts = f"{html.escape(source)}, positions {begin:,} to {end - 1:,}: {end - begin:,} tokens, {int(learned.sum()):,} in the loss"
    return f'<div class="document"><div class="facts">{facts}</div><div>{"".join(spans)}</div></div>'


def _token(token: int, learned: bool, tokenizer: Tokenizer) -> str:
    text, is_special = tokenizer.piece(token)
    text = "\u21b5" if text == "<0x0A>" else text
    classes = " ".join(["token", *(["learned"] if learned else []), *(["special"] if is_special else [])])
    return f'<span class="{classes}" title="{token}">{html.escape(text)}</span>'


def _pictures(batch: PackedBatch, notes: PageNotes) -> list[str]:
    if batch.pixels is None or len(batch.pixels) != batch.num_images:
        raise ValueError(
            f"{batch.num_images} images, but pixels of {0 if batch.pixels is None else len(batch.pixels)}: view with one process"
        )
    return [_picture(pixels, number, notes) for number, pixels in enumerate(batch.pixels)]


def _picture(pixels: torch.Tensor, number: int, notes: PageNotes) -> str:
    """An image of [3, H, W] uint8 pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    buffer = io.BytesIO()
    image.thumbnail((notes.max_image_pixels, notes.max_image_pixels))
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    side = max(64, image.width)
    return (
        f'<span class="image"><img width="{side}" alt="image {number}" src="data:image/png;base64,{data}">'
        f"{pixels.shape[2]} x {pixels.shape[1]} px, {notes.image_tokens} tokens</span>"
    )
