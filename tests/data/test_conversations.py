"""Parsing of conversations and tasks, and the reasons for which they are refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mm.data.text.chat import CHAT_TEMPLATES, Turn, render
from megatron_mm.data.text.conversations import conversation_turns, task_turns
from megatron_mm.data.text.items import BadDocument, ImageReference, Text


def said(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def image(name: str) -> ImageReference:
    return ImageReference(name, counted=False)


def test_conversations_with_one_several_and_no_images() -> None:
    one = {"conversations": said("<image>\nWhat is it? ", " A ball."), "image": "0.JPG", "id": 7}
    assert conversation_turns(one) == [Turn((image("0.jpg"), "\nWhat is it?"), "A ball.")]
    several = {"conversations": said("A: <image>, B: <image>. Same?", "No.", "And <image>", "Yes."), "image": ["0.jpg", "1.jpg", "2.jpg"]}
    assert conversation_turns(several) == [
        Turn(("A: ", image("0.jpg"), ", B: ", image("1.jpg"), ". Same?"), "No."),
        Turn(("And ", image("2.jpg")), "Yes."),
    ]
    none = {"conversations": [{"from": "user", "value": "One plus one?"}, {"from": "assistant", "value": "Two, not <image>."}]}
    assert conversation_turns(none) == [Turn(("One plus one?",), "Two, not <image>.")]


def test_images_without_marks_come_first() -> None:
    """As in the loaders of InternVL and ms-swift. A conversation of one mark that names no image uses the image next to it."""
    fields = {"conversations": said("What are they?", "Balls.", "Sure?", "Yes."), "image": ["0.jpg", "1.jpg"]}
    first, second = conversation_turns(fields)
    assert first.question == (image("0.jpg"), "\n", image("1.jpg"), "\nWhat are they?") and second.question == ("Sure?",)
    (turn,) = conversation_turns({"conversations": said("<image>\nWhat?", "A ball.")}, own=image(""))
    assert turn.question == (image(""), "\nWhat?")
    with pytest.raises(BadDocument, match="number of images differs"):
        conversation_turns({"conversations": said("<image><image>What?", "A ball.")}, own=image(""))


def test_an_answer_may_be_left_out_of_the_loss() -> None:
    for field, value in (("loss", False), ("weight", 0), ("loss_weight", 0.0)):
        turns = said("a", "b", "c", "d")
        turns[1][field], turns[2][field], turns[3][field] = value, value, {"loss": True}.get(field, 1)  # type: ignore[assignment]
        parsed = conversation_turns({"conversations": turns})
        assert [turn.supervised for turn in parsed] == [False, True]
        texts = [item for item in render(parsed, CHAT_TEMPLATES["plain"]) if isinstance(item, Text)]
        assert [(item.text, item.counted) for item in texts] == [("a\nb\nc\n", False), ("d", True)]


def test_messages_with_parts_and_a_system_prompt() -> None:
    asked = [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]
    fields = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": "A ball."},
        ],
        "images": ["0.jpg"],
    }
    assert conversation_turns(fields) == [Turn((image("0.jpg"), "\nWhat is it?"), "A ball.", system="Be brief.")]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": "x"}, "JSON has no conversations"),
        ({"conversations": []}, "conversation does not alternate questions and answers"),
        ({"conversations": said("a")}, "conversation does not alternate questions and answers"),
        ({"conversations": said("a", "b", "c")}, "conversation does not alternate questions and answers"),
        ({"conversations": said("a", "b")[::-1]}, "conversation does not alternate questions and answers"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "conversation does not alternate questions and answers"),
        ({"conversations": [*said("a", "b"), {"from": "system", "value": "a"}]}, "conversation does not alternate questions and answers"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "malformed conversations list"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "malformed conversations list"),
        ({"conversations": said("a", " ")}, "empty answer"),
        ({"conversations": ["a", "b"]}, "malformed conversations list"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, "malformed conversations list"),
        ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}]}, "malformed conversations list"),
        ({"conversations": said("<image>", "b")}, "number of images differs from number of <image> marks"),
        ({"conversations": [*said("a"), {**said("a", "b")[1], "loss": False}]}, "no answer is supervised"),
        ({"conversations": [*said("a"), {**said("a", "b")[1], "weight": 0.5}]}, "loss weight of an answer is neither 0 nor 1"),
        ({"conversations": said("<image>", "b"), "image": ["0.jpg", "1.jpg"]}, "number of images differs from number of <image> marks"),
        ({"conversations": said("<image>", "b"), "image": [3]}, "malformed image list"),
    ],
)
def test_a_bad_conversation_has_its_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadDocument) as caught:
        conversation_turns(fields)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("fields", "question", "answer"),
    [
        ({"task": "caption", "answer": "A red ball. "}, "Please describe the image.", "A red ball."),
        ({"task": "vqa", "question": "What?", "answer": "ball"}, "What?\nAnswer the question using a single word or phrase.", "ball"),
        (
            {"task": "vizwiz", "question": "What?", "answer": "unanswerable"},
            "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'. "
            "Answer the question using a single word or phrase.",
            "unanswerable",
        ),
        (
            {"task": "scienceqa", "question": "Which?", "choices": ["iron", "gold"], "answer": 1, "context": "Metals."},
            "Metals.\nWhich?\nA. iron\nB. gold\nAnswer with the option's letter from the given choices directly.",
            "B",
        ),
    ],
)
def test_tasks_have_the_published_prompts(fields: dict[str, Any], question: str, answer: str) -> None:
    assert task_turns({**fields, "images": ["0.jpg", "1.jpg"]}) == [Turn((image("0.jpg"), image("1.jpg"), question), answer)]
    assert task_turns({**fields, "image": "0.jpg"}) == [Turn((image("0.jpg"), question), answer)]


def test_a_choice_is_named_by_its_letter_or_its_index_and_needs_no_image() -> None:
    fields = {"task": "scienceqa", "question": "Which?", "choices": ["iron", "gold", "tin"]}
    for answer, letter in ((0, "A"), ("b", "B"), ("C", "C"), (2, "C")):
        ((turn),) = task_turns({**fields, "answer": answer})
        assert turn.answer == letter and len(turn.question) == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"task": "detection", "answer": "x"}, "unknown task"),
        ({"task": ["vqa"], "answer": "x"}, "unknown task"),
        ({"answer": "x"}, "unknown task"),
        ({"task": "caption", "answer": "x", "images": []}, "task without image"),
        ({"task": "vqa", "question": "q", "images": ["0.jpg"]}, "task without answer"),
        ({"task": "vqa", "question": " ", "answer": "x"}, "task without question"),
        ({"task": "vqa", "question": "q", "context": 3, "answer": "x"}, "task without context"),
        ({"task": "scienceqa", "question": "q", "answer": "A"}, "malformed choices list"),
        ({"task": "scienceqa", "question": "q", "choices": [], "answer": "A"}, "malformed choices list"),
        ({"task": "scienceqa", "question": "q", "choices": ["a", 3], "answer": "A"}, "malformed choices list"),
        ({"task": "scienceqa", "question": "q", "choices": ["a"] * 27, "answer": "A"}, "malformed choices list"),
        ({"task": "scienceqa", "question": "q", "choices": ["a", "b"], "answer": "C"}, "answer is not one of the choices"),
        ({"task": "scienceqa", "question": "q", "choices": ["a", "b"], "answer": "AB"}, "answer is not one of the choices"),
        ({"task": "scienceqa", "question": "q", "choices": ["a", "b"], "answer": ""}, "answer is not one of the choices"),
        ({"task": "scienceqa", "question": "q", "choices": ["a", "b"], "answer": 2}, "answer is not one of the choices"),
        ({"task": "scienceqa", "question": "q", "choices": ["a", "b"], "answer": -1}, "answer is not one of the choices"),
        ({"task": "scienceqa", "question": "q", "choices": ["a", "b"], "answer": True}, "answer is not one of the choices"),
    ],
)
def test_a_bad_task_has_its_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadDocument) as caught:
        task_turns({"image": "0.jpg", **fields} if "images" not in fields else fields)
    assert str(caught.value) == reason
