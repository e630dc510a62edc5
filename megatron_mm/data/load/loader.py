"""The loader: one process's share of every global batch, planned, read and decoded ahead of the training step.

    plan (integers) -> read byte ranges in threads -> decode -> PackedBatch

A thread stays up to `prefetch_steps` global batches ahead. A process that has neither the encoder nor the loss reads nothing at all: the
plan provides all integers that it needs.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from megatron_mm.config import DataConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.load.assemble import batch_without_texts, put_texts
from megatron_mm.data.load.decode import DecodedImages, make_decoder
from megatron_mm.data.load.texts import TextReader, TextSharing
from megatron_mm.data.load.tile_decode import EncodedTiles, TileDecoder
from megatron_mm.data.plan.layout import Layout, PlacedImage, SourceImage, lay_out, shuffled_images
from megatron_mm.data.plan.plan import GlobalBatch, PackedSequence, Plan, PlanState, encoding_stages
from megatron_mm.data.sources.index import sample_name
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.platform.device import pinned

logger = logging.getLogger(__name__)

_READ_TOGETHER = 4
"""Number of images that one task of a thread reads. More would leave threads idle; fewer would cost more in hand-overs than in reads."""
_FEW = 100
"""Texts or images of a source below which the fraction of bad ones is not checked, because it says nothing yet."""


@dataclass(frozen=True)
class RankView:
    """The part of a batch that this process needs."""

    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    needs_text: bool
    """The process embeds tokens or computes the loss, so its batches have token ids."""
    needs_pixels: bool
    """The process encodes images."""
    encoder_rank: int = 0
    encoder_size: int = 1
    """Pipeline ranks that share the images of each tensor-parallel rank."""

    @property
    def reports_texts(self) -> bool:
        """This process counts bad texts. A text may be read by several processes, but only one counts it; an image is counted by one
        anyway."""
        return self.needs_pixels and self.tensor_rank == 0 and self.encoder_rank == 0


@dataclass(frozen=True)
class StepBatch:
    """This process's part of one global batch."""

    micro_batches: list[PackedBatch]
    plan: GlobalBatch
    bad: dict[str, int]
    """Number of failed texts and images of each source. Each is counted by only one process."""
    sharing_seconds: float = 0.0
    """Part of the wait for this batch in which texts were sent from one process to others, in seconds."""


@dataclass(frozen=True)
class _Shown:
    """An image, or some of its tiles, to be encoded by this process."""

    placed: PlacedImage
    image: SourceImage
    """Image whose pixels are shown: the placed image itself, unless images are shuffled."""
    tiles: range


@dataclass
class _Draft:
    """A micro-batch whose integers are known and whose bytes are being read."""

    layout: Layout
    stages: np.ndarray | None
    """[images] `PackedBatch.image_stages`."""
    texts: list[Future[Any]] = field(default_factory=list)
    """For each sequence, a future of its pieces' token ids; empty if another process reads them."""
    shown: list[_Shown] = field(default_factory=list)
    """Images that this process decodes."""
    blobs: list[Future[Any]] = field(default_factory=list)
    """Futures of the images' bytes, in order; each covers up to `_READ_TOGETHER` images."""
    pixels: Future[Any] | None = None
    """Future of `DecodedImages`; None if this process needs none."""


@dataclass(frozen=True)
class _Read:
    """A global batch whose bytes have been read."""

    plan: GlobalBatch
    layouts: list[Layout]
    micro_batches: list[PackedBatch]
    """Micro-batches, complete with texts unless these are shared between processes."""
    texts: np.ndarray
    """int32: for each micro-batch its token ids, followed by a flag for each piece: 1 if its text could be used. Not filled if another
    process reads the texts."""
    bad: Counter[str]


