"""InfiMM's model: which tokens images affect, and which they do not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from support.small import packed_batch
from support.small_infimm import END_OF_CHUNK_ID, IMAGE_ID, infimm_batch, small_infimm

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.infimm.gated_cross_attention import media_layout
from megatron_mm.families.registry import pipeline_rows
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.parallel.stages import attach, detach_states, rows_for
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.build import build_chunks


@pytest.fixture
def topology() -> Topology:
    experiment = small_infimm()
    yield topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    topologies.shutdown()


def build(experiment: Experiment, topology: Topology, *, gate: float) -> torch.nn.Module:
    (chunk,) = build_chunks(experiment, topology)
    initialize_weights([chunk], seed=experiment.train.seed)
    for name, parameter in chunk.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(gate)
    return chunk.eval()


@torch.no_grad()
def logits(chunk: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Return the logits [t, vocabulary]."""
    return chunk(batch, with_loss=False)[0]


def test_closed_gates_are_the_bare_language_model(topology: Topology) -> None:
    experiment = small_infimm()
    chunk = build(experiment, topology, gate=0.0)
    batch = infimm_batch(experiment, topology, number=5)
    assert batch.num_images == 6
    with torch.no_grad():
        layers = [layer for layer in chunk.language.decoder.layers]
        gated = logits(chunk, batch)
        for layer in layers:
            if hasattr(layer, "gated"):
                layer.gated.forward = lambda hidden, latents, media: hidden
        bare = logits(chunk, batch)
    torch.testing.assert_close(gated, bare, rtol=0, atol=1e-6)


def document(*, before: int, after: list[int], generator: torch.Generator) -> list[int]:
    """Return token ids: words, then an image and `after[k]` words for each k."""

    def words(count: int) -> list[int]:
        return torch.randint(5, 128, (count,), generator=generator).tolist()

    return words(before) + [token for count in after for token in (END_OF_CHUNK_ID, IMAGE_ID, *words(count))]


def packed(documents: list[list[int]], pixels: torch.Tensor) -> PackedBatch:
    ids = torch.tensor([token for tokens in documents for token in tokens])
    bounds = list(itertools.accumulate((len(tokens) for tokens in documents), initial=0))
    starts = (ids == IMAGE_ID).nonzero().squeeze(1).tolist()
    return packed_batch(ids, bounds=bounds, starts=starts, masked_id=-1, pixels=pixels)


