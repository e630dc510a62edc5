"""Chat templates against conversations written out by hand."""

from __future__ import annotations

import pytest

from megatron_mm.data.text.chat import CHAT_TEMPLATES, Turn, chat_template, render
from megatron_mm.data.text.items import Control, ImageReference, Text

TURNS = [Turn((ImageReference("0.jpg", counted=False), "\nWhat is it?"), "A ball."), Turn(("Which colour?",), "Red.")]
INTERNVL = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
EXPECTED = {  # between BOS and EOS; supervised text in double brackets
    "plain": "«img»\nWhat is it?\n[[A ball.\n]]Which colour?\n[[Red.]]",
    "zephyr": "<|system|>\n«</s>»\n<|user|>\n«img»\nWhat is it?«</s>»\n<|assistant|>\n[[A ball.«</s>»]]\n<|user|>\nWhich colour?«</s>»\n"
    "<|assistant|>\n[[Red.]]",
    "llama2": "[INST] «img»\nWhat is it? [/INST][[ A ball. «</s>»]]«<s>»[INST] Which colour? [/INST][[ Red. ]]",
    "vicuna": f"{VICUNA} USER: «img»\nWhat is it? ASSISTANT:[[ A ball.«</s>»]]USER: Which colour? ASSISTANT:[[ Red.]]",
    "internlm2": f"«<|im_start|>»system\n{INTERNVL}«<|im_end|>»«<|im_start|>»user\n«img»\nWhat is it?«<|im_end|>»«<|im_start|>»assistant\n"
    "[[A ball.«<|im_end|>»]]«<|im_start|>»user\nWhich colour?«<|im_end|>»«<|im_start|>»assistant\n[[Red.«<|im_end|>»]]",
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_conversation_is_written_as_the_models_authors_write_it(name: str) -> None:
    written, counts = "", False
    for item in render(TURNS, CHAT_TEMPLATES[name]):
        if item.counted != counts:
            written += "[[" if item.counted else "]]"
            counts = item.counted
        written += item.text if isinstance(item, Text) else f"«{item.token if isinstance(item, Control) else 'img'}»"
    assert written + "]]" * counts == EXPECTED[name]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_texts_next_to_each_other_are_one_string(name: str) -> None:
    """No two adjacent texts have the same `counted`, and a text has `continues` exactly if it follows another text."""
    items = render(TURNS, CHAT_TEMPLATES[name])
    for before, item in zip([None, *items], items, strict=False):
        if isinstance(item, Text):
            assert item.text and item.continues == isinstance(before, Text)
            assert not (isinstance(before, Text) and before.counted == item.counted)


def test_who_learns_to_say_eos() -> None:
    """InternVL's conversations end with `<|im_end|>`: its conversation.py writes no </s> after the last."""
    assert {name for name, template in CHAT_TEMPLATES.items() if not template.supervises_eos} == {"internlm2"}


def test_control_tokens_of_templates() -> None:
    found = {name: template.control_tokens for name, template in CHAT_TEMPLATES.items()}
    assert found == {
        "plain": (),
        "zephyr": ("</s>",),
        "llama2": ("<s>", "</s>"),
        "vicuna": ("</s>",),
        "internlm2": ("<|im_start|>", "<|im_end|>"),
    }
    with pytest.raises(ValueError, match=r"chat template 'chatml' is unknown: use one of \['plain', "):
        chat_template("chatml")


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("plain", "Be brief.\n«img»"),
        ("zephyr", "<|system|>\nBe brief.«</s>»\n<|user|>\n«img»"),
        ("llama2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n«img»"),
        ("vicuna", "Be brief. USER: «img»"),
        ("internlm2", "«<|im_start|>»system\nBe brief.«<|im_end|>»«<|im_start|>»user\n«img»"),
    ],
)
def test_a_conversations_own_system_prompt_stands_in_the_place_of_the_templates(name: str, beginning: str) -> None:
    turns = [Turn((ImageReference("0.jpg", counted=False), "?"), "A ball.", system="Be brief."), TURNS[1]]
    items = render(turns, CHAT_TEMPLATES[name])
    written = "".join(i.text if isinstance(i, Text) else f"«{i.token if isinstance(i, Control) else 'img'}»" for i in items)
    assert written.startswith(beginning) and INTERNVL not in written and VICUNA not in written
    assert not any(item.counted for item in items[: items.index(ImageReference("0.jpg", counted=False))])
