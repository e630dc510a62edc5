"""`prepare index`: read every sample of a data set once, and record what the plan needs."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_mm.data.prepare.find import absolute, check_files, find_sources, say_energon_split, shards_of
from megatron_mm.data.prepare.kinds import detect_kind, first_shards
from megatron_mm.data.prepare.mirror import Mirror, mirrored
from megatron_mm.data.prepare.row_files import RowHeader, current_header, losses_of, read_header, read_rows, recipe_of, row_file_of
from megatron_mm.data.prepare.samples import VERIFY, Losses, Reading, Verify
from megatron_mm.data.prepare.shard_jobs import Progress, ShardJob, check_choice, choose_shards, run_jobs
from megatron_mm.data.prepare.summary import SourceSummary, Summary, check_losses
from megatron_mm.data.sources.index import SHARDS_CHECKED_AT_ONCE
from megatron_mm.data.sources.index_files import META, write_index
from megatron_mm.data.sources.shard_table import Shard, ShardTable
from megatron_mm.data.sources.shards import KeyEnds
from megatron_mm.data.sources.source import CHAT_KINDS, Kind
from megatron_mm.data.text.chat import Rendering, chat_template
from megatron_mm.data.text.conversations import IMAGE_MARK
from megatron_mm.data.text.keys import USUAL, Keys
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.platform.local_copies import address_of

logger = logging.getLogger(__name__)

MAX_REJECTED = 0.05
"""Maximum fraction of a source's samples, and of its documents' images, that may be lost unless the user allows more."""


@dataclass(frozen=True)
class IndexOptions:
    """The user's settings for indexing."""

    template: str = "plain"
    """Name of the chat template of conversations and tasks."""
    caption_prompt: str | None = None
    """Renders pairs as chats, too, with this question to which the caption is the answer. None leaves them as an image and its caption."""
    kind: Kind | None = None
    """Kind of the source; None detects it from the samples."""
    key_ends: KeyEnds | None = None
    """Whether keys end at the first or the last dot; None detects it from the samples."""
    max_rejected: float = MAX_REJECTED
    """Maximum fraction of samples that may be rejected, and of the shards' bytes that may be damaged."""
    max_dropped_images: float = MAX_REJECTED
    """Maximum fraction of the images of documents that may be missing or bad."""
    keys: Keys = USUAL
    """Names of fields and files."""
    ignore: tuple[str, ...] = ()
    """Name patterns of files to ignore although they look like data."""
    verify: Verify = "full"
    """How much of each image is decoded."""
    index_dir: Path | None = None
    """Folder in which indexes are written, as INDEX_DIR/SPLIT/SOURCE; None writes each into its source's folder."""


def prepare_index(
    path: Path,
    *,
    tokenizer: Path | None = None,
    template: str = "plain",
    caption_prompt: str | None = None,
    workers: int = 1,
    options: IndexOptions | None = None,
    shards: str | None = None,
    merge_only: bool = False,
) -> Summary:
    """Index every source under a path, or under the address of an object store (`mirror`).

    The result does not depend on the number of workers. Shards that were already read in the same way, and are unchanged since, are not
    read again.

    Raises ValueError if there is no shard or no tokenizer, if a source has no usable sample or too many unusable ones, if files would not
    be read, if the tokenizer lacks control tokens of the chat template, or if the caption prompt is empty.

    Args:
        template, caption_prompt: used in place of `IndexOptions` if `options` is None.
        shards: read only these shards of each source (`choose_shards`), and do not write an index; `merge_only` writes it later.
        merge_only: write the index without reading shards. Raises ValueError if a shard has not been read.
    """
    options = options or IndexOptions(template=template, caption_prompt=caption_prompt)
    if options.caption_prompt is not None and not options.caption_prompt.strip():
        raise ValueError("the caption prompt is empty: leave out --caption-prompt if pairs should not become chats")
    if IMAGE_MARK in (options.caption_prompt or ""):
        raise ValueError(
            f"the caption prompt {options.caption_prompt!r} has an {IMAGE_MARK} mark, which would be trained on as ordinary text: "
            "leave it out, because the image of a pair always stands before the prompt"
        )
    address = address_of(path)
    if address is None:
        return _prepare(path, tokenizer, options, workers, shards, merge_only)
    if options.index_dir is None:
        raise ValueError(f"{address} is in an object store: use --index-dir DIR for its index, and train with --data.path DIR")
    with mirrored(address) as mirror:
        try:
            return _prepare(mirror.path_of(address), tokenizer, options, workers, shards, merge_only, mirror)
        except ValueError as error:
            raise ValueError(mirror.shown(str(error))) from None


