"""The files of an exported MM1 besides its weights: configuration, tokenizer, processor, modeling code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mm.config import DecoderConfig, Experiment
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.hf.chat_templates import chat_control_tokens, exported_template
from megatron_mm.hf.configs import copy_code, decoder_config, tower_config, write_document
from megatron_mm.hf.decoder_variants import check_exported_decoder
from megatron_mm.hf.field_tables import CLIP_FIELDS, DECODER_FIELDS, EXPERT_FIELDS
from megatron_mm.hf.fields import ConfigField, nested, part_of, read_fields
from megatron_mm.hf.settings import decoder_values, explained_fields, under
from megatron_mm.hf.tokenizer import export_tokenizer, generation_config, open_run_tokenizer

_EXPORTED_CONNECTORS = ("average", "attention", "c_abstractor")
_CODE = ("configuration_mm1.py", "modeling_mm1.py", "processing_mm1.py")
_SHARED_CODE = ("square_images.py", "image_prompts.py", "image_tokens.py")


def check_mm1_export(model: MM1Config) -> None:
    """Raise ValueError for a connector or a decoder variant that modeling_mm1.py does not support."""
    if model.connector.kind not in _EXPORTED_CONNECTORS:
        raise ValueError(
            f"exported MM1 models have code for the connectors {', '.join(_EXPORTED_CONNECTORS)}, but not for "
            f"{model.connector.kind!r}: add it to families/mm1/hf_code/modeling_mm1.py, or export with --part language or --part vision"
        )
    check_exported_decoder(model.decoder, code="an exported MM1")


def write_mm1_files(
    model: MM1Config, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None = None
) -> None:
    """Write configuration, tokenizer, processor and code: see `Family.write_files`."""
    names = ("<pad>", "<image>")
    rows = vocab_rows or model.decoder.vocab_size
    ids = open_run_tokenizer(tokenizer, special=names, rows=rows)
    length, template = experiment.data.sequence_length, experiment.data.chat_template
    export_tokenizer(
        tokenizer,
        out,
        ids=ids,
        special=(*names, *chat_control_tokens(template)),
        longest=length,
        chat_template=exported_template(template),
        processor={"processor_class": "MM1Processor", "auto_map": {"AutoProcessor": "processing_mm1.MM1Processor"}},
    )
    config = hf_config(model, dtype=dtype, ids=ids, sequence_length=length, vocab_rows=vocab_rows)
    documents = {
        "config.json": config,
        "generation_config.json": generation_config(
            ids, never=(ids.bos_id, ids.pad_id, ids.image_id), rows=rows
        ),  # generated text must not contain image tokens
        "preprocessor_config.json": _image_processor_config(model, to_rgb=experiment.data.to_rgb),
        "processor_config.json": {
            "processor_class": "MM1Processor",
            "auto_map": {"AutoProcessor": "processing_mm1.MM1Processor"},
            "tokens_per_image": model.connector.num_tokens,  # tokens of one square
        },
    }
    for name, document in documents.items():
        write_document(out / name, document)
    copy_code(out, Path(__file__).with_name("hf_code"), _CODE, shared=_SHARED_CODE)


def _image_processor_config(model: MM1Config, *, to_rgb: str) -> dict[str, Any]:
    return {
        "image_processor_type": "MM1ImageProcessor",
        "auto_map": {"AutoImageProcessor": "processing_mm1.MM1ImageProcessor", "AutoProcessor": "processing_mm1.MM1Processor"},
        "size": {"height": model.vision.image_size, "width": model.vision.image_size},
        "image_mean": list(model.vision.mean),
        "image_std": list(model.vision.std),
        "resize": model.vision.resize,
        "to_rgb": to_rgb,
        **({} if model.sub_images is None else {"sub_images": asdict(model.sub_images)}),
    }


def hf_config(config: MM1Config, *, dtype: str, ids: Tokenizer, sequence_length: int, vocab_rows: int | None = None) -> dict[str, Any]:
    """Return config.json of an exported MM1.

    Args:
        dtype: type of the weights, by torch's name.
        ids: the tokenizer, for the ids of special tokens.
        sequence_length: tokens of a training sequence.
        vocab_rows: number of vocabulary rows to write; None writes all.
    """
    decoder, vision = config.decoder, config.vision
    return {
        "architectures": ["MM1ForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_mm1.MM1Config",
            "AutoModelForImageTextToText": "modeling_mm1.MM1ForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_mm1.MM1ForConditionalGeneration",
        },
        "model_type": "mm1",
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        "image_token_id": ids.image_id,
        "bos_token_id": ids.bos_id,
        "eos_token_id": ids.eos_id,
        "pad_token_id": ids.pad_id,
        "tie_word_embeddings": decoder.tied_embeddings,
        "connector_config": asdict(config.connector),
        "vision_config": tower_config(vision),
        "text_config": {
            "model_type": "llama",
            **decoder_config(decoder, sequence_length=sequence_length, vocab_rows=vocab_rows),
            **_experts_config(decoder),
            "bos_token_id": ids.bos_id,
            "eos_token_id": ids.eos_id,
        },
    }


def _experts_config(decoder: DecoderConfig) -> dict[str, Any]:
    """Return the fields that a sparse decoder's `text_config` has in addition to a Llama's."""
    if decoder.moe is None:
        return {}
    return {
        "num_local_experts": decoder.moe.num_experts,
        "num_experts_per_tok": decoder.moe.top_k,
        "sparse_layers": list(decoder.sparse_layers),
    }


_TIED = "tie_word_embeddings"
CONFIG_FIELDS = (
    ConfigField("architectures", must_be=(["MM1ForConditionalGeneration"],), default=["MM1ForConditionalGeneration"]),
    ConfigField("model_type", must_be=("mm1",), default="mm1"),
    ConfigField("image_token_id", kind=int, note="determined from the tokenizer"),
    ConfigField(_TIED, kind=bool, read="decoder.tied_embeddings", default=True),
    ConfigField("connector_config.kind", kind=str, read="connector.kind", default="c_abstractor"),
    ConfigField("connector_config.num_tokens", kind=int, read="connector.num_tokens", default=144),
    ConfigField("connector_config.hidden_size", kind=int, read="connector.hidden_size", default=1024),
    ConfigField("connector_config.depth", kind=int, read="connector.depth", default=3),
    ConfigField("connector_config.num_attention_heads", kind=int, read="connector.num_attention_heads", default=16),
    *nested("vision_config", CLIP_FIELDS, ours="vision"),
    ConfigField(f"text_config.{_TIED}", kind=bool, note="the whole model's value is used"),
    *nested("text_config", (field for field in DECODER_FIELDS if field.path != _TIED), ours="decoder"),
    *nested("text_config", EXPERT_FIELDS, ours="decoder"),
)
"""How each field of an exported MM1's config.json is read."""


def mm1_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """Convert config.json of an exported MM1 to fields of an MM1Config (dotted names). Raises ValueError if our model does not support a
    setting."""
    text, _ = part_of(document, "text_config"), part_of(document, "vision_config")
    found = read_fields(document, CONFIG_FIELDS, also=explained_fields(text, part="text_config."))
    return {**found, **under("decoder", decoder_values(text))}
