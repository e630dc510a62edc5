"""Mono-InternVL's table: our tensor names <-> those of released checkpoints.

vision_model      patch embedding
mlp1              projector
language_model    InternLM2, with feed_forward_ve beside feed_forward in every layer
"""

from __future__ import annotations

from megatron_mm.families.mono_internvl.config import MonoInternVLConfig
from megatron_mm.hf.decoders import internlm2_table
from megatron_mm.hf.mapping import Entry, Wrapped, both

EXPERTS = {"text": "feed_forward", "visual": "feed_forward_ve"}


def mono_internvl_table(config: MonoInternVLConfig, *, vocab_rows: int | None = None) -> list[Entry]:
    """Every parameter of a Mono-InternVL.

    Args:
        vocab_rows: rows of the vocabulary that are written; None writes all.
    """
    patches = "vision_model.embeddings."
    return [
        Wrapped("patches.class_embedding", f"{patches}class_embedding", axes=2),
        Wrapped("patches.position_embedding", f"{patches}position_embedding"),
        *both("patches.projection", f"{patches}patch_embedding"),
        *both("projector.norm", "mlp1.0"),
        *both("projector.hidden", "mlp1.1"),
        *both("projector.output", "mlp1.3"),
        *internlm2_table(
            config.decoder,
            body="language_model.model.",
            head="language_model.output.weight",
            mlps={f"mlp.{expert}": theirs for expert, theirs in EXPERTS.items()},
            vocab_rows=vocab_rows,
        ),
    ]
