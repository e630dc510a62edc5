"""Mono-InternVL as a family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mm.config import Experiment
from megatron_mm.data.image_input import ImageInput
from megatron_mm.families.base import Family
from megatron_mm.families.mono_internvl import recipes
from megatron_mm.families.mono_internvl.config import EXPERTS, SPECIAL_TOKENS, MonoInternVLConfig, image_input
from megatron_mm.flops import StepWork, Trainable

if TYPE_CHECKING:
    from megatron_mm.families.mono_internvl.model import MonoInternVLModel
    from megatron_mm.hf.formats import AnyFormat
    from megatron_mm.hf.mapping import Entry
    from megatron_mm.models.context import ChunkContext

_VISUAL = (r"patches\.(?!class_embedding)", r"projector\.", r"language\.decoder\.layers\.\d+\.mlp\.visual\.")
_ATTENTION = r"language\.decoder\.layers\.\d+\.self_attention\.linear_(qkv|proj)\.weight$"


class MonoInternVLFamily(Family[MonoInternVLConfig]):
    """One decoder that takes patches directly, with a visual expert in addition to the text feed-forward network in every layer."""

    config = MonoInternVLConfig
    recipes = recipes.RECIPES
    generates_with_cache = True
    freeze_policies = {  # noqa: RUF012
        "s1_1": _VISUAL,
        "s1_2": _VISUAL,
        "s1_3": (*_VISUAL, _ATTENTION),
        "s2": (r"patches\.(?!class_embedding)", r"projector\.", r"language\."),
    }
    """The stages of endogenous visual pre-training (table 1) and instruction tuning. The class embedding is unused, so it stays frozen."""
    parts = {  # noqa: RUF012
        "experts": r"language\..*\.mlp\.visual\.",
        "decoder": r"language\.",
        "tower": r"patches\.",
        "connector": r"projector\.",
    }
    special_tokens = SPECIAL_TOKENS
    takes_tiles = True
    language_mlps = tuple(f"mlp.{name}" for name in EXPERTS)

    def build(self, model: MonoInternVLConfig, context: ChunkContext) -> MonoInternVLModel:
        from megatron_mm.families.mono_internvl.model import MonoInternVLModel

        return MonoInternVLModel(model, context)

    def image_input(self, model: MonoInternVLConfig) -> ImageInput:
        return image_input(model)

    def flops(self, model: MonoInternVLConfig, trainable: Trainable, work: StepWork) -> float:
        from megatron_mm.families.mono_internvl.flops import mono_internvl_flops

        return mono_internvl_flops(model, trainable, work)

    def table(self, model: MonoInternVLConfig, *, vocab_rows: int | None = None) -> list[Entry]:
        from megatron_mm.families.mono_internvl.names import mono_internvl_table

        return mono_internvl_table(model, vocab_rows=vocab_rows)

    def check_export(self, model: MonoInternVLConfig) -> None:
        from megatron_mm.hf.decoder_variants import check_exported_decoder

        check_exported_decoder(model.decoder, code="an exported Mono-InternVL")

    def write_files(
        self, model: MonoInternVLConfig, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None = None
    ) -> None:
        from megatron_mm.families.mono_internvl.files import write_mono_internvl_files

        write_mono_internvl_files(model, out, experiment=experiment, tokenizer=tokenizer, dtype=dtype, vocab_rows=vocab_rows)

    def card_notes(self, model: MonoInternVLConfig, out: Path, *, part: str) -> list[str]:
        from megatron_mm.families.mono_internvl.files import card_notes

        return card_notes() if part == "whole" else []

    def formats(self) -> dict[str, AnyFormat]:
        from megatron_mm.families.mono_internvl.names import FORMATS

        return FORMATS


MONO_INTERNVL = MonoInternVLFamily()