def pictures(count: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_packed_documents_never_see_each_others_images(topology: Topology) -> None:
    """Three packed documents, with two images, none and one, give the same logits as each alone."""
    experiment, generator = small_infimm(), torch.Generator().manual_seed(1)
    chunk = build(experiment, topology, gate=0.7)
    documents = [
        document(before=3, after=[4, 5], generator=generator),
        document(before=6, after=[], generator=generator),
        document(before=0, after=[7], generator=generator),
    ]
    pixels = pictures(3)
    together = logits(chunk, packed(documents, pixels)).split([len(tokens) for tokens in documents])
    for tokens, images, found in zip(documents, pixels.split([2, 0, 1]), together, strict=True):
        torch.testing.assert_close(found, logits(chunk, packed([tokens], images)), rtol=1e-5, atol=1e-5)


def test_a_token_looks_at_the_last_image_before_it_and_at_no_other(topology: Topology) -> None:
    """With one layer, one gated block and self-attention that adds nothing, a token's logits depend only on its own image."""
    experiment = small_infimm(decoder={"num_layers": 1}, model={"gated": replace(small_infimm().model.gated, every_n_layers=1)})
    chunk = build(experiment, topology, gate=0.7)
    for name, parameter in chunk.named_parameters():
        if name.endswith("self_attention.linear_proj.weight"):
            parameter.data.zero_()
    tokens = document(before=2, after=[3, 4], generator=torch.Generator().manual_seed(2))
    pixels, others = pictures(2), pictures(2, seed=9)
    base = logits(chunk, packed([tokens], pixels))
    seen_by = torch.tensor([-1] * 3 + [0] * 5 + [1] * 5)  # the end-of-chunk token still attends to the previous image
    for image in (0, 1):
        changed = pixels.clone()
        changed[image] = others[image]
        differs = (logits(chunk, packed([tokens], changed)) - base).abs().amax(dim=1) > 1e-6
        assert torch.equal(differs, seen_by == image)


def test_before_the_first_image_attention_adds_nothing_and_the_feed_forward_applies(topology: Topology) -> None:
    experiment = small_infimm()
    chunk = build(experiment, topology, gate=0.7)
    tokens = document(before=5, after=[4], generator=torch.Generator().manual_seed(3))
    batch = packed([tokens, document(before=4, after=[], generator=torch.Generator().manual_seed(4))], pictures(1))
    media = media_layout(batch, num_latents=8, local=range(batch.num_tokens), dtype=torch.float32)
    block = next(layer.gated for layer in chunk.language.decoder.layers if hasattr(layer, "gated"))
    hidden = torch.randn(batch.num_tokens, 1, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        attended = block._attend(block.attention_norm(hidden), torch.randn(8, 1, 32), media)
        out = block(hidden, torch.randn(8, 1, 32), media)
        ffn = 0.7 * torch.ones(())
        expected = hidden + ffn.tanh() * block.ffn(block.ffn_norm(hidden))[0]
    assert torch.equal(attended[:6], torch.zeros_like(attended[:6])) and torch.equal(attended[11:], torch.zeros_like(attended[11:]))
    assert (attended[6:11].abs().amax(dim=(1, 2)) > 0).all()
    torch.testing.assert_close(out[:6], expected[:6])
    assert torch.equal(out[11:], hidden[11:]), "a document without any image goes by the whole block"


def test_a_micro_batch_without_images_gives_every_learning_weight_a_gradient(topology: Topology) -> None:
    experiment = small_infimm()
    chunk = build(experiment, topology, gate=0.7).train()
    batch = infimm_batch(experiment, topology, number=0)
    assert batch.num_images == 0
    chunk(batch).sum().backward()
    without = [name for name, p in chunk.named_parameters() if p.grad is None and not name.startswith("vision.")]
    assert not without
    bridge = {name: float(p.grad.abs().max()) for name, p in chunk.named_parameters() if name.startswith("resampler.") or ".gated." in name}
    assert set(bridge.values()) == {0.0}, "nobody saw an image"
    assert all(p.grad is None for name, p in chunk.named_parameters() if name.startswith("vision."))


def test_states_come_back_from_the_rows_behind_the_hidden_states() -> None:
    hidden, latents = torch.randn(10, 1, 16), torch.randn(6, 1, 12, requires_grad=True)
    assert rows_for(6, width=12, hidden_size=16) == 5
    sent = attach(hidden, latents, rows=17)
    assert sent.shape == (17, 1, 16)
    back, states = detach_states(sent, num_hidden=10, num_states=6, width=12)
    assert torch.equal(back, hidden) and torch.equal(states, latents)
    states.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))


def test_rows_between_stages_hold_the_tokens_and_images_of_a_micro_batch(topology: Topology) -> None:
    experiment = small_infimm(parallel={"pipeline": 2})
    batches = [infimm_batch(experiment, topology, number=number) for number in (0, 1, 2)]
    assert [batch.num_images for batch in batches] == [0, 1, 6]
    rows = [pipeline_rows(experiment, batch) for batch in batches]
    assert rows == [96 + 8 * 32 // 64, 64 + 8 * 32 // 64, 96 + 6 * 8 * 32 // 64]


def test_layouts_that_cut_a_head_are_refused() -> None:
    from megatron_mm.families.registry import family_of

    experiment = small_infimm(model={"gated": replace(small_infimm().model.gated, num_attention_heads=3)}, parallel={"tensor": 2})
    with pytest.raises(ValueError, match=r"parallel.tensor 2 does not divide the 3 heads of the gated blocks"):
        family_of(experiment.model).check_layout(experiment.model, experiment.parallel, 2)
