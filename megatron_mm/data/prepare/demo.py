"""`prepare demo`: a small data set of drawn scenes, in the formats of the real ones.

A caption says what is in its picture and nothing else, so that a model must look to predict the words: one or two coloured
shapes and where they are, a number of equal shapes, or a digit. Interleaved documents ask about several pictures in a row;
text documents talk about the same world. Conversations and tasks put the questions as instruction tuning does. Held-out scenes are
drawn from another seed.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from megatron_mm.data.prepare.index import prepare_index
from megatron_mm.data.prepare.summary import Summary
from megatron_mm.data.prepare.tokenizer import prepare_tokenizer
from megatron_mm.data.sources.shards import TarWriter
from megatron_mm.data.text.conversations import IMAGE_MARK, TASKS

VOCAB_SIZE = 512
SAMPLES_PER_SHARD = 500
_SOURCES = ("pairs", "interleaved", "text", "conversations", "tasks")
_UNFINISHED = ".demo.unfinished"
"""A file in a folder that is being made."""

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 60, 230),
    "yellow": (240, 220, 40),
    "purple": (150, 40, 180),
    "orange": (250, 140, 20),
}
NUMBERS = ("zero", "one", "two", "three", "four")
_BACKGROUNDS = ((250, 250, 250), (225, 225, 225), (200, 210, 215), (240, 235, 220))
_SEGMENTS = {  # seven-segment digits: top, upper left, upper right, middle, lower left, lower right, bottom
    "0": "1110111",
    "1": "0010010",
    "2": "1011101",
    "3": "1011011",
    "4": "0111010",
    "5": "1101011",
    "6": "1101111",
    "7": "1010010",
    "8": "1111111",
    "9": "1111011",
}


@dataclass(frozen=True)
class Scene:
    """A picture with its caption and questions about it."""

    image: Image.Image
    caption: str
    questions: tuple[tuple[str, str], ...]
    """Questions with their answers."""


Box = tuple[float, float, float, float]


def _circle(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[Any, ...]) -> None:
    draw.ellipse(box, fill=colour)


def _square(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[Any, ...]) -> None:
    draw.rectangle(box, fill=colour)


def _triangle(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[Any, ...]) -> None:
    left, top, right, bottom = box
    draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=colour)


def _cross(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[Any, ...]) -> None:
    left, top, right, bottom = box
    third_x, third_y = (right - left) / 3, (bottom - top) / 3
    draw.rectangle((left + third_x, top, right - third_x, bottom), fill=colour)
    draw.rectangle((left, top + third_y, right, bottom - third_y), fill=colour)


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Box, tuple[Any, ...]], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


def draw_scene(rng: random.Random) -> Scene:
    """Draw a scene of a random kind."""
    width, height = rng.randint(48, 160), rng.randint(48, 160)
    image = Image.new("RGB", (width, height), rng.choice(_BACKGROUNDS))
    draw = ImageDraw.Draw(image)
    maker = rng.choices((_one, _two, _count, _digit), weights=(4, 2, 2, 2))[0]
    caption, questions = maker(rng, draw, width, height)
    return Scene(image=image, caption=caption, questions=questions)


def _place(draw: ImageDraw.ImageDraw, shape: str, colour: str, centre: tuple[float, float], size: tuple[float, float]) -> None:
    (x, y), (w, h) = centre, size
    SHAPES[shape](draw, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), COLOURS[colour])


def _a(colour: str) -> str:
    return f"an {colour}" if colour == "orange" else f"a {colour}"


def _one(rng: random.Random, draw: ImageDraw.ImageDraw, width: int, height: int) -> tuple[str, tuple[Any, ...]]:
    shape, colour, size = rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.uniform(0.5, 0.8)
    _place(draw, shape, colour, (width / 2, height / 2), (width * size, height * size))
    return f"{_a(colour)} {shape}", (("what shape?", shape), ("what colour?", colour), ("how many?", "one"))


def _two(rng: random.Random, draw: ImageDraw.ImageDraw, width: int, height: int) -> tuple[str, tuple[Any, ...]]:
    (first, second), (near, far) = rng.sample(list(SHAPES), 2), rng.sample(list(COLOURS), 2)
    if rng.random() < 0.5:
        relation, centres = "left of", ((width * 0.26, height / 2), (width * 0.74, height / 2))
    else:
        relation, centres = "above", ((width / 2, height * 0.26), (width / 2, height * 0.74))
    for shape, colour, centre in ((first, near, centres[0]), (second, far, centres[1])):
        _place(draw, shape, colour, centre, (width * 0.42, height * 0.42))
    questions = ((f"what colour is the {first}?", near), (f"what colour is the {second}?", far), ("how many?", "two"))
    return f"{_a(near)} {first} {relation} {_a(far)} {second}", questions


def _count(rng: random.Random, draw: ImageDraw.ImageDraw, width: int, height: int) -> tuple[str, tuple[Any, ...]]:
    shape, colour, count = rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.randint(2, 4)
    for x, y in rng.sample([(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)], count):
        _place(draw, shape, colour, (width * x, height * y), (width * 0.36, height * 0.36))
    questions = (("how many?", NUMBERS[count]), ("what shape?", shape), ("what colour?", colour))
    return f"{NUMBERS[count]} {colour} {shape}{'es' if shape == 'cross' else 's'}", questions


def _digit(rng: random.Random, draw: ImageDraw.ImageDraw, width: int, height: int) -> tuple[str, tuple[Any, ...]]:
    digit, colour = rng.choice(list(_SEGMENTS)), rng.choice(list(COLOURS))
    left, right, top, bottom = width * 0.25, width * 0.75, height * 0.12, height * 0.88
    middle, t = (top + bottom) / 2, max(2.0, min(width, height) * 0.07)
    strokes = (
        (left, top, right, top),
        (left, top, left, middle),
        (right, top, right, middle),
        (left, middle, right, middle),
        (left, middle, left, bottom),
        (right, middle, right, bottom),
        (left, bottom, right, bottom),
    )
    for (x0, y0, x1, y1), on in zip(strokes, _SEGMENTS[digit], strict=True):
        if on == "1":
            draw.rectangle((x0 - t, y0 - t, x1 + t, y1 + t), fill=COLOURS[colour])
    return f"the digit {digit} in {colour}", (("which digit?", digit), ("what colour?", colour))


def _encode(rng: random.Random, image: Image.Image) -> tuple[str, bytes]:
    extension, options = rng.choice([("jpg", {"quality": 90}), ("png", {}), ("webp", {"quality": 90})])
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], **options)
    return extension, buffer.getvalue()


def _write_pairs(folder: Path, rng: random.Random, count: int) -> None:
    folder.mkdir(parents=True)
    for shard, first in enumerate(range(0, count, SAMPLES_PER_SHARD)):
        tar = TarWriter(folder / f"{shard:05d}.tar")
        for index in range(first, min(first + SAMPLES_PER_SHARD, count)):
            scene = draw_scene(rng)
            extension, data = _encode(rng, scene.image)
            tar.add(f"{index:09d}.{extension}", data)
            tar.add(f"{index:09d}.txt", scene.caption.encode())
            width, height = scene.image.size
            tar.add(f"{index:09d}.json", json.dumps({"caption": scene.caption, "width": width, "height": height}).encode())
        tar.close()


def _write_interleaved(folder: Path, rng: random.Random, count: int) -> None:
    folder.mkdir(parents=True)
    for shard, first in enumerate(range(0, count, SAMPLES_PER_SHARD)):
        tar = TarWriter(folder / f"{shard:05d}.tar")
        for index in range(first, min(first + SAMPLES_PER_SHARD, count)):
            items: list[dict[str, str]] = []
            for number in range(rng.randint(1, 3)):
                scene = draw_scene(rng)
                extension, data = _encode(rng, scene.image)
                tar.add(f"{index:09d}.{number}.{extension}", data)
                question, answer = rng.choice(scene.questions)
                items += [{"text": question}, {"image": f"{number}.{extension}"}, {"text": answer}]
            tar.add(f"{index:09d}.json", json.dumps({"items": items}).encode())
        tar.close()


def _write_text(folder: Path, rng: random.Random, count: int) -> None:
    folder.mkdir(parents=True)
    colours, shapes = list(COLOURS), list(SHAPES)
    with (folder / "00000.jsonl").open("w") as file:
        for _ in range(count):
            sentences = []
            for _ in range(rng.randint(2, 6)):
                first, second = rng.randint(0, 4), rng.randint(0, 5)
                sentences.append(
                    rng.choice(
                        (
                            f"{first} plus {second} is {first + second}.",
                            f"a {rng.choice(shapes)} can be {rng.choice(colours)}.",
                            f"after {second} comes {second + 1}.",
                            f"the digit {first} is also called {NUMBERS[first]}.",
                        )
                    )
                )
            file.write(json.dumps({"text": " ".join(sentences)}) + "\n")


def _write_conversations(folder: Path, rng: random.Random, count: int) -> None:
    """Write conversations about one picture each, with one or more of its questions."""
    folder.mkdir(parents=True)
    for shard, first in enumerate(range(0, count, SAMPLES_PER_SHARD)):
        tar = TarWriter(folder / f"{shard:05d}.tar")
        for index in range(first, min(first + SAMPLES_PER_SHARD, count)):
            scene = draw_scene(rng)
            extension, data = _encode(rng, scene.image)
            turns: list[dict[str, str]] = []
            for question, answer in rng.sample(scene.questions, rng.randint(1, len(scene.questions))):
                mark = "" if turns else f"{IMAGE_MARK}\n"
                turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
            tar.add(f"{index:09d}.0.{extension}", data)
            tar.add(f"{index:09d}.json", json.dumps({"image": f"0.{extension}", "conversations": turns}).encode())
        tar.close()


def _write_tasks(folder: Path, rng: random.Random, count: int) -> None:
    folder.mkdir(parents=True)
    for shard, first in enumerate(range(0, count, SAMPLES_PER_SHARD)):
        tar = TarWriter(folder / f"{shard:05d}.tar")
        for index in range(first, min(first + SAMPLES_PER_SHARD, count)):
            scene = draw_scene(rng)
            extension, data = _encode(rng, scene.image)
            tar.add(f"{index:09d}.0.{extension}", data)
            tar.add(f"{index:09d}.json", json.dumps({**_task(rng, scene), "images": [f"0.{extension}"]}).encode())
        tar.close()


def _task(rng: random.Random, scene: Scene) -> dict[str, object]:
    """Return a task of a random kind about a scene."""
    task = rng.choice(list(TASKS))
    question, answer = rng.choice(scene.questions)
    if task == "caption":
        return {"task": task, "answer": scene.caption}
    if task == "vizwiz" and rng.random() < 0.5:
        return {"task": task, "question": "who drew it?", "answer": "unanswerable"}
    if task == "scienceqa":
        colours = rng.sample(list(COLOURS), 3)
        inside = [colour for colour in COLOURS if colour in scene.caption]
        choices = list(dict.fromkeys([inside[0], *(colour for colour in colours if colour not in inside)]))
        rng.shuffle(choices)
        return {"task": task, "question": "which colour is in it?", "choices": choices, "answer": choices.index(inside[0])}
    return {"task": task, "question": question, "answer": answer}


def prepare_demo(out: Path, *, samples: int = 2000, seed: int = 0) -> Summary:
    """Create the data set under `out`, with tokenizer and index.

    It has `samples` training samples (half of them pairs, two fifths interleaved, a tenth text) and, in addition, a quarter as many
    conversations and a quarter as many tasks. The held-out split is made in the same way for max(40, samples // 8) samples. The tokenizer
    is trained on pairs, interleaved documents and text. The same seed produces the same bytes.

    A folder that an interrupted call has left is made anew.

    Raises ValueError if `out` already contains data, or if `samples` is too small.
    """
    began = time.monotonic()
    if samples < 40:
        raise ValueError(f"--samples is {samples}, but the tokenizer needs at least 40 samples to be trained on")
    splits = {"train": samples, "heldout": max(40, samples // 8)}
    unfinished = out / _UNFINISHED
    if unfinished.exists():
        for split in splits:
            for source in _SOURCES:
                shutil.rmtree(out / split / source, ignore_errors=True)
        (out / "tokenizer.model").unlink(missing_ok=True)
    elif (out / "train").exists():
        raise ValueError(f"{out} already contains a data set: remove it or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    for split, count in splits.items():
        rng = random.Random(f"{seed}/{split}")
        _write_pairs(out / split / "pairs", rng, count // 2)
        _write_interleaved(out / split / "interleaved", rng, count * 2 // 5)
        _write_text(out / split / "text", rng, max(4, count // 10))
    prepare_tokenizer(out, out=out / "tokenizer.model", vocab_size=VOCAB_SIZE)
    for split, count in splits.items():
        _write_conversations(out / split / "conversations", random.Random(f"{seed}/{split}/conversations"), count // 4)
        _write_tasks(out / split / "tasks", random.Random(f"{seed}/{split}/tasks"), count // 4)
    summary = prepare_index(out)
    unfinished.unlink()
    summary.seconds = time.monotonic() - began
    return summary
