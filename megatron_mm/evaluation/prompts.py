"""Prompts: demonstrations and a question as token ids and images.

With a chat template (`data.chat_template` of the run; fine-tuned models), every demonstration is a question and an answer before the last
question. The wording is that of multi-task training (`data.text.conversations`), taken from InfiMM's model card and LLaVA-1.5:

    <image> What is it? Answer the question using a single word or phrase.  -> ball

Without one (pre-trained models), a prompt is a document like those of interleaved training, with one form per kind of task:

    caption         {image}A photo of                                         caption
    vqa, yes_no     {image}Question: {question} Short answer:                 answer
    choice          {image}{context} Question: {question} A. ... B. ...  Answer:      letter
    text            {question}                                                answer

Each demonstration ends with a line break. The wording is our own, in the style of Flamingo and BLIP-2, because we did not have the papers'
prompts. To use another form: `--form "{image}Describe: "`.

InfiMM, a Flamingo model, gets OpenFlamingo's prompts (`Family.prompt_forms`): `{image}Output:caption` and
`{image}Question:{question} Short answer:answer`. Its images are written `<|endofchunk|><image>`, so that demonstrations end as in its
training, and each attends only to its own image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from types import MappingProxyType

import numpy as np
import torch

from megatron_mm.config.checks import nearest
from megatron_mm.data.image_formats import open_image
from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.load.tile_decode import EncodedTiles, TileDecoder
from megatron_mm.data.text.chat import ChatTemplate, Turn, render
from megatron_mm.data.text.conversations import task_turns
from megatron_mm.data.text.items import Control, ImageReference, Item, Text, encode_items
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.evaluation.passes import Prompt
from megatron_mm.evaluation.tasks.base import LETTERS, Example, ImageSource, Task

FORMS: dict[str, str] = {
    "caption": "{image}A photo of",
    "vqa": "{image}Question: {question} Short answer:",
    "yes_no": "{image}Question: {question} Short answer:",
    "choice": "{image}{context}Question: {question}\n{choices}\nAnswer:",
    "text": "{question}",
    # The form of the documents of `prepare demo`.
    "bare caption": "{image}",
    "question before image": "{question}{image}",
}
"""Forms by kind of task, or by name (`Task.form`)."""
FIELDS = ("image", "question", "context", "choices")
"""Fields of a form."""
_SEPARATORS = {"bare caption": "", "question before image": "", "text": "\n\n"}
"""Forms whose demonstrations are separated by something other than a line break -> separator."""


class BadImage(ValueError):
    """An image of an example cannot be read."""


@dataclass(frozen=True)
class Wording:
    """How a task's examples are written as prompts."""

    form: str
    """Text with {image}, {question}, {context}, {choices}; unused for questions about images under a chat template."""
    separator: str
    """Text between examples. If it is empty and the next example has no image, a line break is used."""
    template: ChatTemplate | None
    task: str
    """Name in `data.text.conversations.TASKS`."""
    space: str = " "
    """Text before an answer."""
    given_form: str | None = None
    """The form that the user gave, if it is used and differs from the task's own."""

    @classmethod
    def of(
        cls, task: Task, template: ChatTemplate | None, *, form: str | None = None, family_forms: Mapping[str, str] = MappingProxyType({})
    ) -> Wording:
        """
        Args:
            form: replaces the task's form, where a form is used. Raises ValueError if it has an unknown field (`check_form`).
            family_forms: `Family.prompt_forms`.
        """
        name = task.form or task.kind
        if name in family_forms:
            own = cls(family_forms[name], "", template, task.prompt, space="")
        else:
            own = cls(FORMS[name], _SEPARATORS.get(name, "\n"), template, task.prompt)
        if form is not None:
            check_form(form)
        if form is None or form == own.form or not own.uses_form(task):
            return own
        return cls(form, _SEPARATORS.get(name, "\n"), template, task.prompt, given_form=form)

    def uses_form(self, task: Task) -> bool:
        """Whether the task's prompts are written in a form: text-only tasks always, others if there is no chat template."""
        return self.template is None or task.kind == "text"

    def items(self, examples: Sequence[Example]) -> list[Item]:
        """Items of a prompt without BOS: the demonstrations with their answers, then the question."""
        if self.template is not None and examples[-1].images:  # text-only tasks evaluate the language model without a chat template
            return before_last_answer(render([self._turn(example) for example in examples], self.template))
        items: list[Item] = []
        for number, example in enumerate(examples):
            for part in self._parts(example, images=len(example.images)):
                _append(items, part)
            if number < len(examples) - 1:
                _append(items, f"{'' if isinstance(items[-1], ImageReference) else self.space}{example.answer}", continues=True)
                _append(items, self.separator if examples[number + 1].images else self.separator or "\n", continues=True)
        return items

    def answer_text(self, answer: str, example: Example, *, after_text: bool) -> str:
        """A choice as it follows a prompt, preceded by the template's space, or by `space` if the prompt ends in text."""
        if self.template is not None and example.images:
            return f"{self.template.prompt_end[1]}{answer}"
        return f"{self.space}{answer}" if after_text else answer

    def _turn(self, example: Example) -> Turn:
        task = "vqa" if self.task == "scienceqa" and not example.choices else self.task
        fields: dict[str, object] = {"task": task, "images": ["image"] * len(example.images), "question": example.question}
        if task == "scienceqa":
            fields |= {"choices": list(example.choices), "answer": example.answer}
            if example.context:
                fields["context"] = example.context
        else:
            fields["answer"] = example.answer
        (turn,) = task_turns(fields)
        return turn

    def _parts(self, example: Example, *, images: int) -> list[str | ImageReference]:
        values = {
            "image": "\0",
            "question": example.question.replace("\0", ""),
            "context": f"{example.context}\n" if example.context else "",
            "choices": "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, example.choices, strict=False)),
        }
        form = FORMS["vqa"] if "{choices}" in self.form and not example.choices else self.form  # an open question in a choice task
        first, *rest = form.format(**values).split("\0")
        parts: list[str | ImageReference] = [first]
        for text in rest:
            parts += [*(ImageReference("image", counted=False) for _ in range(images)), text]
        return [part for part in parts if part]


