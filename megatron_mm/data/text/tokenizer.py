"""The tokenizer: a SentencePiece model and the special tokens of multimodal documents.

The model family defines the special tokens (`Family.special_tokens`). One that the SentencePiece model has as a control symbol, which no
text can produce, keeps its id; the others are appended after the vocabulary, in the family's order.

Worked example: Llama's model of 32000 pieces and the special tokens `<|endofchunk|>`, `<image>` make 32002 ids: `<|endofchunk|>` is 32000,
`<image>` 32001. Models from `train_tokenizer` already contain `<pad>` and `<image>`.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

PAD, IMAGE = "<pad>", "<image>"
_SPM: Any = sentencepiece_pb2  # generated at import time, so without types
_MODEL: Any = sentencepiece_model_pb2
_RENAMED = {"<|im_start|>": "[UNUSED_TOKEN_146]", "<|im_end|>": "[UNUSED_TOKEN_145]"}
"""Names that InternLM2's chat models give to two unused pieces of its SentencePiece model."""


class Tokenizer:
    """Converts text to token ids and back."""

    def __init__(self, model: bytes, *, special: Sequence[str] = (PAD, IMAGE)) -> None:
        """
        Args:
            model: a serialized SentencePiece model.
            special: tokens that must have ids. Tokens that the model lacks get the next free ids, in this order.

        Raises ValueError if the model has no token for the begin or the end of a document.
        """
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=_without_spellable_controls(model))
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        """Hash of the SentencePiece model alone, because special tokens do not change how text is tokenized."""
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        for name, found in (("begin (bos_id)", self.bos_id), ("end (eos_id)", self.eos_id)):
            if found < 0:
                raise ValueError(f"the SentencePiece model has no token for the {name} of a document: use one that has both")
        self.num_pieces: int = self._pieces.get_piece_size()
        """Number of ids of the model itself, without appended special tokens."""
        self.vocab_size: int = self.num_pieces
        self._appended: dict[str, int] = {}
        for name in special:
            if self._control(name) is None and name not in self._appended:
                self._appended[name] = self.vocab_size
                self.vocab_size += 1
        pad = self._find(PAD)
        self.pad_id: int = self._pieces.unk_id() if pad is None else pad
        """Id of the padding token; the unknown token if there is no `<pad>`, because padding is never supervised."""

    @classmethod
    def open(cls, path: Path, *, special: Sequence[str] = (PAD, IMAGE)) -> Tokenizer:
        """Read a SentencePiece model. Raises ValueError, naming the file, if it is missing or not a SentencePiece model."""
        if not path.is_file():
            raise ValueError(f"tokenizer {path} does not exist: train one with `megatron-mm prepare tokenizer`, or name one that exists")
        model = path.read_bytes()
        try:
            if not model:
                raise RuntimeError("it is empty")
            return cls(model, special=special)
        except (RuntimeError, DecodeError) as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def image_id(self) -> int:
        return self.special_id(IMAGE)

    def special_id(self, name: str) -> int:
        """Return the id of a special token. Raises ValueError if neither the model nor the family has a token of that name."""
        found = self._find(name)
        if found is None:
            raise ValueError(f"the tokenizer has no control token {name}: use a SentencePiece model that has it, or a family that adds it")
        return found

    def _find(self, name: str) -> int | None:
        control = self._control(name)
        return self._appended.get(name) if control is None else control

    def _control(self, name: str) -> int | None:
        """Return the id of a control symbol of the SentencePiece model, or of the piece that serves as one (`_RENAMED`)."""
        found = self._pieces.piece_to_id(name)
        if found != self._pieces.unk_id() and self._pieces.is_control(found):
            return found
        renamed = self._pieces.piece_to_id(_RENAMED[name]) if name in _RENAMED else self._pieces.unk_id()
        return renamed if renamed != self._pieces.unk_id() else None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS and EOS. A text that contains the name of a special token does not get its id."""
        return self._pieces.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of many texts."""
        return self._pieces.encode(texts)

    def encode_together(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts as one string and return the token ids of each text: the tokens that end in it."""
        joined = _SPM.SentencePieceText()
        joined.ParseFromString(self._pieces.encode("".join(texts), out_type="serialized_proto"))
        ends = list(itertools.accumulate(len(text.encode()) for text in texts))
        ids: list[list[int]] = [[] for _ in texts]
        for piece in joined.pieces:
            # A piece is bytes [begin, end) of the string. If a character has several pieces, all but the last are empty, at its beginning.
            last_byte = min(max(piece.begin, piece.end - 1), ends[-1] - 1)
            ids[bisect.bisect_right(ends, last_byte)].append(piece.id)
        return ids

    def piece(self, token: int) -> tuple[str, bool]:
        """Return the readable form of a single token, and whether it is a control token, which no text can produce."""
        for name, appended in self._appended.items():
            if token == appended:
                return name, True
        if token >= self.num_pieces or self._pieces.is_control(token):
            return (self._pieces.id_to_piece(token) if token < self.num_pieces else f"<{token}>"), True
        return self._pieces.id_to_piece(token).replace("\u2581", " "), False

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, without special tokens."""
        known = self._pieces.get_piece_size()
        renamed = {self._find(name) for name in _RENAMED}
        return self._pieces.decode([i for i in ids if i < known and i not in renamed and not self._pieces.is_control(i)])


def _without_spellable_controls(model: bytes) -> bytes:
    """Turn pieces of a SentencePiece model that serve as control tokens into control symbols, so that no text can produce them.

    InternLM2's model has [UNUSED_TOKEN_145] as a user-defined piece, so a text with these characters would end the user's turn. All ids
    stay the same, and so do the tokens of every text that does not contain such a piece.
    """
    proto = _MODEL.ModelProto.FromString(model)
    control = _MODEL.ModelProto.SentencePiece.CONTROL
    spellable = [piece for piece in proto.pieces if piece.piece in (*_RENAMED, *_RENAMED.values()) and piece.type != control]
    for piece in spellable:
        piece.type = control
    return proto.SerializeToString() if spellable else model


def train_tokenizer(texts: Iterable[str], out: Path, *, vocab_size: int) -> Tokenizer:
    """Train a BPE model with byte fallback, like Llama's, and write it to `out`. The same texts produce the same model.

    Raises ValueError if there are no texts, or if the vocabulary is too small for their characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line.strip()),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            control_symbols=[PAD, IMAGE],
            hard_vocab_limit=False,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} tokens can be trained on these texts: {_why_not(str(error))}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model.getvalue())
    return Tokenizer(model.getvalue())


def _why_not(error: str) -> str:
    """Return what a message of SentencePiece's trainer means, or the message itself if it is unknown."""
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"the 256 bytes, the control tokens and the characters of these texts already need {found[1]}, so --vocab-size must be larger"
        )
    return "they are empty" if "!sentences_.empty()" in error else error
