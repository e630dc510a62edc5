"""MM1's table: our tensor names <-> those of an exported MM1 (`hf_code/modeling_mm1.py`)."""

from __future__ import annotations

import torch

from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mm1.files import mm1_settings
from megatron_mm.hf.decoders import llama_table
from megatron_mm.hf.formats import AnyFormat, Format
from megatron_mm.hf.mapping import Entry
from megatron_mm.hf.towers import clip_table
from megatron_mm.models.connectors import build_connector, connector_of


def mm1_table(config: MM1Config, *, vocab_rows: int | None = None) -> list[Entry]:
    """Return the mapping of every parameter of an MM1.

    Args:
        vocab_rows: number of vocabulary rows to write; None writes all.
    """
    return [
        *clip_table(config.vision, prefix="vision."),
        *_connector_table(config),
        *llama_table(config.decoder, body="language_model.", vocab_rows=vocab_rows),
    ]


def _connector_table(config: MM1Config) -> list[Entry]:
    """Return the mapping of the connector, whose names are the same on both sides."""
    with torch.device("meta"):
        connector = build_connector(config.connector, vision=config.vision, output_size=config.decoder.hidden_size, dtype=torch.float32)
    entry = connector_of(config.connector).entry
    return [entry(f"connector.{name}", config.vision) for name, _ in connector.named_parameters()]


FORMATS: dict[str, AnyFormat] = {
    "mm1": Format(
        part="whole",
        signature="connector.output.weight",
        prefixes={"": ()},
        config=MM1Config,
        table=lambda model, naming: mm1_table(model),
        settings=mm1_settings,
        model_types=("mm1",),
    )
}
