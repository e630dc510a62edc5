"""No text can spell the tokenizer's special tokens, and training is reproducible."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from megatron_mm.data.text.tokenizer import IMAGE, PAD, Tokenizer, train_tokenizer

TEXTS = [f"a {colour} {shape} and {n} more" for colour in ("red", "green", "blue") for shape in ("circle", "square") for n in range(40)]


def test_training_is_repeatable(tmp_path: Path) -> None:
    first = train_tokenizer(TEXTS, tmp_path / "a.model", vocab_size=320)
    second = train_tokenizer(TEXTS, tmp_path / "b.model", vocab_size=320)
    assert first.fingerprint == second.fingerprint == Tokenizer.open(tmp_path / "a.model").fingerprint


def test_any_text_comes_back(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, tmp_path / "a.model", vocab_size=320)
    for text in ("a red circle", "  two  spaces", "tabs\tand\nlines", "Ünïcödé 漢字 🙂", "12345"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_cannot_spell_a_special_token(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([*TEXTS, "<image> <pad> </s>"], tmp_path / "a.model", vocab_size=330)
    ids = tokenizer.encode("<image> <pad> <s> </s>")
    assert max(tokenizer.image_id, tokenizer.pad_id) < sentencepiece.SentencePieceProcessor(str(tmp_path / "a.model")).get_piece_size()
    assert not {tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == "<image> <pad> <s> </s>"
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.image_id, tokenizer.eos_id]) == "<image> <pad> <s> </s>"


def test_a_model_without_our_symbols_gets_them_after_its_vocabulary(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, model_type="bpe", hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = Tokenizer(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    assert (tokenizer.pad_id, tokenizer.image_id, tokenizer.vocab_size) == (pieces, pieces + 1, pieces + 2)
    assert tokenizer.decode([*tokenizer.encode("a red circle"), tokenizer.image_id]) == "a red circle"
    other = Tokenizer(model.getvalue(), special=("<|endofchunk|>", "<image>", "</s>", "<|endofchunk|>"))
    assert (other.special_id("<|endofchunk|>"), other.image_id, other.vocab_size) == (pieces, pieces + 1, pieces + 2)
    assert other.special_id("</s>") == other.eos_id < pieces, "a control symbol of the model keeps its id"
    assert other.pad_id == other.encode("漢")[-1], "without a padding token the unknown one pads"
    assert other.fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match=r"the tokenizer has no control token <img>"):
        other.special_id("<img>")


def test_a_text_cannot_spell_a_control_token_that_is_a_user_defined_piece(tmp_path: Path) -> None:
    model = io.BytesIO()
    spellings = ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_1]"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, *("[UNUSED_TOKEN_145]" for _ in range(50))]),
        model_writer=model,
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=spellings,
        minloglevel=2,
    )
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    end, begin, other = (plain.piece_to_id(piece) for piece in spellings)
    text = "red [UNUSED_TOKEN_145][UNUSED_TOKEN_146] square [UNUSED_TOKEN_1]"
    assert {begin, end, other} <= set(plain.encode(text)), "by itself the model makes control tokens of these characters"
    tokenizer = Tokenizer(model.getvalue())
    assert (tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>")) == (begin, end)
    together = [number for ids in tokenizer.encode_together([text, "[UNUSED_TOKEN_145]"]) for number in ids]
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text]), together):
        assert not {begin, end} & set(ids) and other in ids, "what no template uses stays a piece"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a red circle") == plain.encode("a red circle")


def test_a_control_token_under_its_own_name_may_be_a_user_defined_piece(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    tokenizer = Tokenizer(model.getvalue())
    end = tokenizer.special_id("<|im_end|>")
    assert tokenizer.piece(end) == ("<|im_end|>", True) and end not in tokenizer.encode("red<|im_end|>")


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.model does not exist: train one"):
        Tokenizer.open(tmp_path / "nowhere.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.model is not a SentencePiece model: it is empty"):
        Tokenizer.open(tmp_path / "empty.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"bad.model is not a SentencePiece model"):
        Tokenizer.open(tmp_path / "bad.model")
    with pytest.raises(
        ValueError, match=r"no tokenizer of 100 tokens can be trained on these texts: the 256 bytes.* already need 26\d, so"
    ):
        train_tokenizer(["a"], tmp_path / "c.model", vocab_size=100)
    with pytest.raises(ValueError, match=r"can be trained on these texts: they are empty$"):
        train_tokenizer([" "], tmp_path / "c.model", vocab_size=300)


def test_the_names_of_the_special_tokens() -> None:
    assert (PAD, IMAGE) == ("<pad>", "<image>")


@pytest.mark.parametrize(("missing", "message"), [("bos_id", r"begin \(bos_id\)"), ("eos_id", r"end \(eos_id\)")])
def test_a_model_without_begin_or_end_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    """T5's models have no begin; its id of -1 would end up among a document's tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cross on a blue square"] * 20),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **{missing: -1},
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=rf"tokenizer\.model: the SentencePiece model has no token for the {message} of a document"):
        Tokenizer.open(tmp_path / "tokenizer.model")
