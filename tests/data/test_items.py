"""From items to ids: adjacent texts of a rendered template are tokenized as one string, all others separately."""

from __future__ import annotations

import io
import itertools
import random
from pathlib import Path

import pytest
import sentencepiece

from megatron_mm.data.text.items import Control, ImageReference, Text, encode_items
from megatron_mm.data.text.tokenizer import Tokenizer, train_tokenizer

WORDS = ("a red circle", "USER: what colour?", "ASSISTANT: blue", "two squares above", "the digit 7")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([f"{text} and {n}" for text in WORDS for n in range(30)], tmp_path_factory.mktemp("t") / "m", vocab_size=360)


@pytest.fixture(scope="module")
def normalizing() -> Tokenizer:
    """A model that normalizes texts before tokenizing them: NFKC, and single spaces."""
    model = io.BytesIO()
    texts = iter([f"{text} and {n}" for text in WORDS for n in range(30)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


def test_texts_that_do_not_continue_are_tokenized_alone(tokenizer: Tokenizer) -> None:
    items = [Text("a red"), Text("circle"), ImageReference("0.jpg"), Text("blue"), Control("</s>"), Text("two")]
    expected = [
        tokenizer.encode("a red"),
        tokenizer.encode("circle"),
        tokenizer.encode("blue"),
        [tokenizer.eos_id],
        tokenizer.encode("two"),
    ]
    assert encode_items(items, tokenizer) == expected
    assert tokenizer.encode("a red") + tokenizer.encode("circle") != tokenizer.encode("a redcircle")


def test_a_text_that_continues_has_the_tokens_it_has_in_the_whole(tokenizer: Tokenizer) -> None:
    """The space before an answer is part of the answer's first token, though the template contains it."""
    question, answer = encode_items([Text("ASSISTANT: ", counted=False), Text("blue", continues=True)], tokenizer)
    assert question + answer == tokenizer.encode("ASSISTANT: blue")
    assert answer == tokenizer.encode("blue") and len(answer) == 1
    assert question == tokenizer.encode("ASSISTANT:")


def test_images_and_control_tokens_end_a_string(tokenizer: Tokenizer) -> None:
    for between in (ImageReference("0.jpg"), Control("</s>")):
        found = encode_items([Text("a red"), between, Text("circle", continues=True)], tokenizer)
        assert [ids for ids in found if ids != [tokenizer.eos_id]] == [tokenizer.encode("a red"), tokenizer.encode("circle")]
    assert encode_items([], tokenizer) == []


@pytest.mark.parametrize("name", ["tokenizer", "normalizing"])
def test_tokens_belong_to_the_text_of_their_last_character(name: str, request: pytest.FixtureRequest) -> None:
    """For any string split anywhere, no token is lost or doubled, and decoding the first parts' tokens yields no more than these parts."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    for _ in range(300):
        whole = "".join(rng.choice([*WORDS, " ", "\n", "é漢", "🙂", "½", "ﬁ", "x"]) for _ in range(rng.randint(1, 6)))
        cuts = sorted(rng.randint(0, len(whole)) for _ in range(rng.randint(1, 3)))
        parts = [whole[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        found = tokenizer.encode_together(parts)
        assert len(found) == len(parts) and list(itertools.chain(*found)) == tokenizer.encode(whole)
        if name == "normalizing":
            continue  # decoding does not restore the original text
        for number in range(len(parts)):
            said = tokenizer.decode(itertools.chain(*found[: number + 1])).rstrip("\N{REPLACEMENT CHARACTER}")
            before = "".join(parts[: number + 1])
            assert before.startswith(said), "no token that reaches into the next part"
            left = len(list(itertools.chain(*found[: number + 1])))
            rest = tokenizer.decode(tokenizer.encode(whole)[: left + 1]).rstrip("\N{REPLACEMENT CHARACTER}")
            assert before == whole or len(rest) >= len(before), "and every token that does not"


def test_an_unknown_control_token_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no control token <\|im_start\|>"):
        encode_items([Control("<|im_start|>")], tokenizer)


def test_a_control_token_may_be_a_piece_of_another_name(tmp_path: Path) -> None:
    """InternLM2's model has unused pieces at the ids of its chat models' <|im_start|> and <|im_end|>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        hard_vocab_limit=False,
        user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"],
        minloglevel=2,
    )
    tokenizer = Tokenizer(model.getvalue(), special=("<img>",))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    start, end = pieces.piece_to_id("[UNUSED_TOKEN_146]"), pieces.piece_to_id("[UNUSED_TOKEN_145]")
    assert encode_items([Control("<|im_start|>"), Control("<|im_end|>"), Control("<img>")], tokenizer) == [[start], [end], [len(pieces)]]
    assert not {start, end} & set(tokenizer.encode("<|im_start|>"))
    assert tokenizer.decode([start, *tokenizer.encode("a red circle"), end]) == "a red circle"
