"""Evaluation of a model on tasks: demonstrations, batches over data-parallel ranks, answers (written as soon as they are known), scores.

All results are in one folder:

    SETTING.json           a task's scores, its settings, and which demonstrations were drawn      (`results.Result`)
    items/SETTING/         rank_0.jsonl, rank_1.jsonl, ...: one line per item, written when it is answered; setting.json

An interrupted evaluation continues with the items that have no line yet, on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.evaluation.generation import Generator, Prompt
from megatron_mm.evaluation.metrics.mmmu import chosen_letter
from megatron_mm.evaluation.prompts import BadImage, PromptBuilder, Wording, Written, cut_answer
from megatron_mm.evaluation.results import Result
from megatron_mm.evaluation.tasks.base import LETTERS, Answered, Example, Task
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform.files import file_error, write_whole

logger = logging.getLogger(__name__)

_TELL_SECONDS = 10


@dataclass(frozen=True)
class Options:
    """Options of an evaluation besides tasks and shots."""

    seed: int = 0
    """Seed that draws the demonstrations and, under a limit, the items."""
    limit: int | None = None
    """Largest number of items of a task, drawn by seed; None for all."""
    batch_size: int = 16
    """Items that each model replica answers at once."""
    beams: int = 1
    """Beams of the search; 1 is greedy."""
    form: str | None = None
    """Form of prompts, in place of the task's (`evaluation.prompts`)."""
    method: Literal["generate", "rank"] | None = None
    """Method, in place of the task's."""
    text_demonstrations: int = 0
    """Number of demonstrations shown without their images in zero-shot evaluation. Flamingo and OpenFlamingo use two."""
    low_resolution_demonstrations: bool = False
    """Show images of demonstrations only as overviews: MM1's mixed-resolution examples (arXiv 2403.09611, section 4)."""


