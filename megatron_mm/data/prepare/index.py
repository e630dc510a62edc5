"""`prepare index` and `prepare tokenizer`: read every sample of a data set once, and write down what the plan must know."""

from __future__ import annotations

import io
import logging
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_mm.data.image_formats import MAX_PIXELS
from megatron_mm.data.sources.index_files import sampled_digest, write_index
from megatron_mm.data.sources.rows import ITEM, SAMPLE
from megatron_mm.data.sources.shards import BrokenShard, Member, WebSample, iterate_jsonl, iterate_tar
from megatron_mm.data.sources.source import CHAT_KINDS, Kind
from megatron_mm.data.text.chat import Rendering, chat_template
from megatron_mm.data.text.documents import OWN_IMAGE, chat_kind, parse_document
from megatron_mm.data.text.items import BadDocument, ImageReference, Item, Text, encode_items
from megatron_mm.data.text.tokenizer import Tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_NAMED_REJECTS = 3

# Pillow warns of what is rejected or treated here anyway. Not catch_warnings around each image: that is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass
class SourceSummary:
    """What `prepare index` found in a source."""

    samples: int = 0
    images: int = 0
    text_tokens: int = 0
    rejected: dict[str, int] = field(default_factory=dict)


@dataclass
class Summary:
    """What `prepare` did, by source."""

    sources: dict[str, SourceSummary]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{'source':24} {'samples':>9} {'images':>9} {'text tokens':>12}  rejected"]
        for name, source in self.sources.items():
            rejected = ", ".join(f"{reason}: {count}" for reason, count in sorted(source.rejected.items())) or "none"
            lines.append(f"{name:24} {source.samples:9,} {source.images:9,} {source.text_tokens:12,}  {rejected}")
        return "\n".join([*lines, f"in {self.seconds:.1f} s"])


@dataclass(frozen=True)
class _ShardTask:
    """A shard to index."""

    kind: Kind
    number: int
    shard: Path
    tokenizer: Path
    rendering: Rendering


@dataclass
class _ShardRows:
    """What a shard holds."""

    samples: np.ndarray
    """[samples] of SAMPLE; `first_item` counts from the shard's first item."""
    items: np.ndarray
    """[items] of ITEM."""
    rejected: Counter[str]
    named: list[str]
    """Lines about rejected samples, the first few of each reason."""


def find_sources(path: Path) -> list[Path]:
    """The source folders of a data set, of one split, or the path itself. Raises ValueError where there is none."""
    if not path.is_dir():
        raise ValueError(f"data path {path} does not exist")
    for pattern in (".", "*", "*/*"):
        found = (
            sorted({p.resolve() for p in path.glob(pattern) if p.is_dir() and _shards(p)})
            if pattern != "."
            else [path] * bool(_shards(path))
        )
        if found:
            return found
    raise ValueError(f"data path {path} has no .tar or .jsonl shards, nor folders (split/source) that have")


def _shards(source: Path) -> list[Path]:
    return sorted([*source.glob("*.tar"), *source.glob("*.jsonl")])


def prepare_index(
    path: Path, *, tokenizer: Path | None = None, template: str = "plain", caption_prompt: str | None = None, workers: int = 1
) -> Summary:
    """Index every source under a path. The result does not depend on the number of workers.

    Raises ValueError where there is no shard, no tokenizer, a source without one usable sample, or a tokenizer that lacks control
    tokens of the chat template, or an empty prompt.

    Args:
        template: the chat template of conversations and tasks, by name.
        caption_prompt: makes chats of pairs, too: what asks for the caption. None leaves them an image and its caption.
    """
    if caption_prompt is not None and not caption_prompt.strip():
        raise ValueError("the caption prompt is empty: leave --caption-prompt out where nothing asks for captions")
    began = time.monotonic()
    sources = find_sources(path)
    model = tokenizer or next(
        (p / "tokenizer.model" for p in (path, path.parent, path.parent.parent) if (p / "tokenizer.model").is_file()), None
    )
    if model is None:
        raise ValueError(f"no tokenizer.model in {path}: run `megatron-mm prepare tokenizer {path}` first, or give --tokenizer")
    fingerprint = Tokenizer.open(model).fingerprint
    summaries = {}
    for source in sources:
        summaries[f"{source.parent.name}/{source.name}"] = _index_source(
            source, model, fingerprint=fingerprint, template=template, caption_prompt=caption_prompt, workers=workers
        )
    if caption_prompt is not None and not any(detect_kind(_shards(source)) == "pairs" for source in sources):
        logger.warning("%s has no source of pairs, for which the caption prompt is: it is not used", path)
    return Summary(summaries, seconds=time.monotonic() - began)


