"""The encoder's gradient equals that of one process, however the images are distributed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.distributed import run_processes
from support.small import random_batch, small_experiment

from megatron_mm.data.batch import PackedBatch
from megatron_mm.parallel import gradients
from megatron_mm.parallel import topology as topologies
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

Gradients = dict[str, torch.Tensor]
ONE, MANY = 1, 2
"""Numbers of micro-batches (`small.IMAGES_OF_MICRO_BATCHES`) with one image and with several."""
STEPS: list[list[tuple[int, str]]] = [
    [(MANY, "in turn")],
    [(MANY, "all of the last")],
    [(ONE, "all of the first")],
    [(0, "in turn")],
    [(0, "in turn"), (ONE, "all of the last"), (MANY, "in turn")],
]
"""The micro-batches of each step, and the owners of their images."""


def _shared(batch: PackedBatch, sharing: str, *, rank: int, size: int) -> PackedBatch:
    """Return a micro-batch (given with all pixels) as one process of a tensor-parallel group receives it."""
    count = batch.num_images
    owners = {
        "in turn": torch.arange(count) % size,
        "all of the first": torch.zeros(count, dtype=torch.int64),
        "all of the last": torch.full((count,), size - 1),
    }[sharing]
    assert batch.pixels is not None
    return replace(batch, image_owners=owners, pixels=batch.pixels[owners == rank])


def _encoder_gradients(tensor: int, sequence: bool, bucket: int) -> list[Gradients]:
    """Return the gradients after each step's backward pass, by name; the weights are not updated."""
    gradients._BUCKET_ELEMENTS = bucket
    experiment = small_experiment(parallel={"tensor": tensor, "sequence": sequence})
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    alone = replace(topology, tensor_rank=0, tensor_size=1)
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    found = []
    for micro_batches in STEPS:
        whole = [(random_batch(experiment, alone, number=number), sharing) for number, sharing in micro_batches]
        batches = [_shared(batch, sharing, rank=topology.tensor_rank, size=tensor) for batch, sharing in whole]
        model[0].zero_grad_buffer()
        step._pass(batches, forward_only=False)
        encoder = {name: weight for name, weight in model[0].module.named_parameters() if name.startswith(("vision.", "connector."))}
        assert all(weight.encodes_shares for weight in encoder.values())
        found.append({name: weight.main_grad.clone() for name, weight in encoder.items()})
    topologies.shutdown()
    return found


@pytest.fixture(scope="module")
def expected() -> list[Gradients]:
    (found,) = run_processes(_encoder_gradients, 1, 1, False, 1 << 25)
    return found


@pytest.mark.parametrize(("sequence", "bucket"), [(True, 1 << 25), (False, 1000)], ids=["sequence parallel, one bucket", "many buckets"])
def test_the_encoders_gradient_is_that_of_one_process(expected: list[Gradients], sequence: bool, bucket: int) -> None:
    first, second = run_processes(_encoder_gradients, 2, 2, sequence, bucket)
    for step, ours, others, theirs in zip(STEPS, first, second, expected, strict=True):
        assert len(ours) > 20 and set(ours) == set(theirs)
        has_images = any(number for number, _ in step)
        for name in theirs:
            assert torch.equal(ours[name], others[name]), f"{step} {name}: processes disagree"
            # Sums in another order: float32 rounding, relative to the gradient's largest element.
            scale = float(theirs[name].abs().max())
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5 * scale, msg=lambda t, s=step, n=name: f"{s} {n}: {t}")
        assert has_images == any(bool(gradient.any()) for gradient in ours.values()), step


def test_buckets_keep_the_order_and_end_where_they_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_BUCKET_ELEMENTS", 10)
    sizes = [4, 4, 4, 20, 1]
    assert [[t.numel() for t in bucket] for bucket in gradients._buckets(torch.empty(n) for n in sizes)] == [[4, 4, 4], [20], [1]]
    assert list(gradients._buckets(iter(()))) == []