def check_form(form: str) -> None:
    """Raise ValueError that names the unknown field, or says what cannot be read, if a form given with --form is wrong."""
    *first, last = (f"{{{name}}}" for name in FIELDS)
    known = f"{', '.join(first)} and {last}"
    try:
        unknown = [name for _, name, *_ in Formatter().parse(form) if name is not None and name not in FIELDS]
        if not unknown:
            form.format(**dict.fromkeys(FIELDS, ""))
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"--form {form!r} cannot be read ({error}): write {{{{ and }}}} for braces; its fields may be {known}") from None
    if unknown:
        word = f"{{{unknown[0]}}}"
        meant = nearest(word, [f"{{{name}}}" for name in FIELDS]) or ":"
        raise ValueError(f"--form {form!r} has the unknown field {word}{meant} A form may have {known}")


def _append(items: list[Item], part: str | ImageReference, *, continues: bool = False) -> None:
    """Append a part. A text that continues the text before it is tokenized together with it."""
    if isinstance(part, ImageReference):
        items.append(part)
    elif part:
        items.append(Text(part, counted=False, continues=continues and bool(items) and isinstance(items[-1], Text)))


def before_last_answer(items: list[Item]) -> list[Item]:
    """A rendered conversation without its last answer."""
    kept = list(items)
    while isinstance(kept[-1], Text | Control) and kept[-1].counted:
        kept.pop()
    return kept


@dataclass(frozen=True)
class Written:
    """A prompt whose images have not been decoded."""

    prompt: Prompt
    images: list[EncodedTiles]
    names: list[str]
    """For messages: each image's file, or its place in its example."""


def _name(example: Example, number: int) -> str:
    """Name an image of an example for messages."""
    return str(example.images[number].path or f"image {number + 1} of example {example.key}")