def _prepare(
    path: Path,
    tokenizer: Path | None,
    options: IndexOptions,
    workers: int,
    shards: str | None,
    merge_only: bool,
    mirror: Mirror | None = None,
) -> Summary:
    began = time.monotonic()
    sources = find_sources(path, ignore=options.ignore)
    model = tokenizer or next(
        (p / "tokenizer.model" for p in (path, path.parent, path.parent.parent) if (p / "tokenizer.model").is_file()), None
    )
    if model is None:
        raise ValueError(f"no tokenizer.model in {path}: run `megatron-mm prepare tokenizer {path}` first, or use --tokenizer")
    fingerprint = Tokenizer.open(model).fingerprint
    summaries, kinds = {}, set()
    shards_by_source = {source: shards_of(source) for source in sources}
    if shards is not None:
        check_choice(shards, {"/".join(absolute(source).parts[-2:]): len(found) for source, found in shards_by_source.items()})
    for source, found in shards_by_source.items():
        check_files(source, found, ignore=options.ignore)
        say_energon_split(source)
        with mirror.beginnings(first_shards(found)) if mirror is not None else nullcontext():
            reading = _reading(found, model, options)
        kinds.add(reading.kind)
        split, name = absolute(source).parts[-2:]
        home = source if options.index_dir is None else options.index_dir / split / name
        if home == source and not os.access(source, os.W_OK):
            raise ValueError(f"source {source} cannot be written to: use --index-dir DIR, and train with --data.path DIR")
        job = _SourceJob(source, home, found, model, fingerprint, reading, options, mirror)
        _warn_of_changes(job)
        if not merge_only:
            _read_shards(job, found if shards is None else [found[n] for n in choose_shards(shards, len(found))], workers=workers)
        summaries[f"{split}/{name}"] = _merge(job) if shards is None else _read_so_far(job)
    if options.caption_prompt is not None and "pairs" not in kinds:
        logger.warning("%s has no source of pairs, so the caption prompt is not used", path)
    return Summary(summaries, seconds=time.monotonic() - began)


def _reading(shards: Sequence[Path], model: Path, options: IndexOptions) -> Reading:
    """Return how to read a source. Raises ValueError if its kind is unclear, or if the tokenizer lacks tokens of the chat template."""
    detected = detect_kind(shards, kind=options.kind, key_ends=options.key_ends, keys=options.keys)
    prompt = options.caption_prompt if detected.kind == "pairs" else None
    if detected.kind in CHAT_KINDS or prompt is not None:
        _check_template(options.template, model)
    rendering = Rendering(chat_template(options.template), caption_prompt=prompt)
    return Reading(
        detected.kind,
        rendering,
        key_ends=detected.key_ends,
        keys=options.keys,
        images_may_be_left_out=options.kind == "text",
        verify=options.verify,
    )


