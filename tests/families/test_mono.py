"""Our Mono-InternVL against a plain reference that computes both networks for every token; routing of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support.mono_reference import MonoReference
from support.references import mono_reference
from support.same_training import LOSS_TOLERANCE, assert_same_weights, reference_adam, reference_update, with_smooth_adam
from support.small import packed_batch
from support.small_mono import CONTEXT_ID, END_IMG_ID, IMG_ID, TILE_TOKENS, mono_batch, small_mono
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig
from megatron_mm.families.mono_internvl.modality_experts import ModalityExperts, _Scattered, modality_layout
from megatron_mm.families.mono_internvl.names import mono_internvl_table
from megatron_mm.families.mono_internvl.patch_embedding import unshuffle
from megatron_mm.hf.decoders import llama_table
from megatron_mm.hf.mapping import from_hf, to_hf
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.build import build_chunks, build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep


@pytest.fixture
def topology() -> Iterator[Topology]:
    experiment = small_mono()
    yield topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    topologies.shutdown()


def documents() -> list[tuple[list[int], torch.Tensor]]:
    """Return token ids and tiles of documents: an image of two tiles between words, none, one of one tile at the beginning, two images."""
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> list[int]:
        return torch.randint(5, 128, (count,), generator=generator).tolist()

    def image(tiles: int) -> list[int]:
        return [IMG_ID, *[CONTEXT_ID] * (TILE_TOKENS * tiles), END_IMG_ID]

    found = [words(3) + image(2) + words(5), words(11), image(1) + words(6), words(2) + image(1) + words(2) + image(1) + words(3)]
    return [
        (ids, torch.randint(0, 256, (ids.count(CONTEXT_ID) // TILE_TOKENS, 3, 32, 32), generator=generator, dtype=torch.uint8))
        for ids in found
    ]


def packed(chosen: list[tuple[list[int], torch.Tensor]]) -> PackedBatch:
    ids = torch.tensor([token for row, _ in chosen for token in row])
    bounds = list(itertools.accumulate((len(row) for row, _ in chosen), initial=0))
    starts = (ids == CONTEXT_ID).nonzero().squeeze(1)[::TILE_TOKENS].tolist()
    return packed_batch(ids, bounds=bounds, starts=starts, masked_id=CONTEXT_ID, pixels=torch.cat([pixels for _, pixels in chosen]))


def reference_logits(reference: MonoReference, config: MonoInternVLConfig, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.patches.mean, config.patches.std))
    return reference(torch.tensor(ids), (pixels / 255 - mean) / std)


def test_the_same_logits_as_computing_both_networks_and_masking(topology: Topology) -> None:
    """In fp32, on logits of about unit scale."""
    experiment = small_mono()
    assert isinstance(experiment.model, MonoInternVLConfig)
    reference = mono_reference(experiment.model)
    (chunk,) = build_chunks(experiment, topology)
    chunk.load_state_dict(from_hf(mono_internvl_table(experiment.model), dict(reference.named_parameters())), strict=True)
    chosen = documents()
    with torch.no_grad():
        expected = [reference_logits(reference, experiment.model, ids, pixels) for ids, pixels in chosen]
        together = chunk.eval()(packed(chosen), with_loss=False)[0].split([len(ids) for ids, _ in chosen])
    assert 0.3 < torch.cat(expected).std() < 10
    for found, wanted in zip(together, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["s1_1", "s1_3", "s2"])
def test_the_same_training(topology: Topology, policy: str) -> None:
    """After five steps of AdamW (the reference with torch's own optimizer), losses and weights are the same."""
    experiment = with_smooth_adam(small_mono(policy=policy, global_batch_size=2))
    assert isinstance(experiment.model, MonoInternVLConfig)
    reference, optimizer = mono_reference(experiment.model), experiment.optimizer
    model = build_model(experiment, topology)
    table = mono_internvl_table(experiment.model)
    model[0].module.load_state_dict(from_hf(table, dict(reference.named_parameters())), strict=True)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=1)
    chosen = documents()
    micro_batches = [packed(chosen[:2] + chosen[:1]), packed(chosen[1:4])]
    patterns = {
        "s1_1": ("vision_model.", "mlp1.", "feed_forward_ve."),
        "s1_3": ("vision_model.", "mlp1.", "feed_forward_ve.", "attention."),
        "s2": ("",),
    }[policy]
    trainable = [
        p for name, p in reference.named_parameters() if any(part in name for part in patterns) and not name.endswith("class_embedding")
    ]
    adam, learning_rates = reference_adam(trainable, optimizer), []
    for number in range(1, 6):
        result = step.run(micro_batches, step=number)
        adam.zero_grad()
        total, count = torch.zeros(()), 0
        for ids, pixels in chosen[:2] + chosen[:1] + chosen[1:4]:
            logits, labels = reference_logits(reference, experiment.model, ids, pixels)[:-1], torch.tensor(ids[1:])
            counted = labels != CONTEXT_ID
            total = total + F.cross_entropy(logits[counted], labels[counted], reduction="sum")
            count += int(counted.sum())
        loss = total / count
        loss.backward()
        reference_update(adam, optimizer, lr=result.lr)
        learning_rates.append(result.lr)
        assert result.losses.mean == pytest.approx(loss.item(), rel=LOSS_TOLERANCE)
    ours = {name: p.detach() for name, p in model[0].module.named_parameters()}
    assert_same_weights(to_hf(table, ours), reference, learning_rates=learning_rates)


