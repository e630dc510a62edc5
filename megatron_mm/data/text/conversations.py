"""Samples of which only the answers are supervised: conversations, and the tasks of multi-task training.

    conversations  {"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A ball."}],
                   "image": "0.jpg"}; `image` may be a list, as long as there are <image> marks in the questions, or missing (LLaVA)
                   or {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A ball."}]};
                   `content` may be a list of {"type": "text", "text": "..."} and {"type": "image"}; the first turn may be a system prompt.
                   If no question has an <image> mark, the images come before the first question, each on a line of its own. An answer with
                   `"loss": false`, `"weight": 0` or `"loss_weight": 0` is read but not supervised
    tasks          {"task": "vqa", "question": "What is it?", "answer": "ball", "images": ["0.jpg"]}

The prompts of tasks are those of InfiMM's multi-task training, which come from LLaVA-1.5. We chose the text around them: the images come
first, followed by the context, the question, the choices and the prompt, each on its own line. The answer follows in the form of the chat
template.

    caption        Please describe the image.

    vqa, vizwiz    QUESTION
                   Answer the question using a single word or phrase.       (vizwiz: and before it, on the same line, another sentence)

    scienceqa      CONTEXT
                   QUESTION
                   A. CHOICE
                   B. CHOICE
                   Answer with the option's letter from the given choices directly.

Any task may have a `context`; `scienceqa` needs `choices`, its answer is a letter or an index from 0, and it alone may lack an image.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from typing import Any

from megatron_mm.data.text.chat import Turn
from megatron_mm.data.text.items import BadDocument, ImageReference
from megatron_mm.data.text.keys import USUAL, Keys, field_of

IMAGE_MARK = "<image>"
IMAGE_PARTS = ("image", "image_url")
"""Types of the parts of a turn that are images."""
ASKS, ANSWERS, SYSTEM = ("human", "user"), ("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "system"
LOSS_WEIGHTS = ("loss", "weight", "loss_weight")
"""Fields of an answer that say whether it is supervised, in the forms of ms-swift, OpenAI and LLaMA-Factory."""
_LISTS = ("conversations", "messages")


@dataclass(frozen=True)
class Task:
    """A kind of question."""

    prompt: str
    asks: bool = True
    """A sample of this task has a `question`."""
    chooses: bool = False
    """The answer is one of the sample's `choices`."""
    needs_image: bool = True


TASKS: dict[str, Task] = {
    "caption": Task("Please describe the image.", asks=False),
    "vqa": Task("Answer the question using a single word or phrase."),
    "vizwiz": Task(
        "When the provided information is insufficient, respond with 'Unanswerable'. Answer the question using a single word or phrase."
    ),
    "scienceqa": Task("Answer with the option's letter from the given choices directly.", chooses=True, needs_image=False),
}


def is_conversation(fields: dict[str, Any], keys: Keys = USUAL) -> bool:
    """Return whether a document is a conversation, judging by its fields."""
    return _listed(fields, keys) is not None


def _listed(fields: dict[str, Any], keys: Keys) -> list[Any] | None:
    names = _LISTS if keys.messages is None else (keys.messages,)
    return next((found for name in names if isinstance(found := field_of(fields, name), list)), None)


def conversation_turns(fields: dict[str, Any], keys: Keys = USUAL, *, own: ImageReference | None = None) -> list[Turn]:
    """Return the turns of a conversation. Raises BadDocument if it is malformed.

    Args:
        own: the image of a conversation that names none but has one <image> mark: the one next to it, as in Megatron-LM's shards of LLaVA.
    """
    listed = _listed(fields, keys)
    if listed is None:
        raise BadDocument(f"JSON has no {keys.messages or 'conversations'}")
    try:
        spoken = [(speaker(turn), _words(turn.get("value", turn.get("content"))).strip()) for turn in listed]
    except (TypeError, AttributeError):
        raise BadDocument("malformed conversations list") from None
    system = spoken.pop(0)[1] if spoken and spoken[0][0] == SYSTEM else ""
    asked, answered = spoken[::2], spoken[1::2]
    if not spoken or len(spoken) % 2 or any(who not in ASKS for who, _ in asked) or any(who not in ANSWERS for who, _ in answered):
        raise BadDocument("conversation does not alternate questions and answers")
    if not all(answer for _, answer in answered):
        raise BadDocument("empty answer")
    questions, images = [question for _, question in asked], _images(fields, keys)
    marks = sum(question.count(IMAGE_MARK) for question in questions)
    if not images and marks == 1 and own is not None:
        images = [own]
    if not marks:
        questions[0] = f"{IMAGE_MARK}\n" * len(images) + questions[0]
    elif marks != len(images):
        raise BadDocument("number of images differs from number of <image> marks")
    left, supervised = iter(images), [_is_supervised(turn) for turn in listed[-2 * len(answered) :][1::2]]
    if not any(supervised):
        raise BadDocument("no answer is supervised")
    turns = [
        Turn(_with_images(question, left), answer, supervised=counts)
        for question, (_, answer), counts in zip(questions, answered, supervised, strict=True)
    ]
    return [replace(turns[0], system=system), *turns[1:]]