@dataclass(frozen=True)
class _SourceJob:
    """A source to index."""

    source: Path
    home: Path
    """Folder that contains the source's `index` folder."""
    shards: Sequence[Path]
    model: Path
    fingerprint: str
    reading: Reading
    options: IndexOptions
    mirror: Mirror | None = None
    """Stand-in files for the shards, if these are in an object store; otherwise None."""

    @property
    def shown(self) -> str:
        """Name of the source in messages."""
        return str(self.source) if self.mirror is None else self.mirror.url_of(self.source)

    @property
    def recipe(self) -> str:
        return recipe_of(self.reading, tokenizer=self.fingerprint)

    @cached_property
    def recipes(self) -> tuple[str, ...]:
        """Recipes whose rows can be used: this one, and those that differ only in that more of each image is decoded."""
        return tuple(self.recipe_with(verify) for verify in VERIFY[VERIFY.index(self.reading.verify) :])

    def recipe_with(self, verify: Verify) -> str:
        """Return the recipe with another check of images."""
        return recipe_of(replace(self.reading, verify=verify), tokenizer=self.fingerprint)

    @property
    def chats(self) -> dict[str, str | None]:
        """How the samples become chats, as meta.json of the index records it."""
        prompt = self.reading.rendering.caption_prompt
        are_chats = self.reading.kind in CHAT_KINDS or prompt is not None
        return {"chat_template": self.options.template if are_chats else None, "caption_prompt": prompt}

    def rows(self, shard: Path) -> Path:
        """Return the path of a shard's row file."""
        return row_file_of(self.source, shard, home=self.home)

    def headers(self, shards: Sequence[Path]) -> Iterator[RowHeader | None]:
        """Yield the header of each shard's row file, or None if the shard must be read.

        Checks many files at a time, because a shared file system answers slowly.
        """
        with ThreadPoolExecutor(SHARDS_CHECKED_AT_ONCE) as threads:
            for first in range(0, len(shards), 4096):
                part = shards[first : first + 4096]
                yield from threads.map(lambda shard: current_header(self.rows(shard), shard, recipes=self.recipes), part)


def _warn_of_changes(job: _SourceJob) -> None:
    """Warn if the source has an index with another chat template or caption prompt, because that index is about to be replaced."""
    try:
        former = json.loads((job.home / "index" / META).read_text())
        changed = [(name, former.get(name), new) for name, new in job.chats.items() if former.get(name) != new]
    except (OSError, ValueError, AttributeError):
        return  # there is no index, or a damaged one
    for name, old, new in changed:
        option = f"--{name.replace('_', '-')}"
        keep = f"add {option} {shlex.quote(str(old))} to keep it" if old is not None else f"leave out {option} to keep it"
        if name == "chat_template" and None in (old, new):
            continue  # the kind or the caption prompt changed
        logger.warning(
            "source %s was indexed with %s, and this index with %s replaces it: its texts get other tokens; %s",
            *(job.shown, *(f"{option} {shlex.quote(str(value))}" if value is not None else f"no {option}" for value in (old, new)), keep),
        )


def _read_shards(job: _SourceJob, shards: Sequence[Path], *, workers: int) -> None:
    """Read the shards whose row files are missing or outdated, and write these."""
    missing = [shard for shard, header in zip(shards, job.headers(shards), strict=True) if header is None]
    if len(missing) < len(shards):
        logger.info("%s: %d of %d shards are unchanged since they were read", job.shown, len(shards) - len(missing), len(shards))
    progress = Progress(len(missing), of=job.shown)
    jobs = [ShardJob(job.source, shard, job.rows(shard), job.model, job.reading, job.recipe, job.mirror) for shard in missing]
    for _, header in run_jobs(jobs, workers=workers):
        for line in header.losses["named"]:
            logger.warning(line)
        progress.add(header)


def _read_so_far(job: _SourceJob) -> SourceSummary:
    totals, done = _Totals(), 0
    for header in job.headers(job.shards):
        if header is not None:
            totals.add(header)
            done += 1
    complete = ": run `prepare merge` next" if done == len(job.shards) else ""
    logger.info("%s: %d of %d shards are read%s", job.shown, done, len(job.shards), complete)
    return totals.summary


