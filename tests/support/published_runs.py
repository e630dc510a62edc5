"""Converts published files in a test, and looks at the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_mm.data.prepare.index import IndexOptions, prepare_index
from megatron_mm.data.prepare.published.convert import Converted, Options, convert
from megatron_mm.data.sources.index import SourceIndex, open_index
from megatron_mm.data.sources.shards import iterate_tar
from support.data_files import picture


def indexed(out: Path, demo_data: Path) -> SourceIndex:
    prepare_index(out, tokenizer=demo_data / "tokenizer.model", options=IndexOptions(max_rejected=0))
    return open_index(out)


def documents(out: Path) -> list[dict[str, Any]]:
    found = []
    for shard in sorted(out.glob("*.tar")):
        found += [json.loads(sample.members["json"].data) for sample in iterate_tar(shard)]
    return found


def run(layout: str, inputs: Path | list[Path], out: Path, *, lose: float = 0.0, **options: Any) -> Converted:
    paths = inputs if isinstance(inputs, list) else [inputs]
    return convert([str(path) for path in paths], out, options=Options(layout, **options), max_rejected=lose, max_dropped_images=lose)


def write_images(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(size=(20 + number, 30)))
    return folder


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
