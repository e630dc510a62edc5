"""The interface of a source of samples for planning and loading, whatever its file format and location.

`data.sources.index.SourceIndex` implements it with memory-mapped arrays and byte ranges of shards. For another store or format, write
another class with these members; nothing else in the package knows how a sample is stored.

Rows are numbered from 0 to len(source) - 1, in the order of the shards, so neighbouring rows are in the same file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

Kind = Literal["pairs", "interleaved", "text", "conversations", "tasks"]
CHAT_KINDS: tuple[Kind, ...] = ("conversations", "tasks")
"""Kinds that are always rendered by a chat template. In rendered samples, only the answers are supervised."""


@dataclass(frozen=True)
class Items:
    """The items (texts, control tokens and images) of one document, in reading order."""

    is_image: np.ndarray
    """[items] bool."""
    supervised: np.ndarray
    """[items] bool: the item's tokens are in the loss mask; of an image, only control tokens can be, depending on the model family."""
    tokens: np.ndarray
    """[items] int64: number of tokens of a text, 1 for a control token, 0 for an image (the number depends on the model)."""
    widths: np.ndarray
    """[images] int64: pixels."""
    heights: np.ndarray
    """[images] int64: pixels."""

    def __len__(self) -> int:
        return len(self.is_image)

    @property
    def num_images(self) -> int:
        return len(self.widths)


@dataclass(frozen=True)
class DocumentSizes:
    """Sizes of many documents, for packing."""

    text_tokens: np.ndarray
    """[documents] int64: number of tokens of all items that are not images."""
    num_images: np.ndarray
    """[documents] int64."""

    def __len__(self) -> int:
        return len(self.text_tokens)


@dataclass(frozen=True)
class ImageSizes:
    """Sizes of the images of many documents, one document after another."""

    document: np.ndarray
    """[images] int64: index of the image's document among the requested ones."""
    widths: np.ndarray
    """[images] int64: pixels."""
    heights: np.ndarray
    """[images] int64: pixels."""


class Source(Protocol):
    """An opened source of samples."""

    @property
    def name(self) -> str:
        """Folder name of the source."""
        ...

    @property
    def kind(self) -> Kind: ...

    @property
    def location(self) -> str:
        """Location of the source, for messages."""
        ...

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer that counted the tokens."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Name of the template that renders the samples; None if they are not chats."""
        ...

    @property
    def caption_prompt(self) -> str | None:
        """Question to which the captions of pairs are the answers; None if pairs are not rendered as chats."""
        ...

    @property
    def answers_only(self) -> bool:
        """Some items are not supervised."""
        ...

    def __len__(self) -> int: ...

    def sizes(self, rows: np.ndarray | slice) -> DocumentSizes:
        """Return the sizes of documents. Reads only the columns that planning needs."""
        ...

    def image_sizes(self, rows: np.ndarray | slice) -> ImageSizes:
        """Return the sizes of the images of documents."""
        ...

    def items(self, row: int) -> Items:
        """Return the items of a document."""
        ...

    def document(self, row: int) -> bytes:
        """Return the encoded document (a .txt, a .json or a .jsonl line). Raises OSError or ValueError if it cannot be read."""
        ...

    def image(self, row: int, number: int) -> bytes:
        """Return an encoded image of a document, numbered from 0. Raises OSError or ValueError if it cannot be read."""
        ...


@dataclass(frozen=True)
class SourceFormat:
    """A way to store samples in a source's folder."""

    matches: Callable[[Path], bool]
    """Returns whether a folder contains samples in this format."""
    open: Callable[[Path], Source]
    """Opens a source folder. Raises ValueError, naming the folder, if its samples cannot be used."""


SOURCE_FORMATS: dict[str, SourceFormat] = {}
"""Formats other than the indexed shards of `data.sources.index`, by name. A folder that none of them matches is opened as shards."""


def register_source_format(name: str, known: SourceFormat) -> None:
    """Register a format that is defined outside this package. Raises ValueError if its name is taken."""
    if SOURCE_FORMATS.setdefault(name, known) is not known:
        raise ValueError(f"a source format {name!r} is already registered: choose another name")
