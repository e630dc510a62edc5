"""The bound on the tokens that the experts of one process receive."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.models.moe import within_load


def test_the_largest_weights_of_a_process_stay() -> None:
    """The worked example of `within_load`."""
    weights = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.6, 0.4, 0.0]])
    kept = within_load(weights, weights > 0, groups=2, most=1)
    assert kept.tolist() == [[True, False, False, False], [False, False, True, False]]


@pytest.mark.parametrize("most", [0, 1, 5, 16, 100])
def test_no_process_gets_more_and_nothing_is_added(most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 8, generator=generator) + torch.tensor([4.0, 4.0] + [0.0] * 6)  # a router that collapses
    chosen = torch.zeros(20, 8, dtype=torch.bool).scatter_(1, logits.topk(2, dim=1).indices, True)
    kept = within_load(logits.softmax(1) * chosen, chosen, groups=4, most=most)
    by_process = kept.view(20, 4, 2).sum(dim=(0, 2))
    asked = chosen.view(20, 4, 2).sum(dim=(0, 2))
    assert not (kept & ~chosen).any() and torch.equal(by_process, asked.clamp(max=most))


@pytest.mark.parametrize("tokens", [1, 7, 19, 20])
def test_a_limit_that_the_host_does_not_read(tokens: int) -> None:
    """With rows of padding and the limit of fewer tokens, the same choices are kept as without these rows."""
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.rand(20, 8, generator=generator)
    chosen = torch.zeros(20, 8, dtype=torch.bool).scatter_(1, weights.topk(2, dim=1).indices, True)
    chosen[tokens:] = False
    expected = within_load(weights[:tokens], chosen[:tokens], groups=4, most=(tokens + 1) // 2)
    found = within_load(weights, chosen, groups=4, most=10, limit=torch.tensor((tokens + 1) // 2))
    assert torch.equal(found[:tokens], expected) and not found[tokens:].any()
    assert expected.sum() < chosen.sum() or tokens == 1
