"""Losses and captions on the `heldout` split, in the training layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from megatron_mm.config import Experiment
from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.sources.index import open_split
from megatron_mm.data.sources.source import Source
from megatron_mm.data.text.chat import chat_template
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.evaluation.captions import CaptionSample, caption_tasks
from megatron_mm.evaluation.generation import generate
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.loss import LossTotals
from megatron_mm.training.step import TrainingStep
from megatron_mm.training.trainer import Batches

SPLIT = "heldout"
"""Name of the split for evaluation."""


class HeldOut:
    """Evaluates the same held-out batches every time; every method is called by all processes together."""

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        tokenizer: Tokenizer,
        *,
        image: ImageInput,
        batches: Callable[[Experiment, Topology, Tokenizer], Batches],
    ) -> None:
        """
        Args:
            image: how images enter the model.
            batches: opens the held-out split at its first batch.
        """
        self.experiment = experiment
        self.topology = topology
        self.tokenizer = tokenizer
        self.present = (experiment.data.folder / SPLIT).is_dir()
        self.sources = experiment.data.sources
        self.image = image
        self.batches = batches

    def losses(self, step: TrainingStep, *, images: Literal["true", "shuffled", "blank"] | None = None) -> dict[str, float]:
        """Loss per token over `eval.batches` global batches, in total and by source; empty if there is no held-out split.

        Args:
            images: replaces `data.images`, which selects the images that the model sees. The difference in loss between "true" and
                "shuffled" shows how much the model uses the images.
        """
        if not self.present:
            return {}
        data = self.experiment.data if images is None else replace(self.experiment.data, images=images)
        loader = self.batches(replace(self.experiment, data=data), self.topology, self.tokenizer)
        total = LossTotals(losses=[0.0] * len(self.sources), tokens=[0.0] * len(self.sources))
        try:
            for _ in range(self.experiment.eval.batches):
                found = step.evaluate(next(loader).micro_batches)
                total.losses = [a + b for a, b in zip(total.losses, found.losses, strict=True)]
                total.tokens = [a + b for a, b in zip(total.tokens, found.tokens, strict=True)]
        finally:
            loader.close()
        by_source = {f"{SPLIT}/loss/{name}": loss for name, loss in total.by_source(self.sources).items()}
        return {f"{SPLIT}/loss": total.mean, **by_source}

    def why_no_captions(self) -> str:
        """Reason why `captions` would return none; empty if it would return some."""
        if not self.experiment.eval.samples:
            return "--eval.samples is 0"
        pairs = self._pairs()
        if pairs is None:
            return f"none of the sources {', '.join(self.sources)} in {self.experiment.data.path / SPLIT} is of kind pairs"
        return "" if len(pairs) else f"the source {pairs.name} in {self.experiment.data.path / SPLIT} is empty"

    def _pairs(self) -> Source | None:
        """Return the first held-out source of image-text pairs, or None if there is none."""
        indexes = open_split(self.experiment.data.folder, SPLIT, sources=self.sources, check=False) if self.present else []
        return next((index for index in indexes if index.kind == "pairs"), None)

    def captions(self, model: list[torch.nn.Module]) -> list[CaptionSample]:
        """Generate captions for the first `eval.samples` held-out pairs; empty if there are no pairs."""
        pairs = self._pairs()
        if pairs is None:
            return []
        config = self.experiment.eval
        template = pairs.chat_template
        end = self.tokenizer.eos_id if template is None else self.tokenizer.special_id(chat_template(template).end_of_answer)
        tasks = caption_tasks(pairs, self.tokenizer, self.image, count=config.samples)
        answers = generate(
            self.experiment,
            model,
            self.topology,
            [task.prompt for task in tasks],
            max_new_tokens=config.max_new_tokens,
            eos_id=end,
            pad_id=self.tokenizer.pad_id,
            cache=not _drops_tokens(self.experiment),
        )
        return [task.answered(self.tokenizer.decode(ids)) for task, ids in zip(tasks, answers, strict=True)]


def _drops_tokens(experiment: Experiment) -> bool:
    """Return whether experts have a capacity limit. A pass over new tokens alone would then drop different tokens than a pass over whole
    documents, so no cache is used."""
    moe = experiment.model.decoder.moe
    return moe is not None and moe.capacity_factor is not None