class _Totals:
    """Adds up the headers of row files."""

    def __init__(self) -> None:
        self.samples = self.images = self.text_tokens = self.items = self.bytes = 0
        self.losses = Losses()

    def add(self, header: RowHeader) -> None:
        """Add a header."""
        self.samples += header.samples
        self.images += header.images
        self.text_tokens += header.text_tokens
        self.items += header.items
        self.bytes += header.size
        self.losses.add(replace(losses_of(header), named=[]))

    @property
    def summary(self) -> SourceSummary:
        """The totals as the summary of a source."""
        losses = {name: dict(sorted(getattr(self.losses, name).items())) for name in ("rejected", "dropped", "skipped")}
        return SourceSummary(self.samples, self.images, self.text_tokens, **losses)


def _merge(job: _SourceJob) -> SourceSummary:
    """Write the index of a source from the row files of its shards, one at a time. Raises ValueError if one is missing, or if too much is
    lost."""
    source, totals = job.source, _Totals()

    def shards() -> Iterator[Shard]:
        for shard, header in zip(job.shards, job.headers(job.shards), strict=True):
            name = shard.relative_to(source).as_posix()
            if header is None:
                raise ValueError(f"shard {name} of source {source} {_why_unread(job, shard)}")
            totals.add(header)
            yield Shard(name, header.size, header.modified, header.digest)

    table = ShardTable.of(shards())
    summary = totals.summary
    limits = {"max_rejected": job.options.max_rejected, "max_dropped_images": job.options.max_dropped_images}
    check_losses(source, summary, damage=totals.losses.damaged_bytes / max(1, totals.bytes), **limits, shards=job.shards)
    meta = {
        "kind": job.reading.kind,
        "tokenizer": job.fingerprint,
        **job.chats,
        "keys": {name: key for name, key in asdict(job.reading.keys).items() if key is not None},
        "rejected": summary.rejected,
        "dropped": summary.dropped,
        "skipped": summary.skipped,
    }

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        first_item = 0
        for number, shard in enumerate(job.shards):
            samples, items = read_rows(job.rows(shard))
            samples = samples.copy()
            samples["shard"] = number
            samples["first_item"] += first_item
            first_item += len(items)
            yield samples, items

    if job.options.index_dir is not None:
        if job.mirror is None:
            meta["root"] = str(source.resolve())
        else:
            meta["store"] = job.shown
        job.home.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.model, job.options.index_dir / "tokenizer.model")
    write_index(job.home, meta=meta, shards=table, num_samples=totals.samples, num_items=totals.items, parts=parts())
    return summary


def _why_unread(job: _SourceJob, shard: Path) -> str:
    """Return why the row file of a shard cannot be used, and what to do."""
    header = read_header(job.rows(shard))
    if header is None:
        return "has not been read: run `megatron-mm prepare index` on it first (--shards)"
    if header.recipe in job.recipes:
        return "has changed since it was read: run `megatron-mm prepare index` on it again (--shards)"
    same = next((verify for verify in VERIFY if job.recipe_with(verify) == header.recipe), None)
    if same is not None:
        return f"was read with --verify {same}: give `prepare merge` the same option, or run `megatron-mm prepare index` on it again"
    return (
        "was read with another tokenizer or other options (--chat-template, --caption-prompt, --kind, --text-key ...): "
        "give `prepare merge` those of `prepare index`, or run `megatron-mm prepare index` on it again"
    )


def _check_template(name: str, model: Path) -> None:
    """Raise ValueError if the tokenizer lacks a control token of a chat template."""
    tokenizer, lacking = Tokenizer.open(model), []
    for token in chat_template(name).control_tokens:
        try:
            tokenizer.special_id(token)
        except ValueError:
            lacking.append(token)
    if lacking:
        raise ValueError(
            f"chat template {name} needs the control tokens {', '.join(lacking)}, which {model} lacks: "
            "choose another --chat-template, or use the --tokenizer of a model with this template"
        )