@dataclass
class _Tally:
    """Numbers of texts or images that this process read, and of bad ones among them, by source."""

    read: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)

    def check(self, what: str, *, limit: float) -> None:
        """Raise ValueError if too large a fraction of a source is bad."""
        for name, count in self.bad.items():
            if self.read[name] >= _FEW and count > limit * self.read[name]:
                raise ValueError(
                    f"{count} of {self.read[name]} {what} of source {name} failed, more than data.max_bad_fraction {limit}: "
                    "repair the source, or raise the limit"
                )


def _lengths(layouts: list[Layout]) -> list[int]:
    """Return the length of each micro-batch's part of `_Read.texts`."""
    return [len(layout.loss_mask) + len(layout.pieces) for layout in layouts]


class Loader:
    """An endless iterator of StepBatch."""

    def __init__(
        self,
        plan: Plan,
        *,
        tokenizer: Tokenizer,
        data: DataConfig,
        view: RankView,
        start: PlanState,
        device: torch.device,
        sharing: TextSharing | None = None,
    ) -> None:
        """Start reading at the cursor `start`.

        Raises ValueError if an index was made with another tokenizer, or if the tokenizer lacks a token with which images are written.

        Args:
            sharing: connects processes that need the same texts; None if this process reads all its texts itself.
        """
        for index in plan.indexes:
            if index.tokenizer != tokenizer.fingerprint:
                raise ValueError(
                    f"source {index.location} was indexed with tokenizer {index.tokenizer}, "
                    f"but {data.tokenizer_path} is {tokenizer.fingerprint}: "
                    "index it again with `megatron-mm prepare index`, or use the tokenizer it was indexed with"
                )
        self.plan = plan
        self.tokenizer = tokenizer
        self.config = data
        self.view = view
        self.state = start
        self.image = plan.image
        self._sharing = sharing if view.needs_text else None
        self._reads_texts = view.needs_text and (self._sharing is None or self._sharing.is_reader)
        self._reader = TextReader(plan.indexes, tokenizer, plan.image)
        plan.image.ids(tokenizer.special_id, tiles=1)  # raises here and not in a thread
        self._texts, self._seen = _Tally(), _Tally()
        self._readers = ThreadPoolExecutor(data.read_threads, thread_name_prefix="read")
        self._device = device
        self._pin = device.type == "cuda"
        self._decoder = make_decoder(data.decoder, plan.image.transform, threads=data.decode_threads, device=device)
        self._tile_decoder = TileDecoder(plan.image, threads=data.decode_threads)
        if data.decoder == "dali" and not self._whole_images:
            logger.warning("data.decoder dali is ignored: Pillow decodes images that are cut into tiles or get JPEG artefacts")
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="decoding")  # one micro-batch after another, without a pause
        self._ready: queue.Queue[_Read | BaseException] = queue.Queue(maxsize=data.prefetch_steps)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start,), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        """The next global batch. Raises ValueError if too many samples of a source fail."""
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            self._ready.put(ready)
            raise ready
        sharing = 0.0
        if self._sharing is not None:  # here, because all processes request the same batch; their background threads run independently
            began = time.perf_counter()
            self._sharing.share(ready.texts)
            sharing = time.perf_counter() - began
            self._put_texts(ready)
        self.state = ready.plan.next_state
        return StepBatch(ready.micro_batches, ready.plan, dict(ready.bad), sharing_seconds=sharing)

    @property
    def _whole_images(self) -> bool:
        """Each image becomes one square, without JPEG artefacts added."""
        return self.image.is_one_square and self.config.jpeg_quality is None

    def close(self) -> None:
        """Stop the threads and wait for them."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)
        self._decoding.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        self._decoder.close()
        self._tile_decoder.close()

    # ------------------------------------------------------------------------------------------------ background thread

    def _work(self, state: PlanState) -> None:
        try:
            if self._pin:
                torch.cuda.set_device(self._device)  # each thread has its own current device, which is the first one by default
            ahead = self._begin(state)
            while not self._stopped.is_set():
                batch, drafts = ahead
                ahead = self._begin(batch.next_state)  # the next batch is read while this one is decoded
                self._put(self._finish(batch, drafts))
        except BaseException as error:
            self._put(error)

    def _put(self, item: _Read | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _begin(self, state: PlanState) -> tuple[GlobalBatch, list[_Draft]]:
        """Plan a global batch and start reading and decoding this process's part of it."""
        batch = self.plan.batch(state)
        drafts = [self._draft(sequences) for sequences in batch.micro_batches_of(self.view.data_rank, self.view.data_size)]
        if self.view.encoder_size > 1:
            found = encoding_stages([draft.layout.image_owners for draft in drafts], stages=self.view.encoder_size)
            for draft, stages in zip(drafts, found, strict=True):
                draft.stages = stages
        if self.view.needs_pixels:
            substitute = shuffled_images(self.plan, batch) if self.config.images == "shuffled" else {}
            for draft in drafts:
                draft.shown = self._mine(draft, substitute)
                if self.config.images != "blank":
                    for first in range(0, len(draft.shown), _READ_TOGETHER):
                        together = [shown.image for shown in draft.shown[first : first + _READ_TOGETHER]]
                        draft.blobs.append(self._readers.submit(self._blobs, together))
            for draft in drafts:
                draft.pixels = self._decoding.submit(self._pixels, draft)
        return batch, drafts

    def _draft(self, sequences: list[PackedSequence]) -> _Draft:
        draft = _Draft(lay_out(self.plan, sequences, tensor_size=self.view.tensor_size), stages=None)
        if self._reads_texts:
            draft.texts = [self._readers.submit(self._reader.pieces, sequence) for sequence in sequences]
        return draft

    def _mine(self, draft: _Draft, substitute: dict[tuple[int, int, int], SourceImage]) -> list[_Shown]:
        """Return the images, or ranges of their tiles, of a micro-batch that this process encodes.

        Args:
            substitute: images to show in place of others, by the replaced image's key.
        """
        mine, first, shown = draft.layout.image_owners == self.view.tensor_rank, 0, []
        if draft.stages is not None:
            mine &= draft.stages == self.view.encoder_rank
        for placed in draft.layout.images:
            image = placed.image
            tiles = np.flatnonzero(mine[first : first + image.tiles])  # consecutive
            if len(tiles):
                shown.append(_Shown(placed, substitute.get(image.key, image), range(int(tiles[0]), int(tiles[-1]) + 1)))
            first += image.tiles
        return shown

    def _blobs(self, images: list[SourceImage]) -> list[bytes]:
        return [self._blob(image) for image in images]

    def _blob(self, image: SourceImage) -> bytes:
        index = self.plan.indexes[image.source]
        try:
            return index.image(image.sample, image.number)
        except (OSError, ValueError) as error:
            logger.warning("unreadable image in %s: %s", sample_name(index, image.sample), error)
            return b""

    # ------------------------------------------------------------------------------------------------------- assembling

    def _finish(self, batch: GlobalBatch, drafts: list[_Draft]) -> _Read:
        """Wait for a global batch to be read and decoded. Raises ValueError if too many samples of a source are bad."""
        bad = Counter[str]()
        layouts = [draft.layout for draft in drafts]
        sizes = _lengths(layouts)
        texts = np.zeros(sum(sizes), dtype=np.int32)
        micro_batches: list[PackedBatch] = []
        for draft, part in zip(drafts, np.split(texts, np.cumsum(sizes)[:-1]), strict=True):
            if self._reads_texts:
                self._collect_texts(draft, part, bad)
            decoded: DecodedImages | None = draft.pixels.result() if draft.pixels is not None else None
            if decoded is not None:
                self._tally_images(draft.shown, decoded.ok, bad)
            pixels = decoded.pixels if decoded is not None else None
            micro = batch_without_texts(draft.layout, pixels=pixels, stages=draft.stages, pad_id=self.tokenizer.pad_id)
            micro_batches.append(micro.pinned() if self._pin else micro)
        self._texts.check("texts", limit=self.config.max_bad_fraction)
        self._seen.check("images", limit=self.config.max_bad_fraction)
        read = _Read(batch, layouts, micro_batches, texts, bad)
        if self._sharing is None:
            self._put_texts(read)
        return read

    def _collect_texts(self, draft: _Draft, out: np.ndarray, bad: Counter[str]) -> None:
        """Write the token ids of a micro-batch into `out`, followed by a flag for each piece: 1 if its text could be used."""
        ids, usable = np.split(out, [len(draft.layout.loss_mask)])
        ids[:] = self.tokenizer.pad_id
        found = [piece for future in draft.texts for piece in future.result()]
        for number, (piece, stream) in enumerate(zip(draft.layout.pieces, found, strict=True)):
            name = self.plan.indexes[piece.source].name
            self._texts.read[name] += 1
            usable[number] = stream is not None
            if stream is None:
                self._texts.bad[name] += 1
                bad[name] += self.view.reports_texts
            else:
                ids[piece.place : piece.stop] = stream

    def _put_texts(self, read: _Read) -> None:
        """Write the texts that were read into the micro-batches."""
        if not self.view.needs_text:
            return
        parts = np.split(read.texts, np.cumsum(_lengths(read.layouts))[:-1])
        for batch, layout, texts in zip(read.micro_batches, read.layouts, parts, strict=True):
            put_texts(batch, layout, texts, pad_id=self.tokenizer.pad_id)

    def _pixels(self, draft: _Draft) -> DecodedImages:
        """Decode this process's images of a micro-batch. Also pins them here, in the decoding thread, because they take longest to pin."""
        decoded = self._decoded(draft)
        if not self._pin:
            return decoded
        torch.cuda.set_device(self._device)  # as in `_work`
        return replace(decoded, pixels=pinned(decoded.pixels))

    def _decoded(self, draft: _Draft) -> DecodedImages:
        if self.config.images == "blank":
            colour = torch.tensor(self.image.fill, dtype=torch.uint8)[None, :, None, None]
            count = sum(len(shown.tiles) for shown in draft.shown)
            return DecodedImages(colour.expand(count, 3, self.image.size, self.image.size), np.ones(len(draft.shown), dtype=bool))
        blobs = [blob for future in draft.blobs for blob in future.result()]
        if self._whole_images:
            return self._decoder.decode(blobs)
        return self._tile_decoder.decode([self._encoded(shown, blob) for shown, blob in zip(draft.shown, blobs, strict=True)])

    def _encoded(self, shown: _Shown, blob: bytes) -> EncodedTiles:
        """Return an encoded image with the planned size of its position and a random JPEG quality for each tile. The quality does not
        depend on which process decodes the tile."""
        place, tiles, qualities = shown.placed.image, shown.tiles, ()
        if self.config.jpeg_quality is not None:
            least, most = self.config.jpeg_quality
            drawn = np.random.default_rng(shown.placed.seed).integers(least, most, size=place.tiles, endpoint=True)
            qualities = tuple(drawn[tiles.start : tiles.stop].tolist())
        return EncodedTiles(blob, width=place.width, height=place.height, tiles=tiles, count=place.tiles, qualities=qualities)

    def _tally_images(self, decoded: list[_Shown], ok: np.ndarray, bad: Counter[str]) -> None:
        for shown, good in zip(decoded, ok.tolist(), strict=True):
            if shown.tiles.start:
                continue  # the process that encodes the first tile counts it
            image = shown.image
            name = self.plan.indexes[image.source].name
            self._seen.read[name] += 1
            if not good:
                self._seen.bad[name] += 1
                bad[name] += 1
                what = sample_name(self.plan.indexes[image.source], image.sample)
                logger.warning("undecodable image in %s: it is replaced with a blank one", what)
