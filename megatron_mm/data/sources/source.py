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
"""Kinds that are always rendered by a chat template; of what is, only the answers are supervised."""


@dataclass(frozen=True)
class Items:
    """The items (texts, control tokens and images) of one document, in reading order."""

    is_image: np.ndarray
    """[items] bool."""
    supervised: np.ndarray
    """[items] bool: its tokens are in the loss mask; of an image, what stands before it may be (the model says whether)."""
    tokens: np.ndarray
    """[items] int64: tokens of a text, 1 for a control token, 0 for an image (the model says how many tokens an image is)."""
    widths: np.ndarray
    """[images] int64, pixels."""
    heights: np.ndarray
    """[images] int64, pixels."""

    def __len__(self) -> int:
        return len(self.is_image)

    @property
    def num_images(self) -> int:
        return len(self.widths)


@dataclass(frozen=True)
class DocumentSizes:
    """What packing must know of many documents."""

    text_tokens: np.ndarray
    """[documents] int64: tokens of all items that are not images."""
    num_images: np.ndarray
    """[documents] int64."""

    def __len__(self) -> int:
        return len(self.text_tokens)


@dataclass(frozen=True)
class ImageSizes:
    """Pixels of the images of many documents, one document after another."""

    document: np.ndarray
    """[images] int64: the number of the document among those asked for."""
    widths: np.ndarray
    """[images] int64."""
    heights: np.ndarray
    """[images] int64."""


class Source(Protocol):
    """A source of samples, opened."""

    @property
    def name(self) -> str:
        """Folder name of the source."""
        ...

    @property
    def kind(self) -> Kind: ...

    @property
    def location(self) -> str:
        """Where it is, for messages."""
        ...

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer that counted the tokens."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Name of the template that renders the samples; None if they are no chats."""
        ...

    @property
    def caption_prompt(self) -> str | None:
        """What asks for the captions of pairs; None if they are no chats."""
        ...

    @property
    def answers_only(self) -> bool:
        """Some items are not supervised."""
        ...

    def __len__(self) -> int: ...

    def sizes(self, rows: np.ndarray | slice) -> DocumentSizes:
        """Sizes of documents. Reads nothing but the columns that planning is for."""
        ...

    def image_sizes(self, rows: np.ndarray | slice) -> ImageSizes:
        """Pixels of the images of documents."""
        ...

    def items(self, row: int) -> Items:
        """The items of a document."""
        ...

    def document(self, row: int) -> bytes:
        """The encoded document (the bytes of a .txt, a .json or a .jsonl line). Raises OSError or ValueError if they cannot be read."""
        ...

    def image(self, row: int, number: int) -> bytes:
        """An encoded image of a document, numbered from 0. Raises OSError or ValueError if it cannot be read."""
        ...


@dataclass(frozen=True)
class SourceFormat:
    """A way to store samples in a source's folder."""

    matches: Callable[[Path], bool]
    """Whether a folder holds samples of this format."""
    open: Callable[[Path], Source]
    """Raises ValueError that names the folder if they cannot be used."""


SOURCE_FORMATS: dict[str, SourceFormat] = {}
"""Formats beside the indexed shards of `data.sources.index`, by name. A folder that none of them matches holds shards."""


def register_source_format(name: str, known: SourceFormat) -> None:
    """Make a format known that is defined outside of this package. Raises ValueError if its name is taken."""
    if SOURCE_FORMATS.setdefault(name, known) is not known:
        raise ValueError(f"a source format {name!r} is already registered: give yours another name")
