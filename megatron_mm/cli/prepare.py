"""`megatron-mm prepare`: make data sets, their tokenizers and their indexes."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mm.cli.checks import place
from megatron_mm.cli.command import Command, Group, Parser, at_least, integer, one_of
from megatron_mm.cli.prepare_datasets import DATASET_COMMANDS, add_keys, add_limits
from megatron_mm.cli.prepare_look import LOOK_COMMANDS
from megatron_mm.platform.files import file_error

if TYPE_CHECKING:
    from megatron_mm.data.prepare.index import IndexOptions
    from megatron_mm.data.prepare.summary import Summary
    from megatron_mm.data.text.keys import Keys


def _demo_arguments(parser: Parser) -> None:
    parser.add_argument("--out", type=place, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--samples",
        type=at_least(1),
        default=2000,
        metavar="N",
        help="number of pairs, interleaved documents and texts to train on; half as many conversations and tasks are added "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=integer, default=0, metavar="N", help="seed of the scenes (default: %(default)s)")


def _demo(given: argparse.Namespace) -> None:
    from megatron_mm.data.prepare.demo import prepare_demo

    print(prepare_demo(given.out, samples=given.samples, seed=given.seed))


KINDS = ("pairs", "interleaved", "text", "conversations", "tasks")
TEMPLATES = ("plain", "zephyr", "llama2", "vicuna", "internlm2")


def _index_arguments(parser: Parser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="folder of a data set (with its splits), of one split, or of one source; or an address in an object store",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model (default: PATH/tokenizer.model)")
    parser.add_argument(
        "--chat-template", default="plain", help="chat template of conversations and tasks (default: %(default)s)", **one_of(TEMPLATES)
    )
    parser.add_argument(
        "--caption-prompt",
        metavar="TEXT",
        help="turn pairs into chats with this prompt for the caption (default: an image followed by its caption)",
    )
    parser.add_argument(
        "--verify",
        default="full",
        help="full: decode every image; header: only headers; sample: one image in 16, and headers of the others (default: %(default)s)",
        **one_of(("full", "header", "sample")),
    )
    parser.add_argument("--kind", help="kind of the sources (default: the kind of most of their first samples)", **one_of(KINDS))
    parser.add_argument(
        "--key-ends",
        help="dot in file names at which a sample's key ends (default: the one that suits most names)",
        **one_of(("first", "last")),
    )
    add_keys(parser, text=True, image=True, messages=True)
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="names of files to skip; may be repeated")
    parser.add_argument(
        "--index-dir", type=place, metavar="DIR", help="write the indexes here, for read-only data; then train with --data.path DIR"
    )
    add_limits(parser)


def _read_arguments(parser: Parser) -> None:
    _index_arguments(parser)
    parser.add_argument(
        "--workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N", help="number of processes (default: %(default)s)"
    )
    parser.add_argument(
        "--shards",
        metavar="A-B|I/N",
        help="read only shards A to B of each source (from 0), or the I-th of N equal parts; `prepare merge` then writes the index",
    )


def _keys(given: argparse.Namespace) -> Keys:
    from megatron_mm.data.text.keys import Keys

    return Keys(text=given.text_key, image=given.image_key, messages=given.messages_key)


def _options(given: argparse.Namespace) -> IndexOptions:
    from megatron_mm.data.prepare.index import IndexOptions

    return IndexOptions(
        template=given.chat_template,
        caption_prompt=given.caption_prompt,
        kind=given.kind,
        key_ends=given.key_ends,
        max_rejected=given.max_rejected,
        max_dropped_images=given.max_dropped_images,
        keys=_keys(given),
        ignore=tuple(given.ignore),
        verify=given.verify,
        index_dir=given.index_dir,
    )


def _merge(given: argparse.Namespace) -> None:
    from megatron_mm.data.prepare.index import prepare_index

    _report(given, prepare_index(given.path, tokenizer=given.tokenizer, options=_options(given), merge_only=True))


def _index(given: argparse.Namespace) -> None:
    from megatron_mm.data.prepare.index import prepare_index

    found = prepare_index(given.path, tokenizer=given.tokenizer, options=_options(given), workers=given.workers, shards=given.shards)
    _report(given, found)


def _report(given: argparse.Namespace, found: Summary) -> None:
    """Print what was indexed and, if it is a whole data set, how to train on it."""
    print(found)
    data = given.path if given.index_dir is None else given.index_dir
    names = [name.partition("/")[2] for name in found.sources if name.startswith("train/")]
    if names and getattr(given, "shards", None) is None and (Path(data) / "train" / names[0]).is_dir():
        command = f"megatron-mm train RECIPE --run-dir RUN --data.path {shlex.quote(str(data))}"
        print(f"next, train on it, with weights of your choice: {command} --data.mixture {shlex.join(f'{name}=1' for name in names)}")


def _store_arguments(parser: Parser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of an indexed source, such as DATA/train/pairs")
    parser.add_argument("url", metavar="URL", help="address to which its shards have been copied, such as s3://bucket/train/pairs")


def _store(given: argparse.Namespace) -> None:
    from megatron_mm.data.sources.index import move_to_store

    if "://" not in given.url:
        raise ValueError(f"{given.url!r} is not an address: give one such as s3://bucket/train/pairs")
    count = move_to_store(given.source, given.url)
    print(f"{given.source}: {count} shards are now read from {given.url}; the shards in the folder are no longer needed")


def _tokenizer_arguments(parser: Parser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="data set")
    parser.add_argument("--out", type=place, metavar="FILE", help="model to write (default: PATH/tokenizer.model)")
    parser.add_argument(
        "--vocab-size",
        type=at_least(1),
        default=49152,
        metavar="N",
        help="greatest number of tokens, including special ones (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model by another")
    add_keys(parser, text=True, image=True, messages=True)


def _tokenizer(given: argparse.Namespace) -> None:
    from megatron_mm.data.prepare.tokenizer import prepare_tokenizer

    out = given.out or given.path / "tokenizer.model"
    print(prepare_tokenizer(given.path, out=out, vocab_size=given.vocab_size, keys=_keys(given), overwrite=given.overwrite))


def _with_file_errors(command: Command) -> Command:
    """The same command, but a full disk, or a file that cannot be written, results in one line and not in a traceback."""

    def run(given: argparse.Namespace) -> None:
        try:
            command.run(given)
        except OSError as error:
            places = [value for value in vars(given).values() if isinstance(value, Path)]
            what = file_error(error, places=places)
            raise ValueError(f"{what}; fix this and run the same command again: finished work is kept") from error

    return replace(command, run=run)


_COMMANDS = {
    "demo": Command(help="make a small data set of drawn scenes, its tokenizer and its index", run=_demo, arguments=_demo_arguments),
    "index": Command(
        help="index a data set: read every sample once, for validity, token counts and image sizes", run=_index, arguments=_read_arguments
    ),
    "merge": Command(
        help="write the index after `prepare index --shards` has read all parts (same options)", run=_merge, arguments=_index_arguments
    ),
    "store": Command(help="make runs read an indexed source from an object store", run=_store, arguments=_store_arguments),
    "tokenizer": Command(help="train a SentencePiece tokenizer on the texts of a data set", run=_tokenizer, arguments=_tokenizer_arguments),
    **DATASET_COMMANDS,
    **LOOK_COMMANDS,
}

PREPARE = Group(
    help="make, convert, index and inspect data sets", commands={name: _with_file_errors(command) for name, command in _COMMANDS.items()}
)
