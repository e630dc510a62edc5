"""`prepare index` and `prepare tokenizer`: read every sample of a data set once, and write down what the plan must know."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_mm.data.prepare.find import check_files, find_sources, shards_of
from megatron_mm.data.prepare.kinds import detect_kind, iterate_samples
from megatron_mm.data.prepare.samples import Losses, Reading, ShardRows, document_of, parse_member, read_shard
from megatron_mm.data.sources.index_files import sampled_digest, write_index
from megatron_mm.data.sources.rows import ITEM, SAMPLE
from megatron_mm.data.sources.shards import BrokenShard, KeyEnds
from megatron_mm.data.sources.source import CHAT_KINDS, Kind
from megatron_mm.data.text.chat import Rendering, chat_template
from megatron_mm.data.text.items import BadDocument, Text
from megatron_mm.data.text.tokenizer import Tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

MAX_REJECTED = 0.05
"""Share of a source's samples, and of its documents' images, that may be lost unless the user allows more."""


@dataclass(frozen=True)
class IndexOptions:
    """What a user says of a source's samples."""

    template: str = "plain"
    """Name of the chat template of conversations and tasks."""
    caption_prompt: str | None = None
    """Makes chats of pairs, too: what asks for the caption. None leaves them an image and its caption."""
    kind: Kind | None = None
    """What the source holds; None asks its samples."""
    key_ends: KeyEnds | None = None
    """Whether keys end at the first or the last dot; None asks the samples."""
    max_rejected: float = MAX_REJECTED
    """Share of samples that may be rejected, and of the shards' bytes that may be damaged."""
    max_dropped_images: float = MAX_REJECTED
    """Share of the images of documents that may be missing or bad."""
    ignore: tuple[str, ...] = ()
    """Patterns of names of files that are left alone though they look like data."""


@dataclass
class SourceSummary:
    """What `prepare index` found in a source."""

    samples: int = 0
    images: int = 0
    text_tokens: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """Samples by reason."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Images and entries that samples lost, by reason."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Files that belong to no sample, by reason."""


@dataclass
class Summary:
    """What `prepare` did, by source."""

    sources: dict[str, SourceSummary]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{'source':24} {'samples':>9} {'images':>9} {'text tokens':>12}  rejected"]
        for name, source in self.sources.items():
            lines.append(f"{name:24} {source.samples:9,} {source.images:9,} {source.text_tokens:12,}  {_listed(source.rejected) or 'none'}")
            for what, counts in (("dropped from samples", source.dropped), ("files skipped", source.skipped)):
                if counts:
                    lines.append(f"{'':56}  {what}: {_listed(counts)}")
        return "\n".join([*lines, f"in {self.seconds:.1f} s"])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()))


@dataclass(frozen=True)
class _ShardTask:
    """A shard to index."""

    number: int
    shard: Path
    tokenizer: Path
    reading: Reading


def prepare_index(
    path: Path,
    *,
    tokenizer: Path | None = None,
    template: str = "plain",
    caption_prompt: str | None = None,
    workers: int = 1,
    options: IndexOptions | None = None,
) -> Summary:
    """Index every source under a path. The result does not depend on the number of workers.

    Raises ValueError where there is no shard, no tokenizer, a source without one usable sample or with too many that are not, files that
    would not be read, or a tokenizer that lacks control tokens of the chat template, or an empty prompt.

    Args:
        template, caption_prompt: of `IndexOptions`, where these are not given.
    """
    options = options or IndexOptions(template=template, caption_prompt=caption_prompt)
    if options.caption_prompt is not None and not options.caption_prompt.strip():
        raise ValueError("the caption prompt is empty: leave --caption-prompt out where nothing asks for captions")
    began = time.monotonic()
    sources = find_sources(path)
    model = tokenizer or next(
        (p / "tokenizer.model" for p in (path, path.parent, path.parent.parent) if (p / "tokenizer.model").is_file()), None
    )
    if model is None:
        raise ValueError(f"no tokenizer.model in {path}: run `megatron-mm prepare tokenizer {path}` first, or give --tokenizer")
    fingerprint = Tokenizer.open(model).fingerprint
    summaries, kinds = {}, set()
    for source in sources:
        shards = shards_of(source)
        check_files(source, shards, ignore=options.ignore)
        reading = _reading(shards, model, options)
        kinds.add(reading.kind)
        summaries[f"{source.parent.name}/{source.name}"] = _index_source(
            source, shards, model, reading=reading, fingerprint=fingerprint, options=options, workers=workers
        )
    if options.caption_prompt is not None and "pairs" not in kinds:
        logger.warning("%s has no source of pairs, for which the caption prompt is: it is not used", path)
    return Summary(summaries, seconds=time.monotonic() - began)


def _reading(shards: Sequence[Path], model: Path, options: IndexOptions) -> Reading:
    """How a source is read. Raises ValueError where that is not clear, or where the tokenizer lacks tokens of the chat template."""
    detected = detect_kind(shards, kind=options.kind, key_ends=options.key_ends)
    prompt = options.caption_prompt if detected.kind == "pairs" else None
    if detected.kind in CHAT_KINDS or prompt is not None:
        _check_template(options.template, model)
    rendering = Rendering(chat_template(options.template), caption_prompt=prompt)
    return Reading(detected.kind, rendering, key_ends=detected.key_ends, images_may_be_left_out=options.kind == "text")


