"""The definition of a benchmark: how to read examples from its published files, how to prompt, and how to score."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

_IMAGES_LOOKED_FOR = 64
"""Number of examples whose image files are checked before a task begins."""
Kind = Literal["caption", "vqa", "choice", "yes_no", "text"]
"""Kind of question, which determines the prompt's form (`evaluation.prompts`)."""
Method = Literal["generate", "rank"]
"""How answers are found: generated, or the most likely of the choices."""


@dataclass(frozen=True)
class ImageSource:
    """An encoded image: a file, or its bytes."""

    path: Path | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """Return its bytes. Raises OSError if the file cannot be read."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        return self.path.read_bytes()


@dataclass(frozen=True)
class Example:
    """A question about images, and its answers."""

    key: str
    """Unique in its split."""
    images: tuple[ImageSource, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()
    """All reference answers or captions; for multiple choice, the letter of the right choice."""
    shown: str = ""
    """The answer shown in a demonstration; empty for the first of `answers`."""
    choices: tuple[str, ...] = ()
    context: str = ""
    category: str = ""
    """Category for scores by category."""

    @property
    def answer(self) -> str:
        return self.shown or self.answers[0]

    @property
    def is_answered(self) -> bool:
        """Whether there is an answer to compare with."""
        return any(answer.strip() for answer in self.answers)

    @property
    def has_right_choice(self) -> bool:
        """Whether the right letter is that of a choice. Always true for a question without choices, whose answers are free text."""
        return not self.choices or all(answer in LETTERS[: len(self.choices)] for answer in self.answers)


@dataclass(frozen=True)
class Answered:
    """An example and the model's answer."""

    example: Example
    answer: str


@dataclass(frozen=True)
class Split:
    """A split of a task, in the files of its publisher."""

    files: tuple[str, ...]
    """Paths or patterns relative to the task's folder (or to another task's, as `../coco_caption/...`). A missing file is an error."""
    read: Callable[[Path], list[Example]]
    """Reads the examples from the task's folder. Raises DamagedFile."""


