"""What a model family needs to be written as a Hugging Face model: `FAMILIES` is all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_mm.conversion.released_files import write_infimm_files, write_mono_internvl_files
from megatron_mm.families.infimm.names import infimm_constants, infimm_table
from megatron_mm.families.mm1.files import write_mm1_files
from megatron_mm.families.mm1.names import mm1_table
from megatron_mm.families.mono_internvl.names import EXPERTS, mono_internvl_table
from megatron_mm.hf.mapping import Entry


@dataclass(frozen=True)
class HfFamily:
    """How a family's checkpoints become Hugging Face models and begin as them."""

    table: Callable[..., list[Entry]]
    """(model config, vocab_rows=...) -> the table of the whole model."""
    write_files: Callable[..., None]
    """Writes all but the weights: (experiment, tokenizer path, directory, dtype=..., vocab_rows=...)."""
    constants: Callable[..., dict[str, torch.Tensor]] = lambda config: {}
    """Of a model config: tensors of theirs that are no weights, and follow from it."""
    language_mlps: tuple[str, ...] = ("mlp",)
    """Our names of what a plain decoder's feed-forward becomes."""


FAMILIES: dict[str, HfFamily] = {
    "mm1": HfFamily(table=mm1_table, write_files=write_mm1_files),
    "infimm": HfFamily(table=infimm_table, write_files=write_infimm_files, constants=infimm_constants),
    "mono_internvl": HfFamily(
        table=mono_internvl_table,
        write_files=write_mono_internvl_files,
        language_mlps=tuple(f"mlp.{name}" for name in EXPERTS),
    ),
}