class TaskRunner:
    """Evaluates one model; every method is called by all processes together."""

    def __init__(self, generator: Generator, builder: PromptBuilder, topology: Topology, *, out: Path, options: Options) -> None:
        self.generator = generator
        self.builder = builder
        self.topology = topology
        self.out = out
        self.options = options
        self._longest = 0
        """Number of tokens of the current task's longest prompt on this process."""

    def run(self, task: Task, *, shots: int, data: Path, wording: Wording, model: dict[str, Any]) -> Result:
        """Evaluate a task. Raises ValueError that names missing or damaged files.

        Args:
            data: folder of the tasks' files.
            model: name, checkpoint and step of the evaluated model, to be recorded.
        """
        examples = _drawn(task.examples(data), self.options.limit, seed=self.options.seed)
        blind = 0 if shots else self.options.text_demonstrations
        pool = task.training_examples(data) if shots or blind else []
        if len(pool) < shots:
            raise ValueError(f"task {task.name} has {len(pool)} training examples, too few for --shots {shots}")
        method = self.options.method or task.method
        setting = self._setting(task, wording, method, shots=shots, blind=blind, model=model)
        began = time.monotonic()
        items = _Items(self.out, setting, self.topology)
        job = _Job(task, wording, method, shots or blind, pool, blind=blind > 0)
        left = [example for example in examples if example.key not in items.done]
        for own in dict.fromkeys(map(job.method_of, left)):
            group = [example for example in left if job.method_of(example) == own]
            mine = group[self.topology.data_rank :: self.topology.data_size]
            rounds = -(-len(group) // (self.topology.data_size * self.options.batch_size))
            self._answer(replace(job, method=own), mine, rounds=rounds, items=items)
        self._tell_long_prompts(job)
        answers = items.gather()
        result = self._result(task, examples, answers, setting, job, seconds=time.monotonic() - began)
        if self.topology.is_main:
            result.write(self.out)
        return result

    def _setting(self, task: Task, wording: Wording, method: str, *, shots: int, blind: int, model: dict[str, Any]) -> dict[str, Any]:
        """Return the setting of a result. Answers are reused only if all of it is the same, so what differs from the task's own setting
        (`evaluation.settings`) is left out where nothing differs."""
        low = bool(shots) and self.options.low_resolution_demonstrations
        return {
            "task": task.name,
            "shots": shots,
            "model": model,
            "seed": self.options.seed,
            "limit": self.options.limit,
            "method": method,
            "beams": self.options.beams,
            "wording": wording.form if wording.template is None else f"chat template, task {wording.task}",
            **({"own_method": task.method} if method != task.method else {}),
            **({"form": wording.given_form} if wording.given_form is not None else {}),
            **({"text_demonstrations": blind} if blind else {}),
            **({"low_resolution_demonstrations": True} if low else {}),
        }

    def _answer(self, job: _Job, mine: list[Example], *, rounds: int, items: _Items) -> None:
        """Answer this rank's items. All data-parallel ranks run the same number of rounds, because experts may be divided among them."""
        began, size, last_told = time.monotonic(), self.options.batch_size, 0.0
        for number in range(rounds):
            batch = mine[number * size : (number + 1) * size]
            shown = [job.demonstrations(example, seed=self.options.seed) for example in batch]
            prompts, good = self._prompts(job, batch, shown)
            answers = self._ask(job, [(batch[place], shown[place]) for place in prompts], list(prompts.values()))
            said = {place: answer for place, answer in zip(prompts, answers, strict=True) if place in good}
            for place, example in enumerate(batch):
                keys = [one.key for one in shown[place]]
                items.write({"key": example.key, "answer": said.get(place), "demonstrations": keys})
            last_told = self._tell_progress(job, began, number, rounds, last_told=last_told)

    def _tell_progress(self, job: _Job, began: float, number: int, rounds: int, *, last_told: float) -> float:
        """Log progress every ten seconds and at the end; return the time of the last log line."""
        now = time.monotonic()
        if not self.topology.is_main or (number + 1 < rounds and now - last_told < _TELL_SECONDS):
            return last_told
        pace = (now - began) / (number + 1)
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (rounds - number - 1)))
        logger.info("%s: batch %d of %d, %s left", job.name, number + 1, rounds, left)
        return now

    def _prompts(self, job: _Job, batch: list[Example], shown: list[list[Example]]) -> tuple[dict[int, Prompt], list[int]]:
        """Return prompts by their index in the batch, and the indices of those whose images could all be decoded. Each image is decoded by
        the one process of a tensor-parallel group that encodes it; a failure is sent to all processes of the model."""
        written: dict[int, Written] = {}
        for place, example in enumerate(batch):
            try:
                low = self.options.low_resolution_demonstrations
                written[place] = self.builder.write(job.wording, [*shown[place], example], low_resolution=low)
            except BadImage as error:
                self._tell_left_out(job, example, error)
        self._longest = max(self._longest, *(len(one.prompt.ids) for one in written.values()), 0)
        known = self._good_everywhere([place in written for place in range(len(batch))])
        made: dict[int, Prompt] = {}
        bad: list[list[str]] = [[] for _ in batch]
        for place, share in zip(known, self.generator.passes.shares([written[place].prompt for place in known]), strict=True):
            made[place], bad[place] = self.builder.with_images(written[place], share)
            if bad[place]:
                self._tell_left_out(job, batch[place], f"{', '.join(bad[place])} does not decode")
        whole = self._good_everywhere([not names for names in bad])
        # Prompts with a failed image are still run: all processes must pass the prompts among which the images were shared out.
        return made, [place for place in known if place in whole]

    def _tell_long_prompts(self, job: _Job) -> None:
        """Warn if prompts are longer than the sequences of training, as prompts with many demonstrations may be."""
        trained, longest, self._longest = self.generator.passes.experiment.data.sequence_length, self._longest, 0
        if longest <= trained or not self.topology.is_main:
            return
        lower = self.builder.image.sub_images is not None and not job.blind and not self.options.low_resolution_demonstrations
        logger.warning(
            "%s: prompts of up to %d tokens, but the model was trained on sequences of %d%s",
            job.name,
            longest,
            trained,
            shorter_prompts(shots=job.shots, may_be_lower=lower),
        )

    def _tell_left_out(self, job: _Job, example: Example, why: object) -> None:
        logger.warning("%s, item %s is left out: %s", job.task.name, example.key, why)

    def _good_everywhere(self, good: list[bool]) -> list[int]:
        """Return the indices that are good on all processes of the model."""
        bad = torch.tensor([float(not one) for one in good], device=self.topology.device)
        if len(good):
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=parallel_state.get_model_parallel_group())
        return [place for place, one in enumerate(bad.tolist()) if not one]

    def _ask(self, job: _Job, asked: list[tuple[Example, list[Example]]], prompts: list[Prompt]) -> list[str]:
        """Return the model's answers. Under expert parallelism a rank without items runs an empty prompt."""
        builder, wording = self.builder, job.wording
        if not prompts:
            if self.generator.passes.experiment.parallel.expert == 1:
                return []
            prompts = [Prompt([builder.tokenizer.bos_id], [], torch.empty(0, 3, builder.image.size, builder.image.size, dtype=torch.uint8))]
        if job.method == "rank":
            texts = [job.choices(example) for example, _ in asked]
            choices = [
                builder.choice_ids(wording, [*demonstrations, example], text)
                for (example, demonstrations), text in zip(asked, texts, strict=True)
            ] or [[[0]]]
            scores = self.generator.log_likelihoods(prompts, choices)
            if job.by_length:
                scores = [[s / max(1, len(t)) for s, t in zip(row, text, strict=True)] for row, text in zip(scores, texts, strict=False)]
            return [LETTERS[row.index(max(row))] for row in scores[: len(asked)]]
        end_ids, new = builder.end_ids(wording), job.task.max_new_tokens
        if self.options.beams > 1:
            found = self.generator.beam(prompts, num_beams=self.options.beams, max_new_tokens=new, end_ids=end_ids)
        else:
            found = self.generator.greedy(prompts, max_new_tokens=new, end_ids=end_ids)
        return [job.read(builder.tokenizer.decode(ids), example) for ids, (example, _) in zip(found, asked, strict=False)]

    def _result(
        self, task: Task, examples: list[Example], answers: dict[str, Any], setting: dict[str, Any], job: _Job, *, seconds: float
    ) -> Result:
        answered = [Answered(e, answers[e.key]["answer"]) for e in examples if answers.get(e.key, {}).get("answer") is not None]
        scores = task.score(answered) if answered else {"score": float("nan")}
        stderr = scores.pop("stderr", None)
        first = job.wording.items([*job.demonstrations(examples[0], seed=self.options.seed), examples[0]])
        return Result(
            task=task.name,
            title=task.title,
            metric=task.metric,
            scores={name: round(value, 4) for name, value in scores.items()},
            setting=setting,
            num_items=len(answered),
            bad_items=len(examples) - len(answered),
            demonstrations={e.key: answers[e.key]["demonstrations"] for e in examples[:1000] if e.key in answers and job.shots},
            example_prompt=_spelled(first),
            seconds=round(seconds, 1),
            stderr=None if stderr is None else round(stderr, 4),
        )


