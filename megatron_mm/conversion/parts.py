"""Export of a model's decoder or image tower alone, as a model of one of transformers' own classes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from megatron_mm.config import DecoderConfig, Experiment, VisionConfig
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.registry import family_of
from megatron_mm.hf.chat_templates import chat_control_tokens, exported_template
from megatron_mm.hf.configs import Architecture, image_processor_config, language_model_config, vision_model_config, write_document
from megatron_mm.hf.decoder_variants import check_decoder_alone, variant_of
from megatron_mm.hf.decoders import internlm2_table, llama_table
from megatron_mm.hf.mapping import Entry
from megatron_mm.hf.tokenizer import export_tokenizer, generation_config
from megatron_mm.hf.towers import clip_table

logger = logging.getLogger(__name__)


def language_table(experiment: Experiment, *, architecture: Architecture, vocab_rows: int | None) -> list[Entry]:
    """Table of the decoder's names in an architecture. Raises ValueError if the decoder does not fit the architecture."""
    decoder = experiment.model.decoder
    if decoder.moe is not None:
        raise ValueError(
            f"the decoder of {experiment.recipe} has experts, which a Llama does not have: leave out --part, or export a dense model"
        )
    if family_of(experiment.model).language_mlps != ("mlp",):
        raise ValueError(f"the decoder of {experiment.recipe} has visual experts, which a Llama does not have: leave out --part")
    if architecture == "internlm2" and decoder.tied_embeddings:
        raise ValueError(f"the decoder of {experiment.recipe} ties its output layer, which InternLM2 does not: use --architecture llama")
    check_decoder_alone(decoder)
    table = internlm2_table if architecture == "internlm2" else llama_table
    return table(decoder, vocab_rows=vocab_rows)


def vision_table(experiment: Experiment) -> list[Entry]:
    """Table of the image tower's names in CLIPVisionModel. Raises ValueError if the model has no such tower."""
    return clip_table(_tower(experiment))


def write_language_files(
    experiment: Experiment, tokenizer: Path | None, out: Path, *, dtype: str, architecture: Architecture, vocab_rows: int | None
) -> None:
    """Write the configuration, the modeling code of a decoder that is not a Llama, and the tokenizer, if the checkpoint has one."""
    decoder: DecoderConfig = experiment.model.decoder
    length, rows = experiment.data.sequence_length, vocab_rows or decoder.vocab_size
    config = language_model_config(decoder, architecture=architecture, dtype=dtype, sequence_length=length, vocab_rows=vocab_rows)
    if tokenizer is not None:
        names = family_of(experiment.model).special_tokens
        ids = Tokenizer.open(tokenizer, special=names)
        config |= {"bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id}
        if ids.vocab_size <= rows:
            template = experiment.data.chat_template
            special = (*names, *chat_control_tokens(template))
            export_tokenizer(tokenizer, out, ids=ids, special=special, longest=length, chat_template=exported_template(template))
            never = [ids.special_id(name) for name in names]
            write_document(out / "generation_config.json", generation_config(ids, never=never, rows=rows))
        else:
            shutil.copyfile(tokenizer, out / "tokenizer.model")
            logger.info(
                "the %d rows written do not include the special tokens, so tokenizer.model is copied without "
                "changes and no other tokenizer files are written",
                rows,
            )
    write_document(out / "config.json", config)
    variant = variant_of(decoder)
    for file in variant.modeling.files if variant.modeling and not variant.is_llama else ():
        shutil.copyfile(file, out / file.name)


def write_vision_files(experiment: Experiment, out: Path, *, dtype: str) -> None:
    """Write the configuration and the image processor's."""
    tower = _tower(experiment)
    write_document(out / "config.json", vision_model_config(tower, dtype=dtype))
    write_document(out / "preprocessor_config.json", image_processor_config(tower))


def _tower(experiment: Experiment) -> VisionConfig:
    tower = getattr(experiment.model, "vision", None)
    if not isinstance(tower, VisionConfig):
        raise ValueError(
            f"{experiment.recipe} has no tower that a CLIPVisionModel could hold (MM1 has one, InfiMM's is an EVA-CLIP): leave out --part"
        )
    return tower