def _is_supervised(turn: dict[str, Any]) -> bool:
    """Return whether an answer is supervised. Raises BadDocument if it has a weight other than 0 and 1, because there are none here."""
    weights = [turn[name] for name in LOSS_WEIGHTS if turn.get(name) is not None]
    if not all(isinstance(weight, bool | int | float) and weight in (0, 1) for weight in weights):
        raise BadDocument("loss weight of an answer is neither 0 nor 1")
    return all(weights)


def speaker(turn: Any) -> Any:
    """Return the role of a turn: one of `ASKS` or `ANSWERS`, `SYSTEM`, or any other value in the data; None if the turn is no object."""
    said_by = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    return SYSTEM if said_by == "developer" else said_by


def _words(content: object) -> str:
    """Return the text of a turn, with marks for images. Raises TypeError if it is not text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError("a turn has no text")
    return "".join(IMAGE_MARK if part["type"] in IMAGE_PARTS else part["text"] for part in map(_part, content))


def _part(part: object) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") not in ("text", *IMAGE_PARTS):
        raise TypeError("a part of a turn must be a text or an image")
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise TypeError("a part of type text has no text")
    return part


def _with_images(question: str, images: Any) -> tuple[str | ImageReference, ...]:
    """Replace the marks in a question with the next images."""
    first, *rest = question.split(IMAGE_MARK)
    parts: list[str | ImageReference] = [first]
    for text in rest:
        parts += [next(images), text]
    return tuple(part for part in parts if part)


def task_turns(fields: dict[str, Any]) -> list[Turn]:
    """Return a task as a conversation of one turn. Raises BadDocument if it is malformed."""
    name = fields.get("task")
    if not isinstance(name, str) or name not in TASKS:
        raise BadDocument("unknown task")
    task = TASKS[name]
    images = _images(fields)
    if task.needs_image and not images:
        raise BadDocument("task without image")
    choices = _choices(fields) if task.chooses else []
    lines = [
        *([_string(fields, "context")] if fields.get("context") else []),
        *([_string(fields, "question")] if task.asks else []),
        *(f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)),
        task.prompt,
    ]
    answer = _letter(fields.get("answer"), len(choices)) if task.chooses else _string(fields, "answer")
    return [Turn((*images, "\n".join(lines)), answer)]


def _string(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadDocument(f"task without {name}")
    return value.strip()


def _choices(fields: dict[str, Any]) -> list[str]:
    choices = fields.get("choices")
    if not isinstance(choices, list) or not 0 < len(choices) <= len(string.ascii_uppercase) or not all(isinstance(c, str) for c in choices):
        raise BadDocument("malformed choices list")
    return choices


def _letter(answer: object, count: int) -> str:
    """Return the letter of a choice given by its letter or by its index."""
    letters = string.ascii_uppercase[:count]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count:
        return letters[answer]
    if isinstance(answer, str) and len(answer) == 1 and answer.upper() in letters:
        return answer.upper()
    raise BadDocument("answer is not one of the choices")


def _images(fields: dict[str, Any], keys: Keys = USUAL) -> list[ImageReference]:
    """Return the images that a sample names: a list or a single one."""
    named = fields.get("images", fields.get("image")) if keys.image is None else field_of(fields, keys.image)
    names = [] if named in (None, "") else named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) for name in names):
        raise BadDocument("malformed image list")
    return [ImageReference(name.lower(), counted=False) for name in names]