def shorter_prompts(*, shots: int, may_be_lower: bool) -> str:
    """What makes prompts shorter: fewer demonstrations, or overviews of their images if these are shown with crops."""
    if not shots:
        return ""
    return ": use fewer shots or --low-resolution-demonstrations" if may_be_lower else ": use fewer shots"


@dataclass(frozen=True)
class _Job:
    """A task and how it is evaluated."""

    task: Task
    wording: Wording
    method: str
    shots: int
    pool: list[Example]
    blind: bool = False
    """Show demonstrations without their images."""

    @property
    def name(self) -> str:
        """The task and its demonstrations, for the log."""
        return f"{self.task.name}, {'0 shots, text demonstrations: ' if self.blind else ''}{self.shots}{'' if self.blind else ' shots'}"

    @property
    def by_length(self) -> bool:
        """Whether choices are compared by log-likelihood per character. Otherwise long choices would never win."""
        return self.task.kind == "text"

    def demonstrations(self, example: Example, *, seed: int) -> list[Example]:
        """Draw demonstrations from the pool by the item's key, so that they do not depend on the number of processes or on other items."""
        if not self.shots:
            return []
        drawn = random.Random(f"{seed}/{self.task.name}/{example.key}").sample(range(len(self.pool)), min(self.shots + 1, len(self.pool)))
        shown = [self.pool[row] for row in drawn if self.pool[row].key != example.key or self.task.kind == "text"][: self.shots]
        return [replace(one, images=()) for one in shown] if self.blind else shown

    def choices(self, example: Example) -> list[str]:
        if self.task.kind == "yes_no":
            return ["yes", "no"]
        return list(example.choices) if self.task.kind == "text" else list(LETTERS[: len(example.choices)])

    def method_of(self, example: Example) -> str:
        """Return the method for an example. A multiple-choice task may contain open questions, which have no choices to rank."""
        return "generate" if self.task.kind == "choice" and not example.choices else self.method

    def read(self, text: str, example: Example) -> str:
        """Read the answer from a generated text."""
        answer = cut_answer(text, max_words=self.task.max_words)
        return chosen_letter(answer, example.choices) if example.choices and self.task.kind == "choice" else answer


class _Items:
    """Answers under one setting, on disk."""

    def __init__(self, out: Path, setting: dict[str, Any], topology: Topology) -> None:
        name = Result.name_of(setting)
        digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = out / "items" / f"{name}_{digest}"
        self.topology = topology
        if topology.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(self.folder / "setting.json", json.dumps(setting, indent=2) + "\n")
            except OSError as error:
                raise ValueError(f"{file_error(error, places=[out])}: choose another place for results with --out FOLDER") from error
        self.done = set(self.gather())
        if self.done and topology.is_main:
            logger.info("%s: %d items have already been evaluated", name, len(self.done))
        self.writes = topology.tensor_rank == 0 and topology.is_first_stage
        self._file = _append_to(self.folder / f"rank_{topology.data_rank}.jsonl") if self.writes else None

    def write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def gather(self) -> dict[str, Any]:
        """Read all rows on the first process and return them, by key, on every process."""
        dist.barrier()
        found: list[dict[str, Any]] = [{row["key"]: row for row in self._rows()} if self.topology.is_main else {}]
        dist.broadcast_object_list(found, src=0, device=self.topology.device)
        return found[0]

    def _rows(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob("rank_*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:  # the last line of a process that was killed
                    logger.warning("%s has an incomplete line: its item is evaluated again", path)


def _append_to(path: Path) -> TextIO:
    """Open a file of lines for appending; first remove the incomplete line that a killed process may have left."""
    if path.is_file():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
    return path.open("a", encoding="utf-8")


def _drawn(examples: list[Example], limit: int | None, *, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    rows = sorted(random.Random(f"{seed}/items").sample(range(len(examples)), limit))
    return [examples[row] for row in rows]


def _spelled(items: Sequence[Any]) -> str:
    """Write items as readable text."""
    return "".join(getattr(item, "text", None) or getattr(item, "token", None) or "<image>" for item in items)
