"""MM1 as a family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.data.image_input import ImageInput
from megatron_mm.families.base import Family
from megatron_mm.families.mm1 import fine_tuning, recipes
from megatron_mm.families.mm1.config import MM1Config, image_input
from megatron_mm.flops import StepWork, Trainable

if TYPE_CHECKING:
    from megatron_mm.families.mm1.model import MM1Encoder, MM1Model
    from megatron_mm.hf.formats import AnyFormat
    from megatron_mm.hf.mapping import Entry
    from megatron_mm.models.context import ChunkContext


class MM1Family(Family[MM1Config]):
    """CLIP tower -> connector -> image tokens in the decoder's sequence. Everything is trainable in pre-training and fine-tuning."""

    config = MM1Config
    plain_layers = True
    recipes = (*recipes.RECIPES, *fine_tuning.RECIPES)
    adapts = ("vision.image_size", "sub_images")
    generates_with_cache = True

    def build(self, model: MM1Config, context: ChunkContext) -> MM1Model:
        from megatron_mm.families.mm1.model import MM1Model

        return MM1Model(model, context)

    def build_encoder(self, model: MM1Config, context: ChunkContext) -> MM1Encoder:
        from megatron_mm.families.mm1.model import MM1Encoder

        return MM1Encoder(model, context)

    def image_input(self, model: MM1Config) -> ImageInput:
        return image_input(model)

    def check_layout(self, model: MM1Config, parallel: ParallelConfig, world_size: int) -> None:
        from megatron_mm.models.connectors import connector_of

        connector_of(model.connector)
        super().check_layout(model, parallel, world_size)

    def flops(self, model: MM1Config, trainable: Trainable, work: StepWork) -> float:
        from megatron_mm.families.mm1.flops import mm1_flops

        return mm1_flops(model, trainable, work)

    def table(self, model: MM1Config, *, vocab_rows: int | None = None) -> list[Entry]:
        from megatron_mm.families.mm1.names import mm1_table

        return mm1_table(model, vocab_rows=vocab_rows)

    def check_export(self, model: MM1Config) -> None:
        from megatron_mm.families.mm1.files import check_mm1_export

        check_mm1_export(model)

    def write_files(
        self, model: MM1Config, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None = None
    ) -> None:
        from megatron_mm.families.mm1.files import write_mm1_files

        write_mm1_files(model, out, experiment=experiment, tokenizer=tokenizer, dtype=dtype, vocab_rows=vocab_rows)

    def card_notes(self, model: MM1Config, out: Path, *, part: str) -> list[str]:
        if part != "whole":
            return []
        return [
            "",
            "`<image>` marks the place of an image:",
            "",
            "```python",
            "from PIL import Image",
            "",
            'inputs = processor(images=[Image.open("picture.jpg")], text="<image>", return_tensors="pt")',
            'new = model.generate(**inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]',
            "print(processor.decode(new, skip_special_tokens=True))",
            "```",
        ]

    def formats(self) -> dict[str, AnyFormat]:
        from megatron_mm.families.mm1.names import FORMATS

        return FORMATS


MM1 = MM1Family()
