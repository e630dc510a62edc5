"""`megatron-mm eval`: held-out losses of a checkpoint, and how much they depend on the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.data.sources.index import check_folder
from megatron_mm.evaluation.captions import CaptionSample
from megatron_mm.evaluation.heldout import SPLIT, HeldOut, tell_missing_sources, with_held_out_sources
from megatron_mm.families.registry import family_of
from megatron_mm.families.serialize import load_experiment
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import held_out_batches, image_input, local_data, open_tokenizer
from megatron_mm.training.build import build_model, report_layers
from megatron_mm.training.checkpoint import check_same_tokenizer, load_weights
from megatron_mm.training.step import TrainingStep

_HOW_TO_HOLD_OUT = (
    f"put shards that training does not use into DATA/{SPLIT}/NAME, with the NAMEs of data.mixture, and run `megatron-mm prepare index "
    "DATA`; or give --data.path DATA of a data set that has it"
)
Images = Literal["true", "shuffled", "blank"]
IMAGES: tuple[Images, ...] = ("true", "shuffled", "blank")
"""Images that the model sees: each sample's own, those of other samples, or the mean colour everywhere."""


def agreed(checkpoint: Path) -> Path:
    """Return the checkpoint that the first process found. Others may find a newer one, if the run is still training."""
    found = [str(checkpoint)]
    dist.broadcast_object_list(found, src=0)
    return Path(found[0])


@dataclass(frozen=True)
class Evaluated:
    """Results of `evaluate`; the same on every process."""

    losses: dict[Images, dict[str, float]]
    """Losses by the images that the model saw: `heldout/loss` and `heldout/loss/SOURCE`, nats per token."""
    captions: list[CaptionSample]
    """Captions of the first `eval.samples` held-out pairs."""
    no_captions: str = ""
    """Why there are no captions; empty if there are."""

    def report(self) -> Iterator[str]:
        """Lines for the terminal."""
        names = list(self.losses["true"])
        yield f"{'held-out loss with':28}" + "".join(f"{name.removeprefix(SPLIT + '/loss').lstrip('/') or 'all':>14}" for name in names)
        for images, losses in self.losses.items():
            yield f"{_TITLES[images]:28}" + "".join(f"{losses[name]:14.4f}" for name in names)
        worth = 100 * self.worth_of_images()
        if worth >= 0.5:
            yield f"with the true images the loss is {worth:.0f}% lower than with shuffled ones"
        elif worth > 0:
            yield "with the true images the loss is lower than with shuffled ones by less than 0.5%: the model hardly uses them"
        else:
            yield "the true images do not lower the loss: the model does not use them"
        if not self.captions:
            yield f"no captions: {self.no_captions}"
        for sample in self.captions:
            yield f"true: {sample.true:44} generated: {sample.generated}"

    def worth_of_images(self) -> float:
        """Fraction by which the loss falls when shuffled images are replaced with the true ones."""
        name = f"{SPLIT}/loss"
        return 1.0 - self.losses["true"][name] / self.losses["shuffled"][name]


_TITLES: dict[Images, str] = {"true": "the true images", "shuffled": "images of other samples", "blank": "blank images"}


def experiment_of(checkpoint: Path) -> Experiment:
    """The experiment that a checkpoint comes from, in the layout of a single process."""
    experiment = load_experiment(checkpoint / "experiment.json")
    return replace(experiment, parallel=ParallelConfig(distributed_optimizer=experiment.parallel.distributed_optimizer))


def evaluate(experiment: Experiment, checkpoint: Path) -> Evaluated:
    """Compute held-out losses and captions of a checkpoint, in the layout of the experiment.

    Raises ValueError if there is no held-out split, or if the checkpoint, layout or data does not fit.
    """
    folder = local_data(experiment.data)
    check_folder(folder)
    if not (folder / SPLIT).is_dir():
        raise ValueError(f"data path {experiment.data.path} has no folder {SPLIT}: {_HOW_TO_HOLD_OUT}")
    family_of(experiment.model).check_layout(experiment.model, experiment.parallel, topologies.world_size())
    check_same_tokenizer(experiment, checkpoint)
    tokenizer = open_tokenizer(experiment)
    with_held_out_sources(experiment)  # its error comes before the model is built
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    if topology.is_main:
        tell_missing_sources(experiment.data)
    try:
        checkpoint = agreed(checkpoint)
        report_layers(experiment, topology)
        model = build_model(experiment, topology)
        load_weights(experiment, topology, model, checkpoint)
        step = TrainingStep(experiment, topology, model, optimizer=None, num_sources=len(experiment.data.sources))
        heldout = HeldOut(experiment, topology, tokenizer, image=image_input(experiment), batches=held_out_batches)
        losses = {images: heldout.losses(step, images=images) for images in IMAGES}
        why = heldout.why_no_captions()
        return Evaluated(losses=losses, captions=[] if why else heldout.captions(model), no_captions=why)
    finally:
        topologies.shutdown()
