"""What an exported MM1 needs besides its weights: configuration, tokenizer, processor, code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mm.config import DecoderConfig, Experiment
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.hf.configs import decoder_config, tower_config
from megatron_mm.hf.tokenizer import convert_tokenizer, tokenizer_config, write_tokenizer

_CODE = ("configuration_mm1.py", "modeling_mm1.py", "processing_mm1.py")


def write_mm1_files(experiment: Experiment, tokenizer_path: Path, out: Path, *, dtype: str, vocab_rows: int | None = None) -> None:
    """Write everything but the weights into `out`.

    Args:
        experiment: of the checkpoint; its model is an MM1.
        tokenizer_path: the checkpoint's SentencePiece model.
        dtype: of the weights, by torch's name.
        vocab_rows: rows of the vocabulary that are written; None writes all.

    Raises ValueError where the tokenizer cannot be exported or has more ids than the model has embeddings.
    """
    model = experiment.model
    assert isinstance(model, MM1Config), "the family's own files"
    ids = Tokenizer.open(tokenizer_path)
    rows = vocab_rows or model.decoder.vocab_size
    if ids.vocab_size > rows:
        raise ValueError(f"{tokenizer_path} has {ids.vocab_size} ids, but {rows} embeddings are written: it is not this run's")
    special = {name: ids.special_id(name) for name in ("<pad>", "<image>")}
    tokenizer = convert_tokenizer(tokenizer_path, special=special, bos_id=ids.bos_id, eos_id=ids.eos_id)
    length = experiment.data.sequence_length
    roles = {"pad_id": ids.pad_id, "bos_id": ids.bos_id, "eos_id": ids.eos_id}
    processor = {"processor_class": "MM1Processor", "auto_map": {"AutoProcessor": "processing_mm1.MM1Processor"}}
    write_tokenizer(tokenizer, {**tokenizer_config(tokenizer, special=special, sequence_length=length, **roles), **processor}, out)
    config = hf_config(model, dtype=dtype, ids=ids, sequence_length=length, vocab_rows=vocab_rows)
    documents = {
        "config.json": config,
        "generation_config.json": generation_config(
            ids, never=(ids.bos_id, ids.pad_id, ids.image_id), rows=rows
        ),  # an image token alone means nothing
        "preprocessor_config.json": _image_processor_config(model, to_rgb=experiment.data.to_rgb),
        "processor_config.json": {
            "processor_class": "MM1Processor",
            "auto_map": {"AutoProcessor": "processing_mm1.MM1Processor"},
            "tokens_per_image": model.connector.num_tokens,
        },
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n")
    shutil.copyfile(tokenizer_path, out / "tokenizer.model")  # for those who read that, this project among them
    for name in _CODE:
        shutil.copyfile(Path(__file__).with_name("hf_code") / name, out / name)


def generation_config(ids: Tokenizer, *, never: Iterable[int], rows: int) -> dict[str, Any]:
    """generation_config.json of a model with so many embeddings.

    Args:
        never: tokens that are not generated.
    """
    never = [*never, *range(ids.vocab_size, rows)]  # rows beyond the tokenizer only fill the table up
    return {"bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id, "pad_token_id": ids.pad_id, "suppress_tokens": never}


def _image_processor_config(model: MM1Config, *, to_rgb: str) -> dict[str, Any]:
    return {
        "image_processor_type": "MM1ImageProcessor",
        "auto_map": {"AutoImageProcessor": "processing_mm1.MM1ImageProcessor", "AutoProcessor": "processing_mm1.MM1Processor"},
        "size": {"height": model.vision.image_size, "width": model.vision.image_size},
        "image_mean": list(model.vision.mean),
        "image_std": list(model.vision.std),
        "resize": model.vision.resize,
        "to_rgb": to_rgb,
    }


def hf_config(config: MM1Config, *, dtype: str, ids: Tokenizer, sequence_length: int, vocab_rows: int | None = None) -> dict[str, Any]:
    """config.json of an exported MM1.

    Args:
        dtype: of the weights, by torch's name.
        ids: the tokenizer, for the ids of special tokens.
        sequence_length: tokens of a training sequence.
        vocab_rows: rows of the vocabulary that are written; None writes all.
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
    """What a sparse decoder's `text_config` has besides a Llama's."""
    if decoder.moe is None:
        return {}
    return {
        "num_local_experts": decoder.moe.num_experts,
        "num_experts_per_tok": decoder.moe.top_k,
        "sparse_layers": list(decoder.sparse_layers),
    }
