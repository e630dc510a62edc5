"""From an experiment to batches: opens the sources, makes the plan, and starts this process's loader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_mm.config import DataConfig, Experiment
from megatron_mm.config.references import load_object
from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.load.loader import Loader, RankView, StepBatch
from megatron_mm.data.plan.balance import Costs
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.plan import Plan, PlanState
from megatron_mm.data.sources.index import GIVE_DATA, check_folder, open_split
from megatron_mm.data.sources.index_copies import data_folder
from megatron_mm.data.sources.source import Source
from megatron_mm.data.sub_images import LowResolution
from megatron_mm.data.text.chat import chat_template
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.data.tiling import Tiling
from megatron_mm.evaluation.heldout import SPLIT as HELD_OUT
from megatron_mm.evaluation.heldout import with_held_out_sources
from megatron_mm.families.registry import family_of
from megatron_mm.flops import StepWork
from megatron_mm.parallel.text_sharing import text_group
from megatron_mm.parallel.topology import Topology

TRAINING = "train"
"""Name of the training split."""


def open_tokenizer(experiment: Experiment) -> Tokenizer:
    """Open the experiment's SentencePiece model with the special tokens of its model family.

    Raises ValueError, naming the data folder or the file, if either is missing or the file is not a tokenizer.
    """
    data = experiment.data
    if data.tokenizer is None:  # a tokenizer given by name needs no data set: benchmarks can run without one
        folder = local_data(data)
        check_folder(folder)
        if not data.tokenizer_path.is_file() and not any((folder / s).is_dir() for s in (TRAINING, HELD_OUT)):
            raise ValueError(f"data.path {data.path} is not a data set, because it has no folder {TRAINING!r}: {GIVE_DATA}")
        if not data.tokenizer_path.is_file():
            raise ValueError(
                f"tokenizer {data.tokenizer_path} does not exist: train one with `megatron-mm prepare tokenizer {data.path}`, or give "
                "--data.tokenizer FILE"
            )
    elif not data.tokenizer.is_file():
        raise ValueError(
            f"tokenizer {data.tokenizer} does not exist: give another file as --data.tokenizer, or leave it out to use the data set's"
        )
    return Tokenizer.open(data.tokenizer_path, special=family_of(experiment.model).special_tokens)


def has_data(experiment: Experiment) -> bool:
    """Whether there is a data set at the experiment's path.

    Any existing folder counts if it is not the default one, so that opening it reports what is wrong.
    """
    folder = local_data(experiment.data)
    return (folder / TRAINING).is_dir() or (folder.is_dir() and folder != DataConfig().path)


def local_data(data: DataConfig) -> Path:
    """The data set's folder on this machine. If the data set is in an object store, its indexes are copied first
    (`data.sources.index_copies`)."""
    return data_folder(data.path, sources=data.sources, tokenizer=data.tokenizer is None)


def image_input(experiment: Experiment) -> ImageInput:
    """How images enter the experiment's model. Raises ValueError if the experiment sets tiles or low resolution and the model does not
    support them."""
    family, data = family_of(experiment.model), experiment.data
    image = replace(family.image_input(experiment.model), to_rgb=data.to_rgb)
    if data.low_resolution_demonstrations:
        if image.sub_images is None:
            raise ValueError(
                f"data.low_resolution_demonstrations is {data.low_resolution_demonstrations}, but the model does not use sub-images, so "
                "there is no lower resolution: set it to 0, or set model.sub_images"
            )
        image = replace(image, low_resolution=LowResolution(data.low_resolution_demonstrations, experiment.train.seed))
    if data.max_tiles is None:
        return image
    if not family.takes_tiles:
        raise ValueError(
            f"data.max_tiles is {data.max_tiles}, but {experiment.model.family} models do not use tiles: remove data.max_tiles"
        )
    return replace(image, tiling=Tiling(min_tiles=data.min_tiles, max_tiles=data.max_tiles))


def open_sources(experiment: Experiment, *, split: str, check: bool = True) -> list[Source]:
    """The sources of a split that the mixture names, after `data.preprocessors`. Raises ValueError if a source has no samples left, or if a
    preprocessor returns None."""
    data = experiment.data
    found: list[Source] = []
    for source in open_split(local_data(data), split, sources=data.sources, check=check):
        for reference in data.preprocessors:
            processed = load_object(reference)(source)
            if processed is None:
                raise ValueError(f"the preprocessor {reference} returns None for source {source.location}: let it return a source")
            source = processed
        if len(source) == 0:
            raise ValueError(
                f"the preprocessors {list(data.preprocessors)} drop all samples of source {source.location}: remove one of them"
            )
        found.append(source)
    return found


def make_plan(experiment: Experiment, *, split: str, check: bool = True) -> Plan:
    """The plan of a split: a pure function of the experiment and the indexes on disk.

    Raises ValueError if the data path, a source or its index is missing or empty, or if a source was indexed with another chat template.

    Args:
        check: check every shard and the index's arrays; in a run only the main process does so.
    """
    data = experiment.data
    names = data.sources
    indexes = open_sources(experiment, split=split, check=check)
    _check_rendering(data, indexes)
    return Plan(
        indexes,
        weights=[data.mixture[name] for name in names],
        limits=Limits(
            sequence_length=data.sequence_length,
            max_images=data.max_images_per_sequence,
            max_images_per_document=data.max_images_per_document,
        ),
        image=image_input(experiment),
        packing_window=data.packing_window,
        seed=experiment.train.seed,
        global_batch_size=experiment.train.global_batch_size,
        micro_batch_size=experiment.train.micro_batch_size,
        token_multiple=experiment.token_multiple,
        costs=costs(experiment),
        fewest_micro_batches=experiment.train.fewest_micro_batches,
    )


def costs(experiment: Experiment) -> Costs:
    """FLOPs of training on one token, one unit of squared length and one image. The FLOPs of a step are linear in each."""
    flops, model, policy = family_of(experiment.model).step_flops, experiment.model, experiment.train.freeze_policy
    nothing = StepWork(num_tokens=0, sum_squared_lengths=0, num_images=0)
    token, square, image = (
        round(flops(model, policy, replace(nothing, **{part: 1}))) for part in ("num_tokens", "sum_squared_lengths", "num_images")
    )
    return Costs(token=token, square=square, image=image)


def as_indexed(experiment: Experiment, indexes: Sequence[Source]) -> Experiment:
    """The experiment, with the chat template and caption prompt of its indexed sources where it sets none, so that a resume or evaluation
    notices if the data has been indexed differently since."""
    data = experiment.data
    templates = {index.chat_template for index in indexes} - {None}
    prompts = {index.caption_prompt for index in indexes if index.kind == "pairs"} - {None}
    return replace(
        experiment,
        data=replace(
            data,
            chat_template=templates.pop() if data.chat_template is None and len(templates) == 1 else data.chat_template,
            caption_prompt=prompts.pop() if data.caption_prompt is None and len(prompts) == 1 else data.caption_prompt,
        ),
    )


def _check_rendering(data: DataConfig, indexes: Sequence[Source]) -> None:
    """Raise ValueError if a source was not indexed with the chat template or caption prompt that the experiment requires."""
    for index in indexes:
        if index.kind == "pairs" and data.caption_prompt not in (None, index.caption_prompt):
            raise ValueError(
                f"source {index.location} was indexed with the caption prompt {index.caption_prompt!r}, but data.caption_prompt is "
                f"{data.caption_prompt!r}: run `megatron-mm prepare index {data.path} --caption-prompt {data.caption_prompt!r}`, "
                "or use --data.caption-prompt None"
            )
    if data.chat_template is None:
        return
    chat_template(data.chat_template)
    for index in indexes:
        if index.chat_template not in (None, data.chat_template):
            raise ValueError(
                f"source {index.location} was indexed with the chat template {index.chat_template}, but data.chat_template is "
                f"{data.chat_template}: run `megatron-mm prepare index {data.path} --chat-template {data.chat_template}`, "
                "or use --data.chat-template None"
            )


class TrainingData:
    """An endless iterator of this process's batches, with a cursor to resume from. Images are augmented only in the training split."""

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        tokenizer: Tokenizer,
        *,
        split: str = TRAINING,
        plan: Plan | None = None,
        cursor: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            plan: plan of the split, if it has already been made.
            cursor: cursor of an earlier iterator; None begins with the first sample.
        """
        plan = plan or make_plan(experiment, split=split, check=False)  # `start` has checked it
        data = experiment.data if split == TRAINING else replace(experiment.data, jpeg_quality=None)
        spread = experiment.parallel.spread_encoder
        self._loader = Loader(
            plan,
            tokenizer=tokenizer,
            data=data,
            view=RankView(
                data_rank=topology.data_rank,
                data_size=topology.data_size,
                tensor_rank=topology.tensor_rank,
                tensor_size=topology.tensor_size,
                needs_text=topology.is_first_stage or topology.is_last_stage,
                needs_pixels=topology.is_first_stage or spread,
                encoder_rank=topology.pipeline_rank if spread else 0,
                encoder_size=topology.pipeline_size if spread else 1,
            ),
            start=PlanState.from_dict(cursor) if cursor is not None else plan.initial_state(),
            device=topology.device,
            sharing=text_group(topology, timeout=timedelta(minutes=experiment.parallel.collective_timeout_minutes)),
        )

    def __next__(self) -> StepBatch:
        return next(self._loader)

    @property
    def cursor(self) -> dict[str, Any]:
        """Position in the plan after the last batch, as JSON values."""
        return self._loader.state.to_dict()

    def close(self) -> None:
        """Stop the loader's threads."""
        self._loader.close()


def held_out_batches(experiment: Experiment, topology: Topology, tokenizer: Tokenizer) -> TrainingData:
    """Batches of the held-out split, from the first one on: of those sources of the mixture that it has."""
    return TrainingData(with_held_out_sources(experiment), topology, tokenizer, split=HELD_OUT)
