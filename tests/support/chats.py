"""A data set of conversations, with a tokenizer that has the control tokens of all chat templates."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece

from support.data_files import picture, write_tar

CONVERSATIONS = [
    ("<image>\nwhat shape?", "a cross", "what colour?", "red"),
    ("what is <image> and <image>", "a red circle and a blue square"),
    ("one plus one?", "two", "and one more?", "three", "and again?", "four"),
]


def write_conversations(path: Path) -> Path:
    """Write three conversations with one, two and no images, and a tokenizer that has the control tokens of all templates."""
    members: dict[str, bytes] = {}
    for number, values in enumerate(CONVERSATIONS):
        turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
        names = [f"{n}.jpg" for n in range("".join(values).count("<image>"))]
        members |= {f"{number}.{name}": picture() for name in names}
        members[f"{number}.json"] = json.dumps({"conversations": turns, "image": names}).encode()
    write_tar(path / "train" / "chat" / "0.tar", members)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for values in CONVERSATIONS for text in values] * 10),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        control_symbols=["<pad>", "<image>", "<|im_start|>", "<|im_end|>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(model.getvalue())
    return path
