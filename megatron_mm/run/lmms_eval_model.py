"""A model class for lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), so that its tasks run on our runs and exported models.

    python -m lmms_eval --model megatron_mm --model_args path=runs/mm1_3b,tensor=2 --tasks mme --batch_size 8

lmms-eval finds it by this package's entry point `lmms_eval.models`. Answers are generated in the training layout, with the key/value cache.
All processes answer the same requests: start `tensor x pipeline` of them with torchrun, and use lmms-eval's own options to divide a task's
items among several jobs. Prompts of models with a chat template are written in it; other models get images and text unchanged.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms
from PIL import Image

from megatron_mm.config import ParallelConfig
from megatron_mm.data.text.chat import ChatTemplate, Turn, chat_template, render
from megatron_mm.data.text.items import ImageReference, Item, Text
from megatron_mm.evaluation.generation import Generator, Prompt
from megatron_mm.evaluation.prompts import PromptBuilder, Wording, before_last_answer
from megatron_mm.evaluation.tasks.base import Example, ImageSource
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.registry import family_of
from megatron_mm.families.serialize import load_experiment
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import image_input, open_tokenizer
from megatron_mm.run.evaluate_tasks import for_evaluation, load_model, open_target

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

_MARK = "<image>"


class Request(Wording):
    """Prompts exactly as lmms-eval words them. Images replace <image> in the text, or precede it."""

    @classmethod
    def made(cls, template: ChatTemplate | None) -> Request:
        return cls(form="", separator="", template=template, task="vqa")

    def items(self, examples: Sequence[Example]) -> list[Item]:
        (example,) = examples
        parts = _parts(example.question, len(example.images))
        if self.template is not None:
            return before_last_answer(render([Turn(tuple(parts), "answer")], self.template))
        return [part if isinstance(part, ImageReference) else Text(part, counted=False) for part in parts]


def _parts(text: str, num_images: int) -> list[str | ImageReference]:
    """Text and images in order; all images first if the text does not have one <image> for each."""
    image = ImageReference("image", counted=False)
    if text.count(_MARK) != num_images:
        return [*[image] * num_images, *([text] if text else [])]
    first, *rest = text.split(_MARK)
    parts: list[str | ImageReference] = [first]
    for following in rest:
        parts += [image, following]
    return [part for part in parts if part]


class MegatronMM(lmms):
    """lmms-eval's interface to a run or an exported model."""

    is_simple = True

    def __init__(
        self,
        path: str,
        recipe: str | None = None,
        tensor: int = 1,
        pipeline: int = 1,
        batch_size: int | str = 1,
        max_new_tokens: int = 128,
        **unused: Any,
    ) -> None:
        """
        Args:
            path: a run directory, a checkpoint, or an exported model.
            recipe: recipe of an exported model; None for the one that it states.
            max_new_tokens: maximum length of an answer, for tasks that set none.

        Raises ValueError if there is no such model, or if the number of processes is not tensor x pipeline.
        """
        super().__init__()
        target = open_target(Path(path), get_recipe(recipe) if recipe else None, out=None)
        parallel = ParallelConfig(tensor=int(tensor), pipeline=int(pipeline))
        experiment = replace(load_experiment(target.checkpoint / "experiment.json"), parallel=parallel)
        world_size = topologies.world_size()
        family_of(experiment.model).check_layout(experiment.model, parallel, world_size)
        if parallel.data_parallel_size(world_size) != 1:
            raise ValueError(f"{world_size} processes, but tensor {tensor} x pipeline {pipeline} need {parallel.model_parallel_size}")
        built = for_evaluation(experiment, target.checkpoint)
        self.tokenizer = open_tokenizer(built)
        topology = topologies.initialize(parallel, seed=0)
        self.builder = PromptBuilder(self.tokenizer, image_input(built), threads=4, with_pixels=topology.is_first_stage)
        self.generator = Generator(built, load_model(experiment, topology, target.checkpoint), topology, pad_id=self.tokenizer.pad_id)
        template = experiment.data.chat_template
        self.request = Request.made(None if template is None else chat_template(template))
        self.batch_size_per_gpu = int(batch_size)
        self.max_new_tokens = max_new_tokens

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, cut at the task's stop strings. Consecutive requests with the same options are answered in batches."""
        found: list[str] = []
        for batch in _batches([request.args for request in requests], self.batch_size_per_gpu):
            options = batch[0][1]
            prompts = [self._prompt(self._example(context, *rest)) for context, _, *rest in batch]
            answers = self.generator.greedy(
                prompts,
                max_new_tokens=int(options.get("max_new_tokens") or self.max_new_tokens),
                end_ids=self.builder.end_ids(self.request),
            )
            found += [_cut(self.tokenizer.decode(ids), options.get("until")) for ids in answers]
        return found

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy generation produces it."""
        found = []
        for context, target, *rest in (request.args for request in requests):
            visuals, doc_id, task, split = rest
            document = self.task_dict[task][split][doc_id]
            continuation = target if isinstance(target, str) else target(document)
            example = self._example(context, visuals, doc_id, task, split)
            prompt, (ids,) = self._prompt(example), self.builder.choice_ids(self.request, [example], [continuation.strip()])
            ((value,),) = self.generator.log_likelihoods([prompt], [[ids]])
            (greedy,) = self.generator.greedy([prompt], max_new_tokens=len(ids), end_ids=[])
            found.append((value, greedy == ids))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks with several rounds are not supported: leave them out")

    def _prompt(self, example: Example) -> Prompt:
        return self.builder.build(self.request, [example])

    def _example(self, context: str, visuals: Any, doc_id: int, task: str, split: str) -> Example:
        images = visuals(self.task_dict[task][split][doc_id]) or []
        return Example(str(doc_id), tuple(ImageSource(data=_encoded(image)) for image in images), context, ("",))


def _encoded(image: Any) -> bytes:
    """Encode a picture without loss (PNG). Raises ValueError for anything else: these models take no video or sound."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"megatron_mm models take images, not {type(image).__name__}: choose tasks with images")
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _batches(arguments: list[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    """Split requests into batches of consecutive ones with the same options."""
    batch: list[tuple[Any, ...]] = []
    for one in arguments:
        if batch and (len(batch) == size or one[1] != batch[0][1]):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()
