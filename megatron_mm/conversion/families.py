"""What a model family needs to be written as a Hugging Face model: `FAMILIES` is all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mm.conversion.mapping import Entry
from megatron_mm.conversion.mm1 import mm1_table
from megatron_mm.conversion.mm1_files import write_mm1_files


@dataclass(frozen=True)
class HfFamily:
    """How a family's checkpoints become Hugging Face models. Decoders and towers alone need no entry: `conversion.parts`."""

    table: Callable[..., list[Entry]]
    """(model config, vocab_rows=...) -> the table of the whole model."""
    write_files: Callable[..., None]
    """Writes all but the weights: (experiment, tokenizer path, directory, dtype=..., vocab_rows=...)."""


FAMILIES: dict[str, HfFamily] = {"mm1": HfFamily(table=mm1_table, write_files=write_mm1_files)}
