"""Converts published files to shards: the common loop of `prepare pairs`, `obelics`, `mmc4`, `llava`, `vqa` and `text`.

Why not read the files in place? Training reads samples at random positions, which parquet, compressed lines and folders of millions of
small files do not allow. The price is disk space for a copy. Tars from img2dataset and plain .jsonl files can be indexed without
conversion.

    OUT/00000-00000.tar ...    shard 0 of input 0; .jsonl for texts
    OUT/.prepared/00000.json   input 0 is done: a digest of its size and date, its shards, and counts of losses
    OUT/.prepared/00000.rejected.jsonl   losses of input 0, a line for each record or image (`losses`)
    OUT/.prepared/images.sqlite  locations of images (`images`)

With `--hold-out`, some samples are written to shards of the same names in DATA/heldout/NAME (`hold_out`).

An input is converted again only if it or the options have changed, and its shards are renamed into place when they are complete. So the
same command, started again after an interruption, resumes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from megatron_mm.data.image_formats import is_image_name
from megatron_mm.data.prepare.published.annotations import as_pair, of_split, read_annotations, row_records
from megatron_mm.data.prepare.published.converted import Converted, check_losses
from megatron_mm.data.prepare.published.files import ending
from megatron_mm.data.prepare.published.folders import DESCRIPTIONS, described_folder, describes, folder_pairs, listing
from megatron_mm.data.prepare.published.hold_out import SplitWriter, held_out_shards, heldout_folder, make_heldout_folder
from megatron_mm.data.prepare.published.images import ImageStore, build_table, table_stamp
from megatron_mm.data.prepare.published.inputs import expand
from megatron_mm.data.prepare.published.layouts import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    LAYOUTS,
    TEXT_KEYS,
    WITH_KEYS,
    Context,
    LeftOut,
    OutSample,
    each_caption,
)
from megatron_mm.data.prepare.published.losses import ORIGIN, BadRecord, DamagedFile, LossList, Record
from megatron_mm.data.prepare.published.records import TABLES, TextDocuments, iterate_records
from megatron_mm.data.prepare.published.web_documents import separate
from megatron_mm.data.sources.stores import check_local
from megatron_mm.data.text.items import BadDocument
from megatron_mm.data.text.keys import Keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How inputs are read and written. If one of these changes, all inputs are converted again."""

    layout: str
    """Key of `layouts.LAYOUTS`."""
    text_keys: tuple[str, ...] = ()
    """Fields that may contain the text, in order of preference; empty for the usual ones."""
    image_keys: tuple[str, ...] = ()
    """Fields that may contain or name the image, in order of preference; empty for the usual ones."""
    messages_key: str | None = None
    """Field with the turns of a conversation; None for the usual ones."""
    images: str | None = None
    """Folder of images."""
    form: str | None = None
    """Form of annotation files, a key of `annotations.FORMS`; None if inputs are not annotations."""
    annotations: str | None = None
    """File of answers, for forms with a separate one."""
    split: str | None = None
    """Split to read, from annotation files that contain several; None for all."""
    texts: TextDocuments = "file"
    shard_bytes: int = 2**30
    """Approximate size of a shard, in bytes."""
    hold_out: float = 0.0
    """Fraction of the samples to write to the held-out split (`hold_out`)."""


