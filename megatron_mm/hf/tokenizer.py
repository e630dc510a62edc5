"""A SentencePiece model -> tokenizer.json, with the same ids in plain transformers.

transformers has its own converters, but its version and the files next to the model determine which of them runs, and whether it treats
spaces as the model does. A tokenizer.json is self-contained.

Worked example: SentencePiece with a dummy prefix turns "a red ball" into "▁a▁red▁ball". Then it repeatedly merges the neighbouring pieces
whose union has the best score, until no union is in the vocabulary. Here a normalizer does the first step, and a list of merges in the
order of the scores the second. Text between special tokens is normalised separately, like the texts of training documents:
`<image>a red ball` becomes the image token followed by the ids of "a red ball".
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from megatron_mm.data.text.tokenizer import Tokenizer as RunTokenizer

_SPACE = "▁"
_UNUSED = re.compile(r"\[UNUSED_TOKEN_\d+\]")
"""Pieces that InternLM2 reserves. No text contains them, so they need no handling as user-defined symbols."""
_SPM: Any = sentencepiece_model_pb2  # generated at import time, so without types


def convert_tokenizer(model: Path, *, special: Mapping[str, int], bos_id: int, eos_id: int) -> Tokenizer:
    """Convert the SentencePiece BPE model at `model`, with special tokens added.

    Args:
        special: ids of the special tokens; those that the model lacks follow its pieces.
        bos_id, eos_id: ids of `<s>` and `</s>`.

    Raises ValueError if the model is not BPE with byte fallback, uses features that cannot be converted, or would get other ids.
    """
    proto = _SPM.ModelProto()
    proto.ParseFromString(model.read_bytes())
    _check_model(model, proto)
    kinds = _SPM.ModelProto.SentencePiece
    names = {index: name for name, index in special.items()}
    pieces = [names.get(i, p.piece) if _UNUSED.fullmatch(p.piece) else p.piece for i, p in enumerate(proto.pieces)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=_merges(vocab, scores), unk_token=pieces[proto.trainer_spec.unk_id], fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(steps + prefix)
    own = [piece.piece for piece in proto.pieces if piece.type in (kinds.UNKNOWN, kinds.CONTROL)]
    named = sorted({*own, *special}, key=lambda piece: vocab.get(piece, special.get(piece, 0)))
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in named])
    bos = pieces[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)])
    for piece, wanted in {**special, pieces[eos_id]: eos_id}.items():
        if tokenizer.token_to_id(piece) != wanted:
            raise ValueError(
                f"{model}: {piece} has the id {tokenizer.token_to_id(piece)} here, but {wanted} in training: use the run's own model"
            )
    return tokenizer


def tokenizer_config(
    tokenizer: Tokenizer,
    *,
    special: Iterable[str],
    pad_id: int,
    bos_id: int,
    eos_id: int,
    sequence_length: int,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """tokenizer_config.json: the special tokens' roles, padding of prompts on the left, and the chat template.

    Args:
        sequence_length: tokens of the longest text that the model accepts.
        chat_template: Jinja source (`hf.chat_templates`).
    """
    roles = {"pad_token": pad_id, "bos_token": bos_id, "eos_token": eos_id}
    names = {role: tokenizer.id_to_token(index) for role, index in roles.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "unk_token": tokenizer.model.unk_token,
        "additional_special_tokens": [name for name in special if name not in names.values()],
        "model_max_length": sequence_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **({"chat_template": chat_template} if chat_template is not None else {}),
    }


def write_tokenizer(tokenizer: Tokenizer, config: dict[str, Any], out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, and the chat template also as chat_template.jinja, which processors read."""
    (out / "tokenizer.json").write_text(_readable_by_all(tokenizer.to_str()))
    if "chat_template" in config:
        (out / "chat_template.jinja").write_text(config["chat_template"])
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _readable_by_all(text: str) -> str:
    """Write each merge in tokenizer.json as one string, "a b". Versions of tokenizers before 0.20 read only this form, and later ones read
    it, too. The code of Mono-InternVL's authors needs transformers 4.37, which uses tokenizers 0.15."""
    document = json.loads(text)
    pairs = document["model"]["merges"]
    if not any(" " in piece for pair in pairs for piece in pair):  # SentencePiece writes spaces as "▁"
        document["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def export_tokenizer(
    path: Path,
    out: Path,
    *,
    ids: RunTokenizer,
    special: Sequence[str],
    longest: int,
    chat_template: str | None = None,
    processor: dict[str, Any] | None = None,
) -> None:
    """Write the run's tokenizer for transformers, and a copy of its SentencePiece model.

    Args:
        ids: the tokenizer at `path`, opened with the family's special tokens.
        special: the family's special tokens and the chat template's control tokens.
        longest: tokens of the longest text that the model accepts.
        chat_template: Jinja source.
        processor: further entries of tokenizer_config.json, which name the processor that the tokenizer belongs to.

    Raises ValueError if the model cannot be exported.
    """
    named = {name: ids.special_id(name) for name in special}
    converted = convert_tokenizer(path, special=named, bos_id=ids.bos_id, eos_id=ids.eos_id)
    config = tokenizer_config(
        converted,
        special=named,
        pad_id=ids.pad_id,
        bos_id=ids.bos_id,
        eos_id=ids.eos_id,
        sequence_length=longest,
        chat_template=chat_template,
    )
    write_tokenizer(converted, {**config, **(processor or {})}, out)
    shutil.copyfile(path, out / "tokenizer.model")  # for programs that read SentencePiece models, this project among them


def _check_model(path: Path, proto: Any) -> None:
    trainer = proto.trainer_spec
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback:
        kind = _SPM.TrainerSpec.ModelType.Name(trainer.model_type)
        raise ValueError(
            f"{path} is a {kind} model with byte_fallback={trainer.byte_fallback}, but only BPE with byte fallback can be exported"
        )
    kind = _SPM.ModelProto.SentencePiece.USER_DEFINED
    user_defined = [piece.piece for piece in proto.pieces if piece.type == kind and not _UNUSED.fullmatch(piece.piece)]
    if user_defined:
        # transformers would split the text at each symbol and add a dummy prefix after it.
        raise ValueError(
            f"{path} has user-defined symbols {user_defined[:4]}, which cannot be exported without changing the ids around them"
        )
    if trainer.treat_whitespace_as_suffix:
        raise ValueError(f"{path} puts spaces after words (treat_whitespace_as_suffix), which cannot be exported")


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces whose union is a piece, best score first: the order in which SentencePiece merges them."""
    merges = []
    for piece, score in scores.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
        merges += [(-score, vocab[left], vocab[right], (left, right)) for left, right in known]
    return [pair for *_, pair in sorted(merges)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def generation_config(ids: RunTokenizer, *, never: Iterable[int], rows: int) -> dict[str, Any]:
    """generation_config.json of a model.

    Args:
        never: tokens that are not generated.
        rows: number of embeddings.
    """
    never = [*never, *range(ids.vocab_size, rows)]  # rows beyond the tokenizer's are padding
    return {"bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id, "pad_token_id": ids.pad_id, "suppress_tokens": never}


def open_run_tokenizer(path: Path, *, special: Sequence[str], rows: int) -> RunTokenizer:
    """Open a run's tokenizer with its family's special tokens. Raises ValueError if it has more ids than `rows` embeddings."""
    ids = RunTokenizer.open(path, special=special)
    if ids.vocab_size > rows:
        raise ValueError(f"{path} has {ids.vocab_size} ids, but only {rows} embeddings are written: it is not the tokenizer of this run")
    return ids
