"""Chat templates as data: the text around the questions and answers of a conversation.

A conversation becomes a document like any other: BOS, items, EOS. The loss includes the answers and the text that ends them:

    BOS  opening  question  before_answer  answer  after_answer  before_question  question  ...  answer  after_last_answer  EOS
                                           ------  ------------                                  ------  -----------------  ---

If a template ends answers with the end-of-text token, the last one is the document's own EOS. If it ends answers with another token, the
document's EOS only separates documents and is not supervised (`supervises_eos`), so that no model learns to generate it. Control tokens are
separate tokens; each text between them is tokenized by SentencePiece on its own, including the space that it may add in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm.data.sources.source import Source
from megatron_mm.data.text.items import Control, ImageReference, Item, Text

Parts = tuple[str | Control, ...]

_BEGIN, _END = Control("<s>"), Control("</s>")
_IM_START, _IM_END = Control("<|im_start|>"), Control("<|im_end|>")
SYSTEM = "{system}"
"""Placeholder for a conversation's own system prompt; always a separate part."""


@dataclass(frozen=True)
class ChatTemplate:
    """The text and control tokens around questions and answers."""

    opening: Parts
    """Between BOS and the first question, in a conversation without its own system prompt."""
    opening_with_system: Parts
    """Between BOS and the first question, in a conversation with its own system prompt."""
    before_question: Parts
    """Before every question but the first."""
    before_answer: Parts
    """Between a question and its answer. A space at its end is part of the answer and is supervised: SentencePiece joins it with a word
    ("▁red") but not with a digit ("▁" "4"), so a prompt ends without the space and lets the model generate either."""
    after_answer: Parts
    """After every answer but the last; supervised."""
    after_last_answer: Parts
    """After the last answer, before EOS; supervised."""
    supervises_eos: bool = True
    """The document's EOS after the last answer is supervised, because the template ends answers with it."""
    after_all: str = ""
    """Text that the released template writes after the end of a conversation. It is not supervised, so training omits it."""

    @property
    def prompt_end(self) -> tuple[Parts, str]:
        """`before_answer` without the spaces at its end, and those spaces."""
        *rest, last = self.before_answer
        if isinstance(last, Control):
            return self.before_answer, ""
        kept = last.rstrip(" ")
        return (*rest, kept), last[len(kept) :]

    @property
    def end_of_answer(self) -> str:
        """The control token that ends the last answer."""
        last = [part.token for part in self.after_last_answer if isinstance(part, Control)]
        return _END.token if self.supervises_eos else last[0]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Control tokens that the tokenizer must have, without duplicates."""
        parts = (
            *self.opening,
            *self.opening_with_system,
            *self.before_question,
            *self.before_answer,
            *self.after_answer,
            *self.after_last_answer,
        )
        return tuple(dict.fromkeys(part.token for part in parts if isinstance(part, Control)))


@dataclass(frozen=True)
class Turn:
    """A question, which may contain images, and its answer."""

    question: tuple[str | ImageReference, ...]
    answer: str
    system: str = ""
    """The conversation's own system prompt, in its first turn; empty if it has none."""
    supervised: bool = True
    """The loss includes the answer and the text that ends it."""


CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    # One line for a question and the next for its answer: for base models and multi-task training. Our own.
    "plain": ChatTemplate(
        opening=(),
        opening_with_system=(SYSTEM, "\n"),
        before_question=(),
        before_answer=("\n",),
        after_answer=("\n",),
        after_last_answer=(),
    ),
    # Zephyr was tuned with a system prompt, which is empty unless a conversation has one. <|user|> and the like are text.
    "zephyr": ChatTemplate(
        opening=("<|system|>\n", _END, "\n<|user|>\n"),
        opening_with_system=("<|system|>\n", SYSTEM, _END, "\n<|user|>\n"),
        before_question=("\n<|user|>\n",),
        before_answer=(_END, "\n<|assistant|>\n"),
        after_answer=(_END,),
        after_last_answer=(),
        after_all="\n",
    ),
    # Llama 2 chat, without a system prompt, as its authors now advise. Every exchange has its own BOS and EOS.
    "llama2": ChatTemplate(
        opening=("[INST] ",),
        opening_with_system=("[INST] <<SYS>>\n", SYSTEM, "\n<</SYS>>\n\n"),
        before_question=(_BEGIN, "[INST] "),
        before_answer=(" [/INST] ",),
        after_answer=(" ", _END),
        after_last_answer=(" ",),
    ),
    # Vicuna 1.1 and later.
    "vicuna": ChatTemplate(
        opening=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ",
        ),
        opening_with_system=(SYSTEM, " USER: "),
        before_question=("USER: ",),
        before_answer=(" ASSISTANT: ",),
        after_answer=(_END,),
        after_last_answer=(),
    ),
    # InternLM2's roles as in InternVL and Mono-InternVL: their system prompt, no newline between turns, and no EOS at the end.
    "internlm2": ChatTemplate(
        opening=(
            _IM_START,
            "system\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
            _IM_END,
            _IM_START,
            "user\n",
        ),
        opening_with_system=(_IM_START, "system\n", SYSTEM, _IM_END, _IM_START, "user\n"),
        before_question=(_IM_START, "user\n"),
        before_answer=(_IM_END, _IM_START, "assistant\n"),
        after_answer=(_IM_END,),
        after_last_answer=(_IM_END,),
        supervises_eos=False,
    ),
}


@dataclass(frozen=True)
class Rendering:
    """How the samples of a source are rendered as chats."""

    template: ChatTemplate
    caption_prompt: str | None = None
    """Question, after the image, to which the caption of a pair is the answer; None leaves pairs as an image and its caption."""


def chat_template(name: str) -> ChatTemplate:
    """Return a template by its name. Raises ValueError, listing the known names, if the name is unknown."""
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"chat template {name!r} is unknown: use one of {list(CHAT_TEMPLATES)}")
    return CHAT_TEMPLATES[name]


def rendering_of(index: Source) -> Rendering | None:
    """Return how the samples of a source were rendered when it was indexed; None if they are not chats."""
    if index.chat_template is None:
        return None
    return Rendering(chat_template(index.chat_template), caption_prompt=index.caption_prompt)


def render(turns: Sequence[Turn], template: ChatTemplate) -> list[Item]:
    """Return the items of a conversation, without BOS and EOS."""
    parts: list[tuple[str | Control | ImageReference, bool]] = []
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        prompt_end, space = template.prompt_end
        silent = (*(template.before_question if number else _opening(template, turn.system)), *turn.question, *prompt_end)
        answer = (f"{space}{turn.answer}", *(template.after_last_answer if last else template.after_answer))
        parts += [(part, False) for part in silent] + [(part, turn.supervised) for part in answer]
    items: list[Item] = []
    for part, counts in parts:
        previous = items[-1] if items else None
        if isinstance(part, Control):
            items.append(Control(part.token, counted=counts))
        elif isinstance(part, ImageReference):
            items.append(ImageReference(part.extension, counted=counts))
        elif isinstance(previous, Text) and previous.counted == counts:
            items[-1] = Text(previous.text + part, counted=counts, continues=previous.continues)
        elif part:
            items.append(Text(part, counted=counts, continues=isinstance(previous, Text)))
    return items


def _opening(template: ChatTemplate, system: str) -> Parts:
    if not system:
        return template.opening
    return tuple(system if part == SYSTEM else part for part in template.opening_with_system)
