"""InfiMM as a family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.data.image_input import ImageInput
from megatron_mm.families.base import Family
from megatron_mm.families.infimm import recipes
from megatron_mm.families.infimm.config import END_OF_CHUNK, IMAGE, InfiMMConfig, image_input
from megatron_mm.flops import StepWork, Trainable

if TYPE_CHECKING:
    import torch

    from megatron_mm.families.infimm.model import InfiMMEncoder, InfiMMModel
    from megatron_mm.hf.formats import AnyFormat
    from megatron_mm.hf.mapping import Entry
    from megatron_mm.models.context import ChunkContext

_BRIDGE = (r"resampler\.", r"language\.decoder\.layers\.\d+\.gated\.")


class InfiMMFamily(Family[InfiMMConfig]):
    """EVA-CLIP tower -> Perceiver resampler -> latents outside the sequence, to which gated blocks of the language model attend."""

    config = InfiMMConfig
    recipes = recipes.RECIPES
    generates_with_cache = True
    freeze_policies = {  # noqa: RUF012
        "pt": _BRIDGE,
        "mtt": _BRIDGE,
        "ift": (*_BRIDGE, r"language\."),
        "ift_frozen_language": _BRIDGE,
    }
    """The paper's three stages. In the paper, IFT trains everything except the tower; according to the model card, the language model stays
    frozen for Zephyr and Vicuna."""
    parts = {  # noqa: RUF012
        "cross-attention": r"language\..*\.gated\.",
        "decoder": r"language\.",
        "tower": r"vision\.",
        "connector": r"resampler\.",
    }
    special_tokens = (END_OF_CHUNK, IMAGE)
    prompt_forms = {  # noqa: RUF012
        "caption": "{image}Output:",
        "vqa": "{image}Question:{question} Short answer:",
        "yes_no": "{image}Question:{question} Short answer:",
    }
    """Prompts of OpenFlamingo's evaluation; InfiMM's own are not published."""
    language_extras = (r"language\.decoder\.layers\.\d+\.gated\..*",)

    def build(self, model: InfiMMConfig, context: ChunkContext) -> InfiMMModel:
        from megatron_mm.families.infimm.model import InfiMMModel

        return InfiMMModel(model, context)

    def build_encoder(self, model: InfiMMConfig, context: ChunkContext) -> InfiMMEncoder:
        from megatron_mm.families.infimm.model import InfiMMEncoder

        return InfiMMEncoder(model, context)

    def image_input(self, model: InfiMMConfig) -> ImageInput:
        return image_input(model)

    def flops(self, model: InfiMMConfig, trainable: Trainable, work: StepWork) -> float:
        from megatron_mm.families.infimm.flops import infimm_flops

        return infimm_flops(model, trainable, work)

    def check_layout(self, model: InfiMMConfig, parallel: ParallelConfig, world_size: int) -> None:
        super().check_layout(model, parallel, world_size)
        counts = {"heads of the gated blocks": model.gated.num_attention_heads, "latents of an image": model.resampler.num_latents}
        for name, count in counts.items():
            if count % parallel.tensor:
                raise ValueError(f"parallel.tensor {parallel.tensor} does not divide the {count} {name}: use a divisor of it")

    def pipeline_rows(self, model: InfiMMConfig, parallel: ParallelConfig, num_tokens: int, num_images: int) -> int:
        """Return the rows for the hidden states of num_tokens tokens and the latents of num_images images."""
        from megatron_mm.parallel.stages import rows_for

        parts = parallel.tensor if parallel.sequence_parallel else 1
        vectors = max(1, num_images) * model.resampler.num_latents // parts
        return num_tokens + parts * rows_for(vectors, width=model.vision.hidden_size, hidden_size=model.decoder.hidden_size)

    def fp8_sizes(self, model: InfiMMConfig, parallel: ParallelConfig) -> dict[str, tuple[int, int]]:
        """Return the sizes of the gated blocks' products: they are in FP8 like those of the decoder layers, also those with the latents."""
        gated = model.gated
        return {
            "model.vision.hidden_size": (model.vision.hidden_size, 1),
            "model.resampler.num_latents": (model.resampler.num_latents, parallel.tensor if parallel.sequence_parallel else 1),
            "model.gated.num_attention_heads x head_dim": (gated.num_attention_heads * gated.head_dim, parallel.tensor),
            "model.gated.ffn_multiplier x model.decoder.hidden_size": (gated.ffn_multiplier * model.decoder.hidden_size, parallel.tensor),
        }

    def table(self, model: InfiMMConfig, *, vocab_rows: int | None = None) -> list[Entry]:
        from megatron_mm.families.infimm.names import infimm_table

        return infimm_table(model, vocab_rows=vocab_rows)

    def check_export(self, model: InfiMMConfig) -> None:
        from megatron_mm.hf.decoder_variants import check_exported_decoder

        check_exported_decoder(model.decoder, code="an exported InfiMM")

    def constants(self, model: InfiMMConfig) -> dict[str, torch.Tensor]:
        from megatron_mm.families.infimm.names import infimm_constants

        return infimm_constants(model)

    def write_files(
        self, model: InfiMMConfig, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None = None
    ) -> None:
        from megatron_mm.families.infimm.files import write_infimm_files

        write_infimm_files(
            model,
            out,
            experiment=experiment,
            tokenizer=tokenizer,
            dtype=dtype,
            vocab_rows=vocab_rows,
            language_is_frozen=not self.trainable(experiment.train.freeze_policy)("language.decoder.final_layernorm.weight"),
        )

    def card_notes(self, model: InfiMMConfig, out: Path, *, part: str) -> list[str]:
        from megatron_mm.families.infimm.files import card_notes

        return card_notes(model) if part == "whole" else []

    def formats(self) -> dict[str, AnyFormat]:
        from megatron_mm.families.infimm.names import FORMATS

        return FORMATS


INFIMM = InfiMMFamily()
