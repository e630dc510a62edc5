"""The tokenizer: a SentencePiece model and the special tokens of multimodal documents.

A model that `train_tokenizer` makes holds `<pad>` and `<image>` as control symbols, which no text can spell. A given model
(Llama's, say) without them gets them appended after its own vocabulary.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

PAD, IMAGE = "<pad>", "<image>"


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, model: bytes) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.vocab_size: int = self._pieces.get_piece_size()
        self.pad_id = self._special(PAD)
        self.image_id = self._special(IMAGE)

    @classmethod
    def open(cls, path: Path) -> Tokenizer:
        """Read a SentencePiece model. Raises ValueError that names the file where it is missing or is none."""
        if not path.is_file():
            raise ValueError(f"tokenizer {path} does not exist: train one with `megatron-mm prepare tokenizer`, or give --data.tokenizer")
        try:
            return cls(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None

    def _special(self, piece: str) -> int:
        """The id of a control symbol; a new one after the vocabulary where the model has none of that name."""
        found = self._pieces.piece_to_id(piece)
        if found != self._pieces.unk_id() and self._pieces.is_control(found):
            return found
        self.vocab_size += 1
        return self.vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end. A text that spells a special token gets no special id."""
        return self._pieces.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts."""
        return self._pieces.encode(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens are left out."""
        known = self._pieces.get_piece_size()
        return self._pieces.decode([i for i in ids if i < known and not self._pieces.is_control(i)])


def train_tokenizer(texts: Iterable[str], out: Path, *, vocab_size: int) -> Tokenizer:
    """Train a BPE model with byte fallback, as Llama's, and write it to `out`. The same texts give the same model.

    Raises ValueError where the texts are too few for the vocabulary.
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
        raise ValueError(f"no tokenizer of {vocab_size} tokens can be trained on these texts: {error}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model.getvalue())
    return Tokenizer(model.getvalue())