def _index_source(source: Path, model: Path, *, fingerprint: str, template: str, caption_prompt: str | None, workers: int) -> SourceSummary:
    shards = _shards(source)
    kind = detect_kind(shards)
    prompt = caption_prompt if kind == "pairs" else None
    are_chats = kind in CHAT_KINDS or prompt is not None
    if are_chats:
        _check_template(template, model)
    rendering = Rendering(chat_template(template), caption_prompt=prompt)
    tasks = [_ShardTask(kind, number, shard, model, rendering) for number, shard in enumerate(shards)]
    samples, items = [np.zeros(0, SAMPLE)], [np.zeros(0, ITEM)]
    num_samples = num_items = 0
    rejected = Counter[str]()
    began = time.monotonic()
    for done, rows in enumerate(_run(tasks, workers), start=1):
        rows.samples["first_item"] += num_items
        samples.append(rows.samples)
        items.append(rows.items)
        num_samples += len(rows.samples)
        num_items += len(rows.items)
        rejected.update(rows.rejected)
        for line in rows.named:
            logger.warning(line)
        left = (time.monotonic() - began) / done * (len(shards) - done)
        if done % max(1, len(shards) // 10) == 0:
            logger.info("%s: %d of %d shards, %d samples, %.0f s left", source, done, len(shards), num_samples, left)
    if not num_samples:
        raise ValueError(f"source {source} has no usable sample (rejected: {dict(rejected) or 'it is empty'}): repair or remove it")
    sample_rows, item_rows = np.concatenate(samples), np.concatenate(items)
    meta = {
        "kind": kind,
        "tokenizer": fingerprint,
        "chat_template": template if are_chats else None,
        "caption_prompt": prompt,
        "shards": {shard.name: shard.stat().st_size for shard in shards},
        "stamps": {shard.name: [shard.stat().st_mtime_ns, sampled_digest(shard)] for shard in shards},
        "rejected": dict(sorted(rejected.items())),
    }
    write_index(source, meta=meta, num_samples=len(sample_rows), num_items=len(item_rows), parts=[(sample_rows, item_rows)])
    return SourceSummary(
        samples=num_samples,
        images=int(sample_rows["num_images"].sum()),
        text_tokens=int(sample_rows["text_tokens"].sum()),
        rejected=dict(rejected),
    )


def _check_template(name: str, model: Path) -> None:
    """Raise ValueError where the tokenizer lacks a control token of a chat template."""
    tokenizer, lacking = Tokenizer.open(model), []
    for token in chat_template(name).control_tokens:
        try:
            tokenizer.special_id(token)
        except ValueError:
            lacking.append(token)
    if lacking:
        raise ValueError(
            f"chat template {name} needs the control tokens {', '.join(lacking)}, which {model} lacks: "
            "choose another --chat-template, or give the --tokenizer of the model that it belongs to"
        )


def _run(tasks: list[_ShardTask], workers: int) -> Iterator[_ShardRows]:
    """The rows of each shard, in order. Raises ValueError where a worker dies, of too little memory for example."""
    if workers <= 1 or len(tasks) == 1:
        yield from map(_index_shard, tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("forkserver")) as pool:
        try:
            yield from pool.map(_index_shard, tasks)
        except BrokenProcessPool:
            raise ValueError(f"a process that indexed {tasks[0].shard.parent} was killed: use fewer than {workers} --workers") from None


def detect_kind(shards: list[Path]) -> Kind:
    """What a source holds, by its first readable sample."""
    for shard in shards:
        if shard.suffix == ".jsonl":
            line = next(iterate_jsonl(shard), None)
            return (chat_kind(line.data) if line is not None else None) or "text"
        try:
            sample = next(iterate_tar(shard), None)
        except BrokenShard:
            continue
        if sample is not None:
            extensions = sample.members
            chat = chat_kind(extensions["json"].data) if "json" in extensions else None
            if chat is not None:
                return chat
            if any(extension in IMAGE_EXTENSIONS for extension in extensions):
                return "pairs"
            return "interleaved" if any(e.rpartition(".")[2] in IMAGE_EXTENSIONS for e in extensions) or _has_list(sample) else "text"
    return "text"


def _has_list(sample: WebSample) -> bool:
    document = sample.members.get("json")
    try:
        return document is not None and bool(parse_document("interleaved", document.data, is_json=True))
    except BadDocument:
        return False


def _index_shard(task: _ShardTask) -> _ShardRows:
    tokenizer, shard = Tokenizer.open(task.tokenizer), task.shard
    samples: list[tuple[int, ...]] = []
    items: list[tuple[int, ...]] = []
    rejected, named = Counter[str](), []
    try:
        for sample in _samples(shard):
            try:
                document, found = _check(task.kind, sample, tokenizer, task.rendering)
            except BadDocument as reason:
                rejected[str(reason)] += 1
                if rejected[str(reason)] <= _NAMED_REJECTS:
                    named.append(f"rejected {shard}: {sample.key.lstrip('/')}: {reason}")
                continue
            num_images, tokens = sum(item[0] for item in found), sum(item[2] for item in found)
            samples.append((task.number, document.offset, len(document.data), len(items), len(found), tokens, num_images))
            items += found
    except BrokenShard as error:
        rejected["broken shard"] += 1
        named.append(f"{error}; the {len(samples)} samples before are used")
    return _ShardRows(np.array(samples, SAMPLE), np.array(items, ITEM), rejected, named)


def _samples(shard: Path) -> Iterator[WebSample]:
    if shard.suffix == ".jsonl":
        return (WebSample(key=line.name, members={"json": line}) for line in iterate_jsonl(shard))
    return iterate_tar(shard)


def _check(kind: Kind, sample: WebSample, tokenizer: Tokenizer, rendering: Rendering) -> tuple[Member, list[tuple[int, ...]]]:
    """The document of a sample and its items' rows. Raises BadDocument with the reason to reject it."""
    document = _document(kind, sample)
    first = [_pair_image(sample)] if kind == "pairs" and rendering.caption_prompt is None else []
    items = _parse(kind, document, rendering)
    images = iter([_referenced(sample, item) for item in items if isinstance(item, ImageReference)])
    written = iter(encode_items(items, tokenizer))
    rows = [_image_row(image, counted=True) for image in first]
    for item in items:
        if isinstance(item, ImageReference):
            rows.append(_image_row(next(images), counted=item.counted))
        else:
            rows.append((0, int(item.counted), len(next(written)), 0, 0, 0, 0))
    return document, rows


def _image_row(image: Member, *, counted: bool) -> tuple[int, ...]:
    width, height = check_image(image.data)
    return 1, int(counted), 0, image.offset, len(image.data), width, height


def _document(kind: Kind, sample: WebSample) -> Member:
    for extension in ("txt", "json") if kind in ("pairs", "text") else ("json",):
        if extension in sample.members:
            return sample.members[extension]
    raise BadDocument("no text file")


def _parse(kind: Kind, document: Member, rendering: Rendering) -> list[Item]:
    return parse_document(kind, document.data, is_json=not document.name.lower().endswith(".txt"), rendering=rendering)


def _pair_image(sample: WebSample) -> Member:
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    raise BadDocument("no image file")


def _referenced(sample: WebSample, reference: ImageReference) -> Member:
    if reference.extension == OWN_IMAGE:
        return _pair_image(sample)
    if reference.extension not in sample.members:
        raise BadDocument("image is not in the shard")
    return sample.members[reference.extension]


def check_image(data: bytes) -> tuple[int, int]:
    """Width and height of an image that decodes to its last row. Raises BadDocument where it does not, or is too large."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadDocument(f"image of more than {MAX_PIXELS // 10**6} megapixels")
            image.load()
    except BadDocument:
        raise
    except Image.DecompressionBombError:
        raise BadDocument(f"image of more than {MAX_PIXELS // 10**6} megapixels") from None
    except Exception:
        raise BadDocument("image does not decode") from None
    return width, height


def prepare_tokenizer(path: Path, *, out: Path, vocab_size: int) -> str:
    """Train a tokenizer on the training texts under a path. Returns a line to print."""
    sources = [source for source in find_sources(path) if source.parent.name != "heldout"]
    tokenizer = train_tokenizer(_all_texts(sources), out, vocab_size=vocab_size)
    return f"{out}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}"


def _all_texts(sources: list[Path]) -> Iterator[str]:
    plain = Rendering(chat_template("plain"))
    for source in sources:
        shards = _shards(source)
        kind = detect_kind(shards)
        for shard in shards:
            try:
                for sample in _samples(shard):
                    try:
                        yield from (item.text for item in _parse(kind, _document(kind, sample), plain) if isinstance(item, Text))
                    except BadDocument:
                        continue  # counted when the source is indexed
            except BrokenShard as error:
                logger.warning("%s", error)
