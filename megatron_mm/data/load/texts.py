"""Reads and tokenizes the texts of documents, each once per data-parallel rank.

All processes of a data-parallel rank that embed tokens or compute the loss (the tensor-parallel ranks of the first and the last pipeline
stage) need the same token ids. One of them reads and tokenizes; it sends the ids to the others, 4 bytes per token, when they request the
batch.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.plan.plan import PackedSequence
from megatron_mm.data.sources.index import sample_name
from megatron_mm.data.sources.source import Source
from megatron_mm.data.text.documents import read_items
from megatron_mm.data.text.items import Item, encode_items
from megatron_mm.data.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_KEPT_TOKENS = 16_000_000
"""Maximum number of tokens kept of documents that are cut into several pieces, for their other pieces: 64 MB."""


class TextSharing(Protocol):
    """Shares texts between the processes that need the same ones."""

    @property
    def is_reader(self) -> bool:
        """This process reads for all of the processes."""
        ...

    def share(self, values: np.ndarray) -> None:
        """Send the reader's int32 values to all processes. Each process passes an array of the same size, which is filled in place. All
        processes must call this for the same batches in the same order."""
        ...


class TextReader:
    """Reads and tokenizes documents. Thread-safe."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, image: ImageInput) -> None:
        self._sources, self._tokenizer, self._image = sources, tokenizer, image
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Future[np.ndarray | None]] = OrderedDict()
        self._kept_tokens = 0

    def pieces(self, sequence: PackedSequence) -> list[np.ndarray | None]:
        """Return the int32 token ids of each piece of a sequence; None for a piece whose text cannot be used."""
        window, rows = sequence.window, slice(sequence.first, sequence.last)
        found = []
        columns = (window.sample, window.begin, window.end, window.is_whole)
        for sample, begin, end, is_whole in zip(*(column[rows].tolist() for column in columns), strict=True):
            stream = self._read(sequence.source, sample) if is_whole else self._cut_document(sequence.source, sample)
            found.append(None if stream is None else stream[begin:end])
        return found

    def _cut_document(self, source: int, sample: int) -> np.ndarray | None:
        """Return the ids of a document that is cut into pieces. It is tokenized once for pieces that are requested close together."""
        with self._lock:
            kept = self._kept.get((source, sample))
            mine = kept is None
            if kept is None:
                kept = self._kept[source, sample] = Future()
            else:
                self._kept.move_to_end((source, sample))
        if not mine:
            return kept.result()
        try:
            stream = self._read(source, sample)
            kept.set_result(stream)
        except BaseException as error:
            kept.set_exception(error)
            raise
        with self._lock:
            self._kept_tokens += _size(kept)
            while self._kept_tokens > _KEPT_TOKENS and len(self._kept) > 1 and next(iter(self._kept.values())).done():
                self._kept_tokens -= _size(self._kept.popitem(last=False)[1])
        return stream

    def _read(self, source: int, sample: int) -> np.ndarray | None:
        """Return a document's stream of token ids; None if its text can no longer be used."""
        index = self._sources[source]
        try:
            items = read_items(index, sample)
            return np.array(document_stream(index, sample, self._tokenizer, items, image=self._image), dtype=np.int32)
        except (OSError, ValueError) as error:
            logger.warning("unusable text in %s: %s; it is left out", sample_name(index, sample), error)
            return None


def _size(kept: Future[np.ndarray | None]) -> int:
    stream = kept.result()
    return 0 if stream is None else len(stream)


def document_stream(index: Source, sample: int, tokenizer: Tokenizer, items: list[Item], *, image: ImageInput) -> list[int]:
    """Return a document's token ids: BOS, the items' tokens in reading order, EOS.

    Raises ValueError if the texts differ in number or length from the indexed ones.

    Args:
        items: the document's items, parsed from its bytes. Only its texts are used: positions and sizes of images come from the index.
        image: how images are written as tokens.
    """
    rows = index.items(sample)
    written = encode_items(items, tokenizer)
    if len(written) != len(rows) - rows.num_images:
        raise ValueError(f"{len(written)} texts, but {len(rows) - rows.num_images} in the index")
    left, tiles = iter(written), iter(image.num_tiles(rows.widths, rows.heights, row=sample).tolist())
    stream = [tokenizer.bos_id]
    for is_image, tokens in zip(rows.is_image.tolist(), rows.tokens.tolist(), strict=True):
        if is_image:
            stream += image.ids(tokenizer.special_id, tiles=next(tiles))
            continue
        ids = next(left)
        if len(ids) != tokens:
            raise ValueError(f"{len(ids)} tokens, but {tokens} in the index")
        stream += ids
    return [*stream, tokenizer.eos_id]