class PromptBuilder:
    """Makes prompts from examples, for one model."""

    def __init__(self, tokenizer: Tokenizer, image: ImageInput, *, threads: int, with_pixels: bool) -> None:
        """
        Args:
            image: how images enter the model.
            with_pixels: decode images; otherwise only their headers are read.
        """
        self.tokenizer = tokenizer
        self.image = image
        self.with_pixels = with_pixels
        self._decoder = TileDecoder(image, threads=threads)

    def close(self) -> None:
        self._decoder.close()

    def build(self, wording: Wording, examples: Sequence[Example]) -> Prompt:
        """Build the prompt of demonstrations and a final question, with the pixels of all images. Raises BadImage."""
        written = self.write(wording, examples)
        prompt, bad = self.with_images(written, range(len(written.prompt.image_starts)))
        if bad:
            raise BadImage(f"{bad[0]} does not decode")
        return prompt

    def write(self, wording: Wording, examples: Sequence[Example], *, low_resolution: bool = False) -> Written:
        """Build a prompt without pixels: only the headers of images are read. Raises BadImage.

        Args:
            low_resolution: show images of demonstrations only as overviews, one tile each.
        """
        items = wording.items(examples)
        names = [_name(example, number) for example in examples for number in range(len(example.images))]
        sources = (source for example in examples for source in example.images)
        encoded = [self._header(source, name) for source, name in zip(sources, names, strict=True)]
        first = len(encoded) - len(examples[-1].images) if low_resolution else 0
        encoded[:first] = [replace(image, tiles=range(1), count=1) for image in encoded[:first]]
        written, left = iter(encode_items(items, self.tokenizer)), iter(encoded)
        ids, starts = [self.tokenizer.bos_id], []
        for item in items:
            if isinstance(item, ImageReference):
                tiles = len(next(left).tiles)
                first = len(ids) + len(self.image.before)
                starts += [first + self.image.tokens * tile for tile in range(tiles)]
                ids += self.image.ids(self.tokenizer.special_id, tiles=tiles)
            else:
                ids += next(written)
        return Written(Prompt(ids, starts, None), encoded, names)

    def with_images(self, written: Written, wanted: range) -> tuple[Prompt, list[str]]:
        """Return a prompt with the pixels of the wanted tiles, and the names of images that do not decode. Other tiles stay uninitialised:
        another process encodes them."""
        prompt = written.prompt
        if not self.with_pixels:
            return prompt, []
        size = self.image.size
        pixels = torch.empty(len(prompt.image_starts), 3, size, size, dtype=torch.uint8)
        begin, cut, names = 0, [], []
        for image, name in zip(written.images, written.names, strict=True):
            tiles = range(max(0, min(wanted.start - begin, len(image.tiles))), max(0, min(wanted.stop - begin, len(image.tiles))))
            cut += [replace(image, tiles=tiles, count=len(image.tiles))] if tiles else []
            names += [name] if tiles else []
            begin += len(image.tiles)
        decoded = self._decoder.decode(cut)
        pixels[wanted.start : wanted.stop] = decoded.pixels
        bad = [name for name, ok in zip(names, decoded.ok.tolist(), strict=True) if not ok]
        return replace(prompt, pixels=pixels), list(dict.fromkeys(bad))

    def _header(self, source: ImageSource, name: str) -> EncodedTiles:
        try:
            data = source.read()
        except OSError as error:
            raise BadImage(f"{name} cannot be read ({error.strerror or error})") from None
        try:
            with open_image(data) as opened:
                width, height = opened.size
        except Exception:  # Pillow may raise anything on a damaged header
            raise BadImage(f"{name} does not decode") from None
        count = int(self.image.num_tiles(np.array([width]), np.array([height]))[0])
        return EncodedTiles(data, width=width, height=height, tiles=range(count), count=count)

    def end_ids(self, wording: Wording) -> list[int]:
        """Tokens that end an answer: EOS, the chat template's end of answer, and the tokens that begin an image, hence a demonstration."""
        names = [*self.image.before, self.image.token]
        if wording.template is not None:
            names.append(wording.template.end_of_answer)
        return list(dict.fromkeys([self.tokenizer.eos_id, *map(self.tokenizer.special_id, names)]))

    def choice_ids(self, wording: Wording, examples: Sequence[Example], choices: Sequence[str]) -> list[list[int]]:
        """Token ids of each choice as it follows the prompt of the examples."""
        items = wording.items(examples)
        after_text = isinstance(items[-1], Text)
        before = encode_items(items, self.tokenizer)
        found = []
        for choice in choices:
            text = Text(wording.answer_text(choice, examples[-1], after_text=after_text), continues=after_text)
            ids = encode_items([*items, text], self.tokenizer)
            found.append(ids[-1] if ids[: len(before)] == before else encode_items([text], self.tokenizer)[0])
        return found


def cut_answer(text: str, *, max_words: int | None = None) -> str:
    """Cut off what a base model writes after its answer: keep the first line, or its first max_words words."""
    line = text.strip().split("\n")[0].strip()
    return line if max_words is None else " ".join(line.split()[:max_words])