def convert(
    inputs: Sequence[str], out: Path, *, options: Options, workers: int = 1, max_rejected: float = 0.05, max_dropped_images: float = 0.05
) -> Converted:
    """Convert published files to shards.

    Raises ValueError if an input does not exist or has another format, and, after all inputs, if more is lost than allowed.

    Args:
        inputs: paths, folders, patterns, or URLs that fsspec reads.
        out: the source's folder, such as DATA/train/obelics.
    """
    for folder in filter(None, (str(out), options.images)):
        check_local(Path(folder), instead="use a local folder; after indexing, shards may be copied to a store (`prepare store`)")
    tasks = list(enumerate(_inputs(inputs, options)))
    if not tasks:
        raise ValueError(f"no files to read in {', '.join(inputs)}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out must be the folder of a source, such as DATA/train/NAME")
    out.mkdir(parents=True, exist_ok=True)
    _check_former(out, {path for _, path in tasks})
    if options.hold_out:
        make_heldout_folder(out)
    table = None
    if options.images is not None:
        table = out / ".prepared" / "images.sqlite"
        logger.info("found %s images in %s", f"{build_table(Path(options.images), table):,}", options.images)
    total, began = Converted(), time.monotonic()
    for done, found in enumerate(_run(tasks, out, options, table, workers), start=1):
        total.add(found)
        if done == len(tasks) or done % max(1, len(tasks) // 20) == 0:
            seconds = time.monotonic() - began
            logger.info(
                "%d of %d inputs, %d samples, %.0f/s, %.0f s left",
                *(done, len(tasks), total.samples, total.samples / max(seconds, 1e-9), seconds / done * (len(tasks) - done)),
            )
    if total.examples:
        logger.info("all lost records and images, with their reasons: %s", out / ".prepared" / "*.rejected.jsonl")
    check_losses(total, len(tasks), out, max_rejected, max_dropped_images)
    return total


def _check_former(out: Path, inputs: Collection[str]) -> None:
    """Raise ValueError if a folder has shards of inputs that are no longer given, because these could not be made again. Warn about shards
    that this command did not write."""
    ours = set[str]()
    for record in sorted((out / ".prepared").glob("[0-9]*.json")):
        known = json.loads(record.read_text())
        if known["shards"] and known["input"] not in inputs:
            raise ValueError(
                f"{out} has {len(known['shards'])} shards of {known['input']}, which is not among the inputs of this "
                "command: pass all inputs of a source to one command, choose another --out, or remove the folder to create it again"
            )
        ours.update(known["shards"])
    others = sorted(path.name for path in out.iterdir() if path.suffix in (".tar", ".jsonl") and path.name not in ours)
    if others:
        logger.warning(
            "%s has %d shards that this command did not write (%s ...): they will be indexed as well", out, len(others), others[0]
        )


def _inputs(inputs: Sequence[str], options: Options) -> list[str]:
    """Return the units of work: files, or, for pairs, also folders of images with their texts."""
    files = expand(inputs, images=options.layout == "pairs" and options.form is None)
    if options.form is not None:
        if options.annotations is not None and len(files) > 1:
            raise ValueError(f"format {options.form} takes one file of questions and one of answers at a time, but {len(files)} were given")
        return files
    files = [file for file in files if not os.path.basename(file).startswith(".")]
    if options.layout != "pairs":
        return files
    folders = sorted({os.path.dirname(file) for file in files if is_image_name(file.rpartition(".")[2].lower())})
    tars = [file.removesuffix(".tar") for file in files if file.endswith(".tar")]
    described = {f"{name}.parquet" for name in (*folders, *tars)}  # img2dataset writes 00000.parquet about the folder 00000 or 00000.tar
    whole = sorted({os.path.dirname(file) for file in files if os.path.basename(file) in DESCRIPTIONS and describes(Path(file).parent)})
    whole = [folder for folder in whole if not any(folder.startswith(f"{other}/") for other in whole)]
    records = [
        file
        for file in files
        if not (os.path.dirname(file) in folders and file.endswith((".txt", ".json")))  # belongs to an image
        and file not in described
        and not is_image_name(file.rpartition(".")[2].lower())
        and not file.endswith("_stats.json")
    ]
    apart = [path for path in (*folders, *records) if not f"{path}/".startswith(tuple(f"{folder}/" for folder in whole))]
    return [*whole, *apart]


def _run(tasks: list[tuple[int, str]], out: Path, options: Options, table: Path | None, workers: int) -> Iterator[Converted]:
    arguments = [(number, path, out, options, table) for number, path in tasks]
    if workers <= 1 or len(tasks) == 1:
        yield from map(_convert_input, arguments)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("forkserver")) as pool:
        try:
            yield from pool.map(_convert_input, arguments)
        except BrokenProcessPool:
            raise ValueError(f"a process that made shards in {out} was killed: use fewer than {workers} --workers") from None


def _convert_input(arguments: tuple[int, str, Path, Options, Path | None]) -> Converted:
    number, path, out, options, table = arguments
    record_of_work = out / ".prepared" / f"{number:05d}.json"
    stamp = _stamp(path, options, table)
    done = _finished(record_of_work, stamp, out)
    if done is not None:
        return done
    for old in (*out.glob(f"{number:05d}-*"), *held_out_shards(out, f"{number:05d}")):
        old.unlink()
    store = ImageStore(Path(options.images), table=table) if options.images is not None else None
    context = Context(
        images=store,
        text_keys=options.text_keys or (CAPTION_KEYS if options.layout == "pairs" else TEXT_KEYS),
        image_keys=options.image_keys or IMAGE_KEYS,
        keys=Keys(image=next(iter(options.image_keys), None), messages=options.messages_key),
    )
    found, rejected, left_out = Converted(), Counter[str](), Counter[str]()
    lost = LossList(out / ".prepared" / f"{number:05d}.rejected.jsonl", of=path)
    lines, shard_bytes = options.layout == "text", options.shard_bytes
    writer = SplitWriter(out, fraction=options.hold_out, prefix=f"{number:05d}", lines=lines, shard_bytes=shard_bytes)
    try:
        for sample in _samples(path, options, context, rejected, left_out, lost, found):
            writer.add(sample)
            found.samples += 1
            found.images += len(sample.images)
    except DamagedFile as error:
        found.damaged.append(str(error))
        rejected["damaged input file"] += 1
    lost.close()
    found.shards, found.held_out_shards = writer.close()
    found.held_out, found.examples = writer.held_out, lost.examples
    found.rejected, found.dropped, found.left_out = dict(rejected), dict(context.dropped.counts), dict(left_out)
    record_of_work.parent.mkdir(exist_ok=True)
    partial = record_of_work.with_suffix(".partial")
    partial.write_text(json.dumps({"input": path, "stamp": stamp, "reader": _READER, **asdict(found)}, indent=1))
    partial.replace(record_of_work)
    return found