def _index_source(
    source: Path, shards: Sequence[Path], model: Path, *, reading: Reading, fingerprint: str, options: IndexOptions, workers: int
) -> SourceSummary:
    tasks = [_ShardTask(number, shard, model, reading) for number, shard in enumerate(shards)]
    samples, items = [np.zeros(0, SAMPLE)], [np.zeros(0, ITEM)]
    num_samples = num_items = 0
    losses = Losses()
    began = time.monotonic()
    for done, rows in enumerate(_run(tasks, workers), start=1):
        rows.samples["first_item"] += num_items
        samples.append(rows.samples)
        items.append(rows.items)
        num_samples += len(rows.samples)
        num_items += len(rows.items)
        for line in rows.losses.named:
            logger.warning(line)
        losses.add(rows.losses)
        left = (time.monotonic() - began) / done * (len(shards) - done)
        if done % max(1, len(shards) // 10) == 0:
            logger.info("%s: %d of %d shards, %d samples, %.0f s left", source, done, len(shards), num_samples, left)
    sample_rows, item_rows = np.concatenate(samples), np.concatenate(items)
    summary = SourceSummary(
        samples=num_samples,
        images=int(sample_rows["num_images"].sum()),
        text_tokens=int(sample_rows["text_tokens"].sum()),
        rejected=dict(sorted(losses.rejected.items())),
        dropped=dict(sorted(losses.dropped.items())),
        skipped=dict(sorted(losses.skipped.items())),
    )
    check_losses(source, summary, damage=losses.damaged_bytes / max(1, sum(shard.stat().st_size for shard in shards)), options=options)
    are_chats = reading.kind in CHAT_KINDS or reading.rendering.caption_prompt is not None
    meta = {
        "kind": reading.kind,
        "tokenizer": fingerprint,
        "chat_template": options.template if are_chats else None,
        "caption_prompt": reading.rendering.caption_prompt,
        "shards": {shard.relative_to(source).as_posix(): shard.stat().st_size for shard in shards},
        "stamps": {shard.relative_to(source).as_posix(): [shard.stat().st_mtime_ns, sampled_digest(shard)] for shard in shards},
        "rejected": summary.rejected,
        "dropped": summary.dropped,
        "skipped": summary.skipped,
    }
    write_index(source, meta=meta, num_samples=len(sample_rows), num_items=len(item_rows), parts=[(sample_rows, item_rows)])
    return summary


_HINTS = {
    "no image file": "files of a sample must follow one another in the tar (tar --sort=name); --kind says what the source holds",
    "no text file": "files of a sample must follow one another in the tar (tar --sort=name); --kind says what the source holds",
    "image is not in the shard": "images that a document names lie in the same tar, as KEY.NAME",
}
"""What is often the cause of a reason."""


def check_losses(source: Path, summary: SourceSummary, *, damage: float, options: IndexOptions) -> None:
    """Raise ValueError where no sample of a source is usable, or where more is lost than the user allows.

    Args:
        damage: share of the shards' bytes that are damaged.
    """
    rejected = sum(summary.rejected.values())
    if not summary.samples:
        raise ValueError(f"source {source} has no usable sample (rejected: {summary.rejected or 'it is empty'}): repair or remove it")
    reasons = _listed(summary.rejected)
    hint = "".join(f". {reason}: {text}" for reason, text in _HINTS.items() if summary.rejected.get(reason, 0) > rejected / 2)
    share = max(rejected / (rejected + summary.samples), damage)
    if share > options.max_rejected:
        raise ValueError(
            f"{share:.1%} of source {source} would be lost, more than --max-rejected {options.max_rejected:g}: {rejected} samples rejected "
            f"({reasons}), {summary.samples} usable, {damage:.1%} of its bytes damaged. Repair it or allow more with --max-rejected{hint}"
        )
    lost = sum(count for reason, count in summary.dropped.items() if reason != "empty entry")
    if lost > options.max_dropped_images * (lost + summary.images):
        raise ValueError(
            f"{lost} of {lost + summary.images} images of source {source} are missing or bad, more than --max-dropped-images "
            f"{options.max_dropped_images:g} ({_listed(summary.dropped)}): add them, or allow more with --max-dropped-images"
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


def _run(tasks: list[_ShardTask], workers: int) -> Iterator[ShardRows]:
    """The rows of each shard, in order. Raises ValueError where a worker dies, of too little memory for example."""
    if workers <= 1 or len(tasks) == 1:
        yield from map(_index_shard, tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("forkserver")) as pool:
        try:
            yield from pool.map(_index_shard, tasks)
        except BrokenProcessPool:
            raise ValueError(f"a process that indexed {tasks[0].shard.parent} was killed: use fewer than {workers} --workers") from None


def _index_shard(task: _ShardTask) -> ShardRows:
    return read_shard(task.shard, number=task.number, reading=task.reading, tokenizer=Tokenizer.open(task.tokenizer))


def prepare_tokenizer(path: Path, *, out: Path, vocab_size: int) -> str:
    """Train a tokenizer on the training texts under a path. Returns a line to print."""
    sources = [source for source in find_sources(path) if source.parent.name != "heldout"]
    tokenizer = train_tokenizer(_all_texts(sources), out, vocab_size=vocab_size)
    return f"{out}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}"


def _all_texts(sources: list[Path]) -> Iterator[str]:
    plain = Rendering(chat_template("plain"))
    for source in sources:
        shards = shards_of(source)
        detected = detect_kind(shards)
        for shard in shards:
            try:
                for sample in iterate_samples(shard, key_ends=detected.key_ends):
                    try:
                        items = parse_member(detected.kind, document_of(detected.kind, sample), plain)
                        yield from (item.text for item in items if isinstance(item, Text))
                    except BadDocument:
                        continue  # counted when the source is indexed
            except BrokenShard as error:
                logger.warning("%s", error)
