"""A model family that is not in the package: patches go straight into the decoder through one linear layer, as in Fuyu.

    megatron-mm train examples/extending/patch_family.py:debug_patches --run-dir runs/patches --data.path data/demo
    megatron-mm convert to-hf runs/patches patches-hf
    megatron-mm convert from-hf runs/again --recipe examples/extending/patch_family.py:debug_patches --whole patches-hf

Shape legend: n images, g patches along one side, p = g * g patches, h decoder width, t packed tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from megatron_mm.config import Experiment, ModelConfig
from megatron_mm.config.checks import require
from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.image_input import ImageInput, fill_colour
from megatron_mm.families.base import Family
from megatron_mm.families.debug import DEBUG_DECODER, debug_experiment
from megatron_mm.families.registry import register_family
from megatron_mm.flops import FlopCount, StepWork, Trainable, count_decoder
from megatron_mm.hf.configs import decoder_config, write_document
from megatron_mm.hf.decoders import llama_table
from megatron_mm.hf.formats import AnyFormat, Format
from megatron_mm.hf.mapping import Entry, both
from megatron_mm.hf.settings import decoder_settings, under
from megatron_mm.hf.tokenizer import convert_tokenizer, open_run_tokenizer, tokenizer_config, write_tokenizer
from megatron_mm.models.chunk import Chunk, document_bounds
from megatron_mm.models.context import ChunkContext
from megatron_mm.models.plain import PixelNormalization, linear

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class PatchFamilyConfig(ModelConfig):
    """A decoder, and how images are cut."""

    family: ClassVar[str] = "patches"
    image_size: int
    """Side of the square image, pixels."""
    patch_size: int
    """Side of a patch, pixels; each becomes a token."""

    def __post_init__(self) -> None:
        require(self.image_size % self.patch_size == 0, f"patch_size {self.patch_size} does not divide image_size {self.image_size}")

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch_size) ** 2


class Patches(nn.Module):
    """Pixels [n, 3, H, W] uint8 -> tokens [n, p, h]."""

    def __init__(self, config: PatchFamilyConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.dtype = config.patch_size, dtype
        self.normalize = PixelNormalization(MEAN, STD)
        self.projection = linear(3 * config.patch_size**2, config.decoder.hidden_size, dtype=dtype)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        squares = self.normalize(pixels).unflatten(2, (-1, self.size)).unflatten(4, (-1, self.size))  # [n, 3, g, size, g, size]
        return self.projection(squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).to(self.dtype))


class PatchModel(Chunk):
    """One pipeline chunk."""

    def __init__(self, config: PatchFamilyConfig, context: ChunkContext) -> None:
        encoders: dict[str, nn.Module] = {"patches": Patches(config, dtype=context.dtype)} if context.pre_process else {}
        super().__init__(config.decoder, context, image=PATCHES.image_input(config), encoders=encoders)

    def forward(self, batch: PackedBatch, *, pipeline_rows: int = 0, with_loss: bool = True) -> torch.Tensor:
        """Hidden states for the next stage; on the last one losses [1, t] or logits."""
        decoder_input = None
        if self.pre_process:
            decoder_input = self.embed(batch, self.sharing.gather(self.patches(self.own_pixels(batch)), owners=batch.image_owners))
        return self.decode(batch, decoder_input, document_bounds(batch), with_loss=with_loss)


class PatchFamily(Family[PatchFamilyConfig]):
    """All that the package asks of a family."""

    config = PatchFamilyConfig
    freeze_policies = {"all": ("",), "patches_only": (r"patches\.",)}  # noqa: RUF012

    def build(self, model: PatchFamilyConfig, context: ChunkContext) -> PatchModel:
        return PatchModel(model, context)

    def image_input(self, model: PatchFamilyConfig) -> ImageInput:
        return ImageInput(size=model.image_size, tokens=model.num_tokens, fill=fill_colour(MEAN))

    def flops(self, model: PatchFamilyConfig, trainable: Trainable, work: StepWork) -> float:
        count = FlopCount(trainable)
        product = 2.0 * work.num_images * model.num_tokens * 3 * model.patch_size**2 * model.decoder.hidden_size
        count.weight("patches.projection.weight", product)
        count_decoder(count, model.decoder, work)
        return count.flops

    # -- Conversion. A family that is never exported leaves out all that follows.

    def table(self, model: PatchFamilyConfig, *, vocab_rows: int | None = None) -> list[Entry]:
        return [*both("patches.projection", "patch_projection"), *llama_table(model.decoder, body="language_model.", vocab_rows=vocab_rows)]

    def write_files(
        self, model: PatchFamilyConfig, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None = None
    ) -> None:
        rows, length = vocab_rows or model.decoder.vocab_size, experiment.data.sequence_length
        ids = open_run_tokenizer(tokenizer, special=self.special_tokens, rows=rows)
        special = {name: ids.special_id(name) for name in self.special_tokens}
        converted = convert_tokenizer(tokenizer, special=special, bos_id=ids.bos_id, eos_id=ids.eos_id)
        roles = {"pad_id": ids.pad_id, "bos_id": ids.bos_id, "eos_id": ids.eos_id}
        write_tokenizer(converted, tokenizer_config(converted, special=special, sequence_length=length, **roles), out)
        (out / "tokenizer.model").write_bytes(tokenizer.read_bytes())
        shape = {name: value for name, value in asdict(model).items() if name != "decoder"}
        text = decoder_config(model.decoder, sequence_length=length, vocab_rows=vocab_rows)
        write_document(out / "config.json", {"model_type": "patches", "dtype": dtype, **shape, "text_config": text})

    def formats(self) -> dict[str, AnyFormat]:
        return {
            "patches": Format(
                part="whole",
                signature="patch_projection.weight",
                prefixes={"": ()},
                config=PatchFamilyConfig,
                table=lambda model, naming: self.table(model),
                settings=settings,
                model_types=("patches",),
            )
        }


def settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> the fields of a PatchFamilyConfig that must be equal."""
    shape = {name: document[name] for name in ("image_size", "patch_size")}
    return {**shape, **under("decoder", decoder_settings(document["text_config"]))}


PATCHES = PatchFamily()
register_family(PATCHES)


def debug_patches() -> Experiment:
    """A tiny model for `megatron-mm prepare demo` data: 16 patches of 8 x 8 pixels."""
    return debug_experiment("debug_patches", PatchFamilyConfig(decoder=DEBUG_DECODER, image_size=32, patch_size=8))
