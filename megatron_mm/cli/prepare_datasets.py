"""`megatron-mm prepare pairs|obelics|mmc4|llava|vqa|scienceqa|text`: convert public data sets to shards."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from typing import Any

from megatron_mm.cli.checks import place
from megatron_mm.cli.command import Command, Parser, at_least, one_of

FORMS = (
    *("vqav2", "okvqa", "aokvqa", "textvqa", "textcaps", "gqa", "vizwiz", "docvqa", "ocrvqa", "chartqa"),
    *("coco", "karpathy"),
)


def fraction(text: str) -> float:
    """A fraction from 0 to 1. Raises ArgumentTypeError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to 1")
    return value


def add_limits(parser: Parser) -> None:
    """Add the limits on lost samples and images."""
    parser.add_argument(
        "--max-rejected",
        type=fraction,
        default=0.05,
        metavar="FRACTION",
        help="fraction of the samples that may be unusable (default: %(default)s)",
    )
    parser.add_argument(
        "--max-dropped-images",
        type=fraction,
        default=0.05,
        metavar="FRACTION",
        help="fraction of the documents' images that may be missing or bad (default: %(default)s)",
    )


def add_keys(parser: Parser, *, text: bool = False, image: bool = False, messages: bool = False) -> None:
    """Add options for the names of fields and files."""
    if text:
        parser.add_argument("--text-key", metavar="FIELD", help="field with the text, or extension of its file; A.B is field B of object A")
    if image:
        parser.add_argument("--image-key", metavar="FIELD", help="field with the image or its path, or extension of its file")
    if messages:
        parser.add_argument("--messages-key", metavar="FIELD", help="field with the turns of a conversation")


def _arguments(
    *, images: bool = True, text_key: bool = False, image_key: bool = False, messages_key: bool = False, inputs: str = "files"
) -> Callable[[Parser], None]:
    """The arguments of a kind of data set.

    Args:
        images: whether there is a --images option.
    """

    def add(parser: Parser) -> None:
        parser.add_argument(
            "inputs", nargs="+", metavar="INPUT", help=f"{inputs}: files, folders, quoted patterns, or URLs that fsspec supports"
        )
        parser.add_argument("--out", type=place, required=True, metavar="DIR", help="source to write, such as DATA/train/NAME")
        if images:
            parser.add_argument("--images", metavar="DIR", help="folder of images, as files or in tars; nothing is downloaded")
        add_keys(parser, text=text_key, image=image_key, messages=messages_key)
        parser.add_argument(
            "--shard-megabytes", type=at_least(1), default=1024, metavar="N", help="size of a shard, MiB (default: %(default)s)"
        )
        parser.add_argument(
            "--hold-out",
            type=fraction,
            default=0.0,
            metavar="FRACTION",
            help="fraction of the samples to write to DATA/heldout/NAME instead, chosen by their images or texts (default: none)",
        )
        parser.add_argument(
            "--workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N", help="number of processes (default: %(default)s)"
        )
        add_limits(parser)

    return add


def _convert(layout: str, **fixed: Any) -> Callable[[argparse.Namespace], None]:
    def run(given: argparse.Namespace) -> None:
        from megatron_mm.data.prepare.published.convert import Options, convert

        names = ("images", "form", "annotations", "split", "texts", "messages_key")
        named = {name: getattr(given, name) for name in names if hasattr(given, name)}
        keys = {f"{name}s": (value,) for name in ("text_key", "image_key") if (value := getattr(given, name, None))}
        named |= {"shard_bytes": given.shard_megabytes * 2**20, "hold_out": given.hold_out}
        options = Options(getattr(given, "layout", layout), **{**named, **keys, **fixed})
        print(
            convert(
                given.inputs,
                given.out,
                options=options,
                workers=given.workers,
                max_rejected=given.max_rejected,
                max_dropped_images=given.max_dropped_images,
            )
        )
        is_source = given.out.resolve().parent.name in ("train", "heldout")
        data = given.out.resolve().parent.parent if is_source else given.out
        print(f"next, index it: megatron-mm prepare index {shlex.quote(str(data))}")
        if not is_source:
            print(f"runs read data sets: to train on it, first move it into one, to DATA/train/{given.out.resolve().name}, and index DATA")

    return run


def _vqa_arguments(parser: Parser) -> None:
    _arguments(inputs="a file of questions or captions")(parser)
    parser.add_argument("--format", dest="form", required=True, help="format of the file", **one_of(FORMS))
    parser.add_argument(
        "--annotations", metavar="FILE", help="the file with the answers, for vqav2, okvqa, and textvqa and vizwiz in their form"
    )
    parser.add_argument(
        "--split",
        metavar="NAME[,NAME]",
        help="split to convert, of a karpathy or ocrvqa file or a table with a column `split` (default: all)",
    )
    parser.add_argument(
        "--as",
        dest="layout",
        default="tasks",
        help="write captions as tasks with a prompt, or as pairs (default: %(default)s)",
        **one_of(("tasks", "pairs")),
    )


def _scienceqa_arguments(parser: Parser) -> None:
    _arguments(inputs="problems.json, or parquet files")(parser)
    parser.add_argument(
        "--split", metavar="NAME[,NAME]", help="split to convert, of problems.json or a table with a column `split` (default: all)"
    )


def _text_arguments(parser: Parser) -> None:
    _arguments(images=False, text_key=True, inputs=".jsonl, .json, .txt (.gz, .zst, .zip, ...), .csv, .tsv, .parquet or .arrow files")(
        parser
    )
    parser.add_argument(
        "--txt",
        dest="texts",
        default="file",
        help="what counts as one text in a .txt file (default: %(default)s)",
        **one_of(("file", "line", "paragraph")),
    )


DATASET_COMMANDS = {
    "pairs": Command(
        help="image-text pairs: img2dataset's parquet or files, other parquet, JSON lines or CSV with paths",
        run=_convert("pairs"),
        arguments=_arguments(text_key=True, image_key=True, inputs="parquet, JSON, CSV, tars or folders of files"),
    ),
    "obelics": Command(
        help="OBELICS: parquet files and their images",
        run=_convert("obelics"),
        arguments=_arguments(inputs="parquet files"),
    ),
    "mmc4": Command(help="MMC4: JSON lines and their images", run=_convert("mmc4"), arguments=_arguments(inputs=".jsonl or .zip")),
    "llava": Command(
        help="conversations (LLaVA-mix-665k, ShareGPT, messages) and a folder of images",
        run=_convert("llava"),
        arguments=_arguments(image_key=True, messages_key=True, inputs="JSON, JSON lines or parquet"),
    ),
    "vqa": Command(
        help="questions and answers, or captions: VQAv2, OK-VQA, A-OKVQA, TextVQA, GQA, VizWiz, DocVQA, OCR-VQA, ChartQA, TextCaps, COCO",
        run=_convert("tasks"),
        arguments=_vqa_arguments,
    ),
    "scienceqa": Command(help="ScienceQA", run=_convert("tasks", form="scienceqa"), arguments=_scienceqa_arguments),
    "text": Command(help="texts: C4, Dolma and others", run=_convert("text"), arguments=_text_arguments),
}
