"""Our InfiMM against the plain reference: the same logits and the same training, document by document and packed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support.infimm_reference import InfiMMReference
from support.references import infimm_reference
from support.same_training import LOSS_TOLERANCE, assert_same_weights, reference_adam, reference_update, with_smooth_adam
from support.small import packed_batch
from support.small_infimm import END_OF_CHUNK_ID, IMAGE_ID, small_infimm

from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.infimm.names import infimm_table
from megatron_mm.hf.mapping import from_hf, to_hf
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.build import build_chunks, build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep


@pytest.fixture
def topology() -> Iterator[Topology]:
    experiment = small_infimm()
    yield topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    topologies.shutdown()


def copy_weights(reference: InfiMMReference, chunk: torch.nn.Module, config: InfiMMConfig) -> None:
    chunk.load_state_dict(from_hf(infimm_table(config), dict(reference.named_parameters())), strict=True)


def documents() -> list[tuple[list[int], torch.Tensor]]:
    """Return token ids and pixels of documents: several images after words, one at the beginning, none, two adjacent ones."""
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> list[int]:
        return torch.randint(5, 128, (count,), generator=generator).tolist()

    image = [END_OF_CHUNK_ID, IMAGE_ID]
    found = [
        words(3) + image + words(5) + image + words(4) + image + words(2),
        image + words(9),
        words(11),
        words(2) + image + image + words(6),
    ]
    return [(ids, torch.randint(0, 256, (ids.count(IMAGE_ID), 3, 16, 16), generator=generator, dtype=torch.uint8)) for ids in found]


def packed(chosen: list[tuple[list[int], torch.Tensor]], *, total: int = 0) -> PackedBatch:
    """Pack documents into one row, padded to `total` tokens with a document of padding."""
    length = sum(len(ids) for ids, _ in chosen)
    padding = max(0, total - length)
    rows = [ids for ids, _ in chosen] + [[0] * padding] * bool(padding)
    ids = torch.tensor([token for row in rows for token in row])
    bounds = list(itertools.accumulate((len(row) for row in rows), initial=0))
    starts = (ids == IMAGE_ID).nonzero().squeeze(1)
    pixels = torch.cat([pixels for _, pixels in chosen])
    return packed_batch(ids, bounds=bounds, starts=starts.tolist(), masked_id=-1, pixels=pixels, num_real=length)


def reference_logits(reference: InfiMMReference, config: InfiMMConfig, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.vision.mean, config.vision.std))
    return reference(torch.tensor(ids), (pixels / 255 - mean) / std)


def test_the_same_logits(topology: Topology) -> None:
    """In fp32, on logits of about unit scale."""
    experiment = small_infimm()
    assert isinstance(experiment.model, InfiMMConfig)
    reference = infimm_reference(experiment.model)
    (chunk,) = build_chunks(experiment, topology)
    copy_weights(reference, chunk, experiment.model)
    chosen = documents()
    with torch.no_grad():
        expected = [reference_logits(reference, experiment.model, ids, pixels) for ids, pixels in chosen]
        together = chunk.eval()(packed(chosen), with_loss=False)[0].split([len(ids) for ids, _ in chosen])
    assert 0.3 < torch.cat(expected).std() < 10
    for found, wanted in zip(together, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["pt", "ift"])
def test_the_same_training(topology: Topology, policy: str) -> None:
    """After five steps of AdamW (the reference with torch's own optimizer), losses and weights are the same."""
    experiment = with_smooth_adam(small_infimm(policy=policy, global_batch_size=4))
    assert isinstance(experiment.model, InfiMMConfig)
    reference, optimizer = infimm_reference(experiment.model), experiment.optimizer
    model = build_model(experiment, topology)
    copy_weights(reference, model[0].module, experiment.model)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=1)
    chosen = documents()
    micro_batches = [
        packed(chosen[:2], total=96),
        packed(chosen[2:3], total=96),
        packed(chosen[3:], total=96),
        packed(chosen[1:3], total=96),
    ]
    trainable = [
        parameter
        for name, parameter in reference.named_parameters()
        if not name.startswith("model.vision_encoder.") and (policy == "ift" or "perceiver" in name or "gated_cross_attn_layer" in name)
    ]
    adam, learning_rates = reference_adam(trainable, optimizer), []
    for number in range(1, 6):
        result = step.run(micro_batches, step=number)
        adam.zero_grad()
        total, count = torch.zeros(()), 0
        for batch in micro_batches:
            for begin, end in batch.cu_seqlens.unfold(0, 2, 1).tolist():
                if not batch.is_token[begin]:
                    continue
                ids = batch.token_ids[begin:end]
                inside = (batch.image_starts >= begin) & (batch.image_starts < end)
                logits = reference_logits(reference, experiment.model, ids.tolist(), batch.pixels[inside])
                total = total + F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
                count += len(ids) - 1
        loss = total / count
        loss.backward()
        reference_update(adam, optimizer, lr=result.lr)
        learning_rates.append(result.lr)
        assert result.losses.mean == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    ours = {name: p.detach() for name, p in model[0].module.named_parameters()}
    assert_same_weights(to_hf(infimm_table(experiment.model), ours), reference, learning_rates=learning_rates)
