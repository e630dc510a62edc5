"""Vocabulary rows that belong to no token change neither losses nor gradients, and are never generated."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.small import random_batch, small_experiment

from megatron_mm.config import DecoderConfig, Experiment, ParallelConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.models.decoder import check_decoder_layout
from megatron_mm.parallel import topology as topologies
from megatron_mm.run import start
from megatron_mm.training.build import build_chunks
from megatron_mm.training.checkpoint.compatible import model_differences

TABLES = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")


def padded(experiment: Experiment, rows: int) -> Experiment:
    """Add rows to the vocabulary that belong to no token."""
    decoder = experiment.model.decoder
    decoder = replace(decoder, vocab_size=decoder.vocab_size + rows, padding_rows=rows)
    return replace(experiment, model=replace(experiment.model, decoder=decoder))


def losses_and_gradients(experiment: Experiment, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the per-token losses of a micro-batch and all gradients, with given weights; rows that these lack are large numbers."""
    topology = topologies.initialize(experiment.parallel, seed=1)
    try:
        (chunk,) = build_chunks(experiment, topology)
        generator = torch.Generator().manual_seed(7)
        for name, parameter in chunk.named_parameters():
            found = weights.setdefault(name, torch.randn(parameter.shape, generator=generator) * 0.05)
            parameter.data.fill_(50).narrow(0, 0, len(found)).copy_(found)
        batch = random_batch(experiment, topology, number=2)
        losses = chunk(batch, pipeline_rows=batch.num_tokens)
        losses.sum().backward()
        gradients = {name: parameter.grad for name, parameter in chunk.named_parameters() if parameter.grad is not None}
        with torch.no_grad():
            logits = chunk(batch, with_loss=False)
        assert int(logits.argmax(-1).max()) < experiment.model.decoder.num_tokens
        return losses.detach(), gradients
    finally:
        topologies.shutdown()


@pytest.mark.parametrize("tied", [True, False])
def test_losses_and_gradients_are_those_without_the_rows(tied: bool) -> None:
    plain = small_experiment(precision="fp32", decoder={"tied_embeddings": tied, "vocab_size": 126})
    weights: dict[str, torch.Tensor] = {}
    expected, their_gradients = losses_and_gradients(plain, weights)
    losses, gradients = losses_and_gradients(padded(plain, 2), weights)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(gradients[name][: len(gradient)], gradient, rtol=1e-5, atol=1e-6)
        assert not gradients[name][len(gradient) :].any()
    assert any(len(gradients[name]) == 128 for name in TABLES if name in gradients)


@pytest.mark.parametrize(
    ("rows", "problem"), [(-1, "padding_rows is -1"), (128, "padding_rows is 128, but must be 0 or more and less than")]
)
def test_wrong_numbers_are_refused(rows: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        small_experiment(decoder={"padding_rows": rows})


def decoder_of(name: str, **changes: Any) -> DecoderConfig:
    return replace(get_recipe(name).model.decoder, **changes)


def test_the_error_about_rows_that_cannot_be_split_says_how_many_to_add() -> None:
    """And these options fit."""
    layout = ParallelConfig(tensor=8)
    with pytest.raises(ValueError, match="does not divide the decoder's 32002 vocabulary rows") as error:
        check_decoder_layout(decoder_of("infimm_zephyr_7b_pt"), layout, 8)
    found = re.search(r"--model.decoder.vocab-size (\d+) --model.decoder.padding-rows (\d+)", str(error.value))
    assert found is not None
    rows, padding = map(int, found.groups())
    fitting = decoder_of("infimm_zephyr_7b_pt", vocab_size=rows, padding_rows=padding)
    check_decoder_layout(fitting, layout, 8)
    assert fitting.num_tokens == 32002


def test_an_error_about_a_larger_tokenizer_counts_the_padding_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rows that it names, the tokenizer fits."""
    monkeypatch.setattr(start, "open_tokenizer", lambda experiment: SimpleNamespace(vocab_size=130))
    small = small_experiment(decoder={"padding_rows": 8})
    with pytest.raises(ValueError, match=r"vocab_size is 128 with 8 padding rows: raise it \(--model.decoder.vocab-size 138\)"):
        start.fitting_tokenizer(small)
    start.fitting_tokenizer(small_experiment(decoder={"vocab_size": 138, "padding_rows": 8}))


def test_mono_internvl_has_the_tokens_of_the_released_model() -> None:
    assert decoder_of("mono_internvl_2b_s2").num_tokens == 92553


def test_a_checkpoint_of_before_the_option_holds_the_same_model() -> None:
    model = get_recipe("mono_internvl_2b_s2").model
    before = replace(model, decoder=replace(model.decoder, padding_rows=0))  # type: ignore[type-var]
    assert model_differences(model, before) == []
