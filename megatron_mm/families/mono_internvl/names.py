"""Mono-InternVL's table: our tensor names <-> those of released checkpoints.

vision_model      patch embedding
mlp1              projector
language_model    InternLM2, with feed_forward_ve in addition to feed_forward in every layer
"""

from __future__ import annotations

from megatron_mm.families.mono_internvl.config import EXPERTS, MonoInternVLConfig
from megatron_mm.families.mono_internvl.files import mono_internvl_settings
from megatron_mm.hf.decoders import internlm2_table
from megatron_mm.hf.formats import ROTARY, AnyFormat, Format
from megatron_mm.hf.mapping import Entry, Wrapped, both


def mono_internvl_table(config: MonoInternVLConfig, *, vocab_rows: int | None = None) -> list[Entry]:
    """Return the mapping of every parameter of a Mono-InternVL.

    Args:
        vocab_rows: number of vocabulary rows to write; None writes all.
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


FORMATS: dict[str, AnyFormat] = {
    "mono_internvl": Format(
        part="whole",
        signature="language_model.model.layers.0.feed_forward_ve.w1.weight",
        prefixes={"": (ROTARY,)},
        config=MonoInternVLConfig,
        table=lambda model, naming: mono_internvl_table(model),
        settings=mono_internvl_settings,
        model_types=("internvl_chat",),
    )
}
