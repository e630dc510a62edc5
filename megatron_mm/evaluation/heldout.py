"""Losses and captions on the `heldout` split, in the training layout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch

from megatron_mm.config import DataConfig, Experiment
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

logger = logging.getLogger(__name__)

SPLIT = "heldout"
"""Name of the split for evaluation."""


def with_held_out_sources(experiment: Experiment) -> Experiment:
    """The experiment, whose mixture has only the sources that the held-out split has. Their shares stay in proportion.

    Raises ValueError if the split is there and has none of them.
    """
    data = experiment.data
    missing = missing_sources(data)
    if not missing:
        return experiment
    mixture = {name: data.mixture[name] for name in data.sources if name not in missing}
    if not mixture:
        folder = data.folder / SPLIT
        raise ValueError(
            f"{folder} has none of the sources {', '.join(data.sources)} of data.mixture; it has "
            f"{sorted(path.name for path in folder.iterdir())}: name its folders as those of the training split, or remove {folder}"
        )
    return replace(experiment, data=replace(data, mixture=mixture))


def missing_sources(data: DataConfig) -> list[str]:
    """Sources of the mixture that the held-out split lacks; none if there is no held-out split."""
    folder = data.folder / SPLIT
    return [name for name in data.sources if not (folder / name).is_dir()] if folder.is_dir() else []


def tell_missing_sources(data: DataConfig) -> None:
    """Warn of sources of the mixture that the held-out split lacks."""
    if missing := missing_sources(data):
        lacking = ", ".join(missing)
        logger.warning("%s lacks %s of data.mixture: held-out losses are those of the other sources", data.folder / SPLIT, lacking)


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
        self.image = image
        self.batches = batches

    @cached_property
    def sources(self) -> list[str]:
        """Sources of the mixture that the split has, in the order in which its batches number them. Raises ValueError if there are none."""
        return with_held_out_sources(self.experiment).data.sources

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
        mixed = len(self.experiment.data.sources)
        total = LossTotals(losses=[0.0] * mixed, tokens=[0.0] * mixed)
        try:
            for _ in range(self.experiment.eval.batches):
                found = step.evaluate(next(loader).micro_batches)
                total.losses = [a + b for a, b in zip(total.losses, found.losses, strict=True)]
                total.tokens = [a + b for a, b in zip(total.tokens, found.tokens, strict=True)]
        finally:
            loader.close()
        number = len(self.sources)  # the step has room for all sources of the mixture
        total = LossTotals(losses=total.losses[:number], tokens=total.tokens[:number])
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
