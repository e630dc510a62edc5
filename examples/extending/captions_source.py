"""A source format that is not in the package: pictures and a table of their captions, read as they are, without shards or index.

    pairs/captions.tsv     cat.png<TAB>a black cat
    pairs/cat.png

A folder with a captions.tsv is such a source. It is small enough to be read when it is opened; a large one would keep the sizes in files.

    megatron-mm train debug_mm1 --extensions examples/extending/captions_source.py --data.mixture pairs=1.0 \\
        --run-dir runs/table --data.path DATA
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_mm.data.sources.source import DocumentSizes, ImageSizes, Items, Kind, Source, SourceFormat, register_source_format
from megatron_mm.data.text.tokenizer import Tokenizer

TABLE = "captions.tsv"


@dataclass(frozen=True)
class CaptionTable:
    """`Source` of pairs: an image and then its caption."""

    folder: Path
    rows: tuple[tuple[str, str], ...]
    """File and caption."""
    kind: Kind = "pairs"
    chat_template: str | None = None
    caption_prompt: str | None = None
    answers_only: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def location(self) -> str:
        return str(self.folder)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.open(self.folder.parent.parent / "tokenizer.model")

    @property
    def tokenizer(self) -> str:
        return self._tokenizer.fingerprint

    @cached_property
    def _text_tokens(self) -> np.ndarray:
        return np.array([len(self._tokenizer.encode(caption)) for _, caption in self.rows], dtype=np.int64)

    @cached_property
    def _pixels(self) -> np.ndarray:
        """[rows, 2] int64: width and height."""
        return np.array([Image.open(self.folder / file).size for file, _ in self.rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def sizes(self, rows: np.ndarray | slice) -> DocumentSizes:
        tokens = self._text_tokens[rows]
        return DocumentSizes(tokens, np.ones_like(tokens))

    def image_sizes(self, rows: np.ndarray | slice) -> ImageSizes:
        pixels = self._pixels[rows]
        return ImageSizes(np.arange(len(pixels)), pixels[:, 0], pixels[:, 1])

    def items(self, row: int) -> Items:
        return Items(
            is_image=np.array([True, False]),
            supervised=np.array([True, True]),
            tokens=np.array([0, self._text_tokens[row]], dtype=np.int64),
            widths=self._pixels[row, :1],
            heights=self._pixels[row, 1:],
        )

    def document(self, row: int) -> bytes:
        return self.rows[row][1].encode()

    def image(self, row: int, number: int) -> bytes:
        return (self.folder / self.rows[row][0]).read_bytes()


def open_table(folder: Path) -> Source:
    rows = []
    for number, line in enumerate((folder / TABLE).read_text().splitlines(), start=1):
        file, separator, caption = line.partition("\t")
        if not separator or not (folder / file).is_file():
            raise ValueError(f"{folder / TABLE}, line {number}: {line!r} is not the name of a file in {folder}, a tab and a caption")
        rows.append((file, caption))
    return CaptionTable(folder, tuple(rows))


register_source_format("captions_tsv", SourceFormat(matches=lambda folder: (folder / TABLE).is_file(), open=open_table))
