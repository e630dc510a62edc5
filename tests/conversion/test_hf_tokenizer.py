"""The exported tokenizer yields SentencePiece's ids in plain transformers."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from support.trained import TEXTS
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.hf.tokenizer import convert_tokenizer, tokenizer_config, write_tokenizer

STRANGE = [
    "",
    " ",
    "   ",
    "a",
    " a red circle",
    "a red circle ",
    "a  red   circle",
    "A RED CIRCLE?!",
    "aaaaaaaaaaaaa",
    "circlecirclestar",
    "a\tred\ncircle\r\n",
    "1234567890 3.14 -7",
    "naïve café ÀÉÎ ﬁ ①",
    "日本語の文章です。",
    "🙂👩‍👩‍👧 \U0001f9ff",
    "e\u0301 \u00a0 \u200b \ufeff",
    "▁ ▁▁ a▁red",
    "\x00\x01 \x7f",
    "<0x41> [INST] {json: [1, 2]}",
    "x" * 2000,
]


def export(path: Path, out: Path) -> PreTrainedTokenizerBase:
    ids = Tokenizer.open(path)
    out.mkdir()
    special, roles = {"<pad>": ids.pad_id, "<image>": ids.image_id}, {"bos_id": ids.bos_id, "eos_id": ids.eos_id}
    tokenizer = convert_tokenizer(path, special=special, **roles)
    write_tokenizer(tokenizer, tokenizer_config(tokenizer, special=special, pad_id=ids.pad_id, sequence_length=64, **roles), out)
    return AutoTokenizer.from_pretrained(out)


def train(path: Path, **options: object) -> Path:
    """Train a SentencePiece model with other settings than our own."""
    model = io.BytesIO()
    settings = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 350, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **{**settings, **options})
    path.write_bytes(model.getvalue())
    return path


def test_same_ids_and_same_text(tokenizer_path: Path, tmp_path: Path) -> None:
    ours, theirs = Tokenizer.open(tokenizer_path), export(tokenizer_path, tmp_path / "out")
    for text in TEXTS + STRANGE:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids), repr(text)


@pytest.mark.parametrize(
    "options",
    [
        {},  # nmt_nfkc, extra spaces removed
        {"normalization_rule_name": "identity", "add_dummy_prefix": False},
        {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    ],
    ids=["defaults", "no dummy prefix", "case folded"],
)
def test_given_models_of_other_settings(options: dict[str, Any], tmp_path: Path) -> None:
    """A given model's own treatment of spaces and characters is kept."""
    path = train(tmp_path / "given.model", **options)
    ours, theirs = Tokenizer.open(path), export(path, tmp_path / "out")
    for text in TEXTS[::10] + STRANGE:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), repr(text)


def test_special_tokens_have_the_runs_ids(tokenizer_path: Path, tmp_path: Path) -> None:
    ours, theirs = Tokenizer.open(tokenizer_path), export(tokenizer_path, tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    document = theirs("<image><image>a red circle<image>a star</s>")["input_ids"]
    image = ours.image_id
    assert document == [ours.bos_id, image, image, *ours.encode("a red circle"), image, *ours.encode("a star"), ours.eos_id]


def test_a_model_without_image_token_gets_it_after_its_pieces(tmp_path: Path) -> None:
    path = train(tmp_path / "given.model")
    ours, theirs = Tokenizer.open(path), export(path, tmp_path / "out")
    assert ours.image_id == ours.vocab_size - 1
    assert theirs.convert_tokens_to_ids("<image>") == ours.image_id
    assert len(theirs) == ours.vocab_size


IDS: dict[str, Any] = {"special": {"<pad>": 3, "<image>": 4}, "bos_id": 1, "eos_id": 2}


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "unigram.model", model_type="unigram", vocab_size=300)
    with pytest.raises(ValueError, match="UNIGRAM model"):
        convert_tokenizer(path, **IDS)
    with pytest.raises(ValueError, match="byte_fallback=False"):
        convert_tokenizer(train(tmp_path / "plain.model", byte_fallback=False), **IDS)
    with pytest.raises(ValueError, match="user-defined symbols"):
        convert_tokenizer(train(tmp_path / "symbols.model", user_defined_symbols=["star"]), **IDS)


def test_ids_of_another_run_are_refused(tokenizer_path: Path) -> None:
    ids = Tokenizer.open(tokenizer_path)
    with pytest.raises(ValueError, match=f"<image> has the id {ids.image_id} here, but 77 in training"):
        convert_tokenizer(tokenizer_path, special={"<pad>": ids.pad_id, "<image>": 77}, bos_id=ids.bos_id, eos_id=ids.eos_id)