def annotated(file: str, read: Callable[[Path, Path], list[Example]], images: str) -> Split:
    """A split with one file of annotations and a folder of images, both in the task's folder.

    Args:
        read: (file, images) -> examples.
    """
    return Split((file,), lambda folder: read(folder / file, folder / images))


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    title: str
    kind: Kind
    metric: str
    """Name of the main score, with its unit."""
    score: Callable[[Sequence[Answered]], dict[str, float]]
    """Computes scores of answers, by name; the main one is "score", and "stderr" its standard error, if it is known."""
    evaluated: Split
    demonstrations: Split | None
    """Split from which demonstrations are drawn; None if the task is zero-shot only."""
    published_at: str
    """Where its files are published."""
    method: Method = "generate"
    max_new_tokens: int = 10
    max_words: int | None = None
    """Number of words of a generated answer that are read; None for its first line."""
    prompt: str = "vqa"
    """The task of multi-task training (`data.text.conversations.TASKS`) whose wording is used under a chat template."""
    form: str = ""
    """Name of the form of its prompts (`evaluation.prompts.FORMS`); empty for the form of its kind."""
    folder: str = ""
    """Folder of its files below the data folder; empty for its name."""
    images: tuple[str, ...] = field(default=())
    """Folders of images, for the documentation."""

    def path(self, data: Path) -> Path:
        return data / (self.folder or self.name)

    def check_method(self, method: Method | None) -> None:
        """Raise ValueError if the task does not support the method that the user chose."""
        possible = ("generate", "rank") if self.kind in ("choice", "yes_no") else (self.method,)
        if method is not None and method not in possible:
            why = "it has no choices" if method == "rank" else "its choices are whole texts"
            raise ValueError(f"--method {method} cannot be used with task {self.name}: {why}; leave the option out")

    def possible_shots(self, shots: Sequence[int]) -> list[int]:
        """Return those of the wanted numbers of shots with which the task can be evaluated: 0 alone if it has no training split.

        Raises ValueError if none is left.
        """
        possible = [count for count in shots if count == 0 or self.demonstrations is not None]
        left_out = [count for count in shots if count not in possible]
        if not possible:
            wanted = " ".join(map(str, shots))
            raise ValueError(
                f"task {self.name} has no training split, so it cannot be evaluated with --shots {wanted}: add 0, or leave out the task"
            )
        if left_out:
            logger.info("task %s has no training split: it is evaluated with 0 shots, not with %s", self.name, _listed(left_out))
        return possible

    def examples(self, data: Path) -> list[Example]:
        """Read the examples to evaluate. Raises ValueError that names missing or damaged files and where they are published."""
        return self._read(self.evaluated, data)

    def training_examples(self, data: Path) -> list[Example]:
        """Read the examples from which demonstrations are drawn. Raises ValueError as `examples` does, and if there is no such split."""
        if self.demonstrations is None:
            raise ValueError(
                f"task {self.name} has no training split: evaluate it with --shots 0 and without --text-demonstrations, or leave it out"
            )
        found = self._read(self.demonstrations, data)
        return self._left(found, [example for example in found if example.answer.strip()], "have an empty answer", self.demonstrations)

    def _read(self, split: Split, data: Path) -> list[Example]:
        folder = self.path(data)
        missing = [
            name for name in split.files if not list(folder.glob(name) if "*" in name else [p for p in [folder / name] if p.exists()])
        ]
        advice = f"put {', '.join(split.files)} into {folder} ({self.published_at})"
        if missing:
            raise ValueError(
                f"task {self.name} needs {folder / missing[0]}, which does not exist: {advice}, or give the folder with the tasks' files "
                "as --data (without it, the run's data.path is used)"
            )
        try:
            found = split.read(folder)
        except DamagedFile as error:
            raise ValueError(f"task {self.name}: {error}: restore it, or {advice}") from None
        if not found:
            raise ValueError(f"task {self.name}: {', '.join(split.files)} in {folder} contain no example: {advice}")
        answered = self._left(found, [one for one in found if one.is_answered], "have no answer", split)
        if self.kind == "choice":
            answered = self._left(
                answered, [one for one in answered if one.has_right_choice], "have an answer that is not among their choices", split
            )
        self._check_images(answered, folder)
        return self._with_own_keys(answered)

    def _left(self, examples: list[Example], kept: list[Example], why: str, split: Split) -> list[Example]:
        """Return the kept examples and log how many are left out. Raises ValueError if none is kept."""
        if not kept:
            raise ValueError(
                f"task {self.name}: all {len(examples)} examples of {', '.join(split.files)} {why}: the answers of some splits are not "
                f"published; use the files named for the task ({self.published_at})"
            )
        if len(kept) < len(examples):
            lost = next(one for one, other in itertools.zip_longest(examples, kept) if one is not other)
            count = len(examples) - len(kept)
            logger.warning(
                "task %s: %d of %d examples %s and are left out; the first is %s", self.name, count, len(examples), why, lost.key
            )
        return kept

    def _check_images(self, examples: list[Example], folder: Path) -> None:
        """Raise ValueError if none of the checked images exists, because a folder is missing or has another name. (If single images are
        missing, only their items are left out.)"""
        paths = [image.path for example in examples[:: len(examples) // _IMAGES_LOOKED_FOR + 1] for image in example.images if image.path]
        if paths and not any(path.is_file() for path in paths):
            raise ValueError(
                f"task {self.name}: none of the {len(paths)} images that were checked exists; the first is {paths[0]}: put the images into "
                f"{', '.join(str(folder / name) for name in self.images) or folder} ({self.published_at})"
            )

    def _with_own_keys(self, examples: list[Example]) -> list[Example]:
        """Make keys unique, since answers are stored by key. Repeated examples are left out, and their number is logged."""
        kept: dict[str, Example] = {}
        repeated, renamed = 0, 0
        for example in examples:
            key, number = example.key, 1
            while key in kept and replace(kept[key], key=example.key) != example:
                number += 1
                key = f"{example.key}~{number}"
            repeated += key in kept
            renamed += number > 1 and key not in kept
            kept.setdefault(key, example if number == 1 else replace(example, key=key))
        if repeated:
            logger.warning("task %s: %d examples occur more than once in its files and are counted once", self.name, repeated)
        if renamed:
            logger.warning("task %s: %d examples share an id with another example; each is counted", self.name, renamed)
        return list(kept.values())


def _listed(numbers: Sequence[int]) -> str:
    """Write numbers as `4, 8 and 16`."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


class DamagedFile(ValueError):
    """A published file is damaged; the message names the file and says what is wrong."""


def read_json(path: Path) -> Any:
    """Read a JSON file, with or without a byte order mark. Raises DamagedFile."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path} cannot be read as JSON ({error})") from None


def read_json_lines(path: Path) -> list[Any]:
    """Read a file with one JSON value per line, skipping blank lines; texts may contain Unicode line breaks. Raises DamagedFile."""
    found = []
    try:
        for line in path.read_text(encoding="utf-8-sig").split("\n"):
            found.append(json.loads(line) if line.strip() else None)
    except (OSError, ValueError) as error:
        place = f", line {len(found) + 1}" if found else ""
        raise DamagedFile(f"{path} cannot be read as JSON lines{place} ({error})") from None
    return [value for value in found if value is not None]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a parquet file. Raises DamagedFile."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DamagedFile(f"{path} cannot be read as parquet ({error})") from None
    return rows


def parsed(path: Path, rows: Callable[[], list[Example]]) -> list[Example]:
    """Return the examples that `rows` makes from a file's contents. Raises DamagedFile if a field is missing or has another type."""
    try:
        return rows()
    except DamagedFile:
        raise
    except KeyError as error:
        raise DamagedFile(f"{path} is not in its published format: an entry lacks {error}") from None
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise DamagedFile(f"{path} is not in its published format ({type(error).__name__}: {error})") from None


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
