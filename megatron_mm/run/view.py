"""`prepare view`: an HTML page with the first batches of a run, from the same plan and loader as in training."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.sources.index import MAPPED, open_index
from megatron_mm.data.sources.stores import check_local
from megatron_mm.evaluation.heldout import SPLIT as HELD_OUT
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform.files import write_whole
from megatron_mm.reporting.sequence_page import PageNotes, sequence_page
from megatron_mm.run.data import TRAINING, TrainingData, image_input, open_tokenizer

logger = logging.getLogger(__name__)

_ALONE = Topology(
    device=torch.device("cpu"),
    rank=0,
    world_size=1,
    tensor_rank=0,
    tensor_size=1,
    pipeline_rank=0,
    pipeline_size=1,
    virtual_size=1,
    data_rank=0,
    data_size=1,
)


def write_view(experiment: Experiment, out: Path, *, recipe: str, split: str, micro_batches: int) -> int:
    """Write a page with the first micro-batches of a split. Returns the number of tokens on it.

    Raises ValueError if the data set or its index is missing, or a sample cannot be read.

    Args:
        experiment: how documents are packed and images cut; its `data.path` is shown.
        recipe: name of the recipe, for the title.
    """
    tokenizer, decoder = open_tokenizer(experiment), experiment.model.decoder
    if tokenizer.vocab_size > decoder.num_tokens:
        logger.warning(
            "tokenizer %s has %d tokens, but %s has rows for %d, so training on this data needs "
            "--model.decoder.vocab-size %d or more; what is shown does not depend on it",
            *(experiment.data.tokenizer_path, tokenizer.vocab_size, recipe, decoder.num_tokens),
            decoder.rows_for(tokenizer.vocab_size),
        )
    data = TrainingData(experiment, _ALONE, tokenizer, split=split)
    shown: list[PackedBatch] = []
    bad = Counter[str]()
    try:
        while len(shown) < micro_batches:
            step = next(data)
            bad.update(step.bad)
            shown += step.micro_batches[: micro_batches - len(shown)]
    finally:
        data.close()
    notes = PageNotes(
        title=f"{experiment.data.path} as {recipe} sees it ({split})",
        sources=experiment.data.sources,
        image_tokens=image_input(experiment).tokens,
        bad=dict(bad),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, sequence_page(shown, tokenizer, notes))
    return sum(batch.num_tokens for batch in shown)


def check_split(path: Path, split: str) -> None:
    """Raise ValueError if a data set has other splits but not this one."""
    if path.is_dir() and not (path / split).is_dir():
        splits = [name for name in (TRAINING, HELD_OUT) if (path / name).is_dir()]
        if splits:
            raise ValueError(f"--split is {split!r}, but {path} has no folder of that name: choose {' or '.join(splits)}")


def with_sources_of(experiment: Experiment, path: Path, *, split: str) -> Experiment:
    """The experiment on a data set. If the data set lacks a source of the mixture, the mixture becomes all of its sources in equal shares.

    Raises ValueError if the split has no indexed source.
    """
    check_local(path, instead=MAPPED)
    folder = path / split
    present = sorted(p.name for p in folder.iterdir() if (p / "index").is_dir()) if folder.is_dir() else []
    if not present:
        raise ValueError(f"{folder} has no indexed source: run `megatron-mm prepare index {path}` first")
    for name in present:
        open_index(folder / name, check=False)  # its error says what to do if the index has another version
    mixture = experiment.data.mixture
    if not set(mixture) <= set(present):
        mixture = {name: 1 / len(present) for name in present}
    return replace(experiment, data=replace(experiment.data, path=path, mixture=mixture))
