"""Every exported chat template yields the tokens of training in transformers."""

from __future__ import annotations

from typing import Any

import pytest
from support.chats import write_conversations
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.text.chat import CHAT_TEMPLATES, ChatTemplate, render
from megatron_mm.data.text.conversations import conversation_turns
from megatron_mm.data.text.items import ImageReference, encode_items
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.hf.chat_templates import jinja_template
from megatron_mm.hf.tokenizer import convert_tokenizer, tokenizer_config, write_tokenizer

IMAGE = ImageInput(size=8, fill=(0, 0, 0), tokens=1)
QUESTIONS = ("<image>\nwhat shape?", "what colour?  ", 'and\nnow "quoted" {{ braces }} \u00e9?')
ANSWERS = ("a cross", " red", "42.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_conversations(tmp_path_factory.mktemp("chat"))
    return Tokenizer.open(path / "tokenizer.model")


@pytest.fixture(scope="module", params=CHAT_TEMPLATES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exported(name: str, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    path, out = write_conversations(tmp_path_factory.mktemp("chat")) / "tokenizer.model", tmp_path_factory.mktemp("out")
    ids = Tokenizer.open(path)
    special = {token: ids.special_id(token) for token in ("<pad>", "<image>", *CHAT_TEMPLATES["internlm2"].control_tokens)}
    roles = {"bos_id": ids.bos_id, "eos_id": ids.eos_id}
    converted = convert_tokenizer(path, special=special, **roles)
    jinja = jinja_template(CHAT_TEMPLATES[name])
    write_tokenizer(
        converted, tokenizer_config(converted, special=special, pad_id=ids.pad_id, sequence_length=64, chat_template=jinja, **roles), out
    )
    return AutoTokenizer.from_pretrained(out)


def trained_on(turns: int, template: ChatTemplate, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Return a conversation's token ids in training, and the number of them that precede its last answer."""
    spoken = [part for pair in zip(QUESTIONS, ANSWERS, strict=True) for part in pair][: 2 * turns]
    fields = {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(spoken)], "image": "0.jpg"}
    items = render(conversation_turns(fields), template)
    written = iter(encode_items(items, tokenizer))
    runs = [
        (IMAGE.ids(tokenizer.special_id, tiles=1), False) if isinstance(i, ImageReference) else (next(written), i.counted) for i in items
    ]
    ids = [tokenizer.bos_id, *(id for run, _ in runs for id in run)]
    last = max(n for n, (_, counted) in enumerate(runs) if counted and (n == 0 or not runs[n - 1][1]))
    return [*ids, tokenizer.eos_id] if template.supervises_eos else ids, 1 + sum(len(run) for run, _ in runs[:last])


def messages(turns: int, *, answered: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for question, answer in zip(QUESTIONS[:turns], ANSWERS[:turns], strict=True):
        found += [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()}]
    image, _, text = found[0]["content"].partition("\n")
    assert image == "<image>"
    found[0]["content"] = [{"type": "image"}, {"type": "text", "text": f"\n{text}"}]
    return found if answered else found[:-1]


def rendered(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], **options: Any) -> list[int]:
    found = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
    return list(found["input_ids"])


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_conversation_is_that_of_training(name: str, turns: int, exported: PreTrainedTokenizerBase, tokenizer: Tokenizer) -> None:
    template = CHAT_TEMPLATES[name]
    ids, prompt = trained_on(turns, template, tokenizer)
    tail = tokenizer.encode(template.after_all) if template.after_all else []
    assert rendered(exported, messages(turns, answered=True)) == ids + tail
    assert rendered(exported, messages(turns, answered=False), add_generation_prompt=True) == ids[:prompt]


def test_a_system_prompt_of_one_s_own(name: str, exported: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one?"}]
    expected = {
        "plain": "<s>Be brief.\none?\n",
        "zephyr": "<s><|system|>\nBe brief.</s>\n<|user|>\none?</s>\n<|assistant|>\n",
        "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\none? [/INST]",
        "vicuna": "<s>Be brief. USER: one? ASSISTANT:",
        "internlm2": "<s><|im_start|>system\nBe brief.<|im_end|><|im_start|>user\none?<|im_end|><|im_start|>assistant\n",
    }
    assert exported.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected[name]


def test_turns_that_training_never_saw_are_refused(exported: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="must take turns"):
        exported.apply_chat_template([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], tokenize=False)


def test_zephyr_writes_what_the_released_tokenizer_does(tokenizer: Tokenizer) -> None:
    """In the released template, every message is `<|role|>`, a newline, the text, </s> and a newline; its tokenizer adds <s>."""
    import jinja2

    chat = [
        {"role": "system", "content": ""},
        *({"role": r, "content": c} for r, c in (("user", "a?"), ("assistant", "b."), ("user", "c?"))),
    ]
    source = jinja_template(CHAT_TEMPLATES["zephyr"], begins_with_bos=False)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    found = environment.from_string(source).render(messages=chat, eos_token="</s>", add_generation_prompt=True)
    assert found == "".join(f"<|{m['role']}|>\n{m['content']}</s>\n" for m in chat) + "<|assistant|>\n"
    whole = environment.from_string(source).render(messages=chat[:3], eos_token="</s>", add_generation_prompt=False)
    assert whole == "".join(f"<|{m['role']}|>\n{m['content']}</s>\n" for m in chat[:3])