def _samples(
    path: str, options: Options, context: Context, rejected: Counter[str], left_out: Counter[str], lost: LossList, found: Converted
) -> Iterator[OutSample]:
    """Yield the samples of an input. Every record that does not become a sample is counted, and listed if it is a loss."""
    layout, number = LAYOUTS[options.layout], 0
    for record in _records(path, options, left_out):
        number += record.count if isinstance(record, BadRecord) else 1
        if isinstance(record, BadRecord):
            rejected[record.reason] += record.count
            lost.add(record.number or number, record.reason, what=record.what, count=record.count, file=record.file)
            continue
        origin = record.pop(ORIGIN, {})
        place, named = origin.get("record", number), {**record, **origin}
        for document in _parts(record, options.layout, context):
            try:
                sample = layout(document, context)
            except BadDocument as reason:
                rejected[str(reason)] += 1
                lost.add(place, str(reason), record=named)
                if options.layout in (*WITH_KEYS, "obelics", "mmc4"):
                    found.fields = found.fields or ", ".join(map(str, list(record)[:12]))
                continue
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            finally:
                for why, name in context.dropped.taken():
                    lost.add(place, why, what=name, record=named)
            yield sample


def _parts(record: Record, layout: str, context: Context) -> Iterable[Record]:
    """Return the records of which a record consists, each of which becomes a sample."""
    if layout == "obelics":
        return separate(record)
    return each_caption(record, context.text_keys) if layout == "pairs" else (record,)


def _records(path: str, options: Options, left_out: Counter[str]) -> Iterable[Record | BadRecord]:
    form = options.form
    if form is not None and ending(path) not in TABLES:
        joined = read_annotations(form, path, annotations=options.annotations, split=options.split, as_captions=options.layout == "pairs")
        return joined if options.layout == "tasks" else map(as_pair, joined)
    if os.path.isdir(path):
        return described_folder(Path(path)) if describes(Path(path)) else folder_pairs(Path(path))
    records = iterate_records(path, texts=options.texts)
    if form is None:
        return records
    if options.split is not None:
        records = of_split(records, options.split, path, left_out)
    tasks = chain.from_iterable([record] if isinstance(record, BadRecord) else row_records(form, record) for record in records)
    return tasks if options.layout == "tasks" else map(as_pair, tasks)


def _stamp(path: str, options: Options, table: Path | None) -> str:
    """Return a digest that changes if an input, an option or the folder of images changes."""
    import fsspec

    given = asdict(options)
    if not options.hold_out:  # stamps of before there was this option
        del given["hold_out"]
    facts = [path, json.dumps(given, sort_keys=True), str(table_stamp(table) if table is not None else None)]
    for file in filter(None, (path, options.annotations)):
        system, name = fsspec.core.url_to_fs(file)
        try:
            details = system.info(name)
        except FileNotFoundError:  # a dangling link, which is reported as damaged when it is read
            details = {}
        facts.append(str([details.get(key) for key in ("size", "mtime", "ETag", "etag", "LastModified")]))
    if os.path.isdir(path):
        facts += listing(Path(path))
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _finished(record_of_work: Path, stamp: str, out: Path) -> Converted | None:
    """Return the result of an input that was already converted; None if it must be converted."""
    try:
        known = json.loads(record_of_work.read_text())
    except (OSError, ValueError):
        return None
    if known.pop("stamp", None) != stamp or not all((out / shard).is_file() for shard in known["shards"]):
        return None
    reader, _ = known.pop("reader", 1), known.pop("input")
    done = Converted(**known)
    if not all((heldout_folder(out) / shard).is_file() for shard in done.held_out_shards):
        return None
    return None if reader < _READER and (done.rejected or done.dropped or done.damaged) else done


_READER = 3
"""Version of the code that reads records. An input of which an earlier version lost something is converted again."""