def test_equal_experts_are_a_plain_decoder(topology: Topology) -> None:
    """Initial visual experts are copies of the text experts, so the model is InternLM2, which is Llama with other names."""
    experiment = small_mono()
    assert isinstance(experiment.model, MonoInternVLConfig)
    (chunk,) = build_chunks(experiment, topology)
    initialize_weights([chunk], seed=7)
    state = dict(chunk.named_parameters())
    visual = {name for name in state if ".mlp.visual." in name}
    assert visual and all(torch.equal(state[name], state[name.replace(".visual.", ".text.")]) for name in visual)
    decoder = experiment.model.decoder
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.ffn_hidden_size,
            num_hidden_layers=decoder.num_layers,
            num_attention_heads=decoder.num_attention_heads,
            num_key_value_heads=decoder.num_query_groups,
            rms_norm_eps=decoder.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rotary_base},
            tie_word_embeddings=False,
        )
    ).eval()
    plain = {name.replace(".mlp.text.", ".mlp."): tensor for name, tensor in state.items() if name not in visual}
    language = {name: tensor for name, tensor in plain.items() if name.startswith("language.")}
    llama.load_state_dict(to_hf(llama_table(decoder), language))
    batch = packed(documents()[:1])
    with torch.no_grad():
        tokens = chunk.projector(chunk.patches(batch.pixels)).flatten(0, 1)
        embedded = llama.model.embed_tokens(batch.token_ids)
        embedded[batch.token_ids == CONTEXT_ID] = tokens
        expected = llama(inputs_embeds=embedded[None]).logits[0]
        found = chunk.eval()(batch, with_loss=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_each_token_goes_through_one_network(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = small_mono()
    (chunk,) = build_chunks(experiment, topology)
    initialize_weights([chunk], seed=7)
    seen: dict[str, int] = {"text": 0, "visual": 0}
    layer = next(module for module in chunk.modules() if isinstance(module, ModalityExperts))
    for name in seen:
        getattr(layer, name).register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].shape[0]}))
    batch = packed(documents())
    with torch.no_grad():
        chunk(batch, with_loss=False)
    visual = int((batch.token_ids == CONTEXT_ID).sum())
    assert seen == {"text": batch.num_tokens - visual, "visual": visual}


def test_img_and_its_end_are_text(topology: Topology) -> None:
    batch = packed(documents())
    layout = modality_layout(batch, tokens_per_image=TILE_TOKENS, multiple=1)
    assert torch.equal(layout.visual.tokens, (batch.token_ids == CONTEXT_ID).nonzero().squeeze(1))
    assert torch.equal(layout.text.tokens, (batch.token_ids != CONTEXT_ID).nonzero().squeeze(1))


def test_rows_are_filled_up_for_kernels_that_want_multiples(topology: Topology) -> None:
    text_only = packed(documents()[1:2])
    layout = modality_layout(text_only, tokens_per_image=TILE_TOKENS, multiple=16)
    assert (len(layout.text.gather), layout.text.count) == (16, 11)
    assert (len(layout.visual.gather), layout.visual.count) == (16, 0)


@pytest.mark.parametrize("number", [0, 3], ids=["no tile", "tiles alone"])
def test_a_micro_batch_of_one_modality_gives_every_trainable_weight_a_gradient(topology: Topology, number: int) -> None:
    experiment = small_mono()
    (chunk,) = build_chunks(experiment, topology)
    initialize_weights([chunk], seed=7)
    batch = mono_batch(experiment, topology, number=number)
    chunk(batch).sum().backward()
    without = {name for name, p in chunk.named_parameters() if p.grad is None}
    assert without == {"patches.class_embedding"}
    silent = ".mlp.visual." if number == 0 else ".mlp.text."
    assert all(float(p.grad.abs().max()) == 0 for name, p in chunk.named_parameters() if silent in name)


def test_squares_of_patches_are_joined_row_by_row() -> None:
    patches = torch.arange(16).view(1, 4, 4, 1)
    assert unshuffle(patches, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_results_are_put_in_place_and_not_kept() -> None:
    """The backward pass needs only the rows; `index_copy` would keep the results, one tensor as large as the hidden states per layer."""
    text, visual = torch.randn(2, 1, 3, requires_grad=True), torch.randn(4, 1, 3, requires_grad=True)
    rows, others = torch.tensor([0, 5]), torch.tensor([1, 2, 3, 4])
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = _Scattered.apply(text, rows, visual, others)
    assert torch.equal(out, torch.zeros(6, 1, 3).index_copy(0, rows, text).index_copy(0, others, visual))
    assert [x.dtype for x in kept] == [torch.int64, torch.int64]
    weights = torch.randn(6, 1, 3)
    (out * weights).sum().backward()
    assert torch.equal(text.grad, weights[rows]) and torch.equal(visual.grad, weights[others])  # type: ignore[arg-type]
