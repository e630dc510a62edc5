"""Distributed images: features are gathered in order for any owners, and every process gets the gradient of its own images."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from support.distributed import run_processes

from megatron_mm.config import ParallelConfig
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.images import TensorParallelImages

OWNERS = {
    "in turn": [0, 1, 0],
    "last first": [1, 1, 0, 1],
    "all of one": [1, 1],
    "one image": [0],
    "none": [],
}
TOKENS, WIDTH = 2, 3


def _gather() -> dict[str, int]:
    """Check features and gradients of every case on this process; return its number of images in each case."""
    topology = topologies.initialize(ParallelConfig(tensor=2), seed=1)
    group, generator = parallel_state.get_tensor_model_parallel_group(), torch.Generator().manual_seed(0)
    had = {}
    for name, listed in OWNERS.items():
        owners = torch.tensor(listed, dtype=torch.int64)
        mine = owners == topology.tensor_rank
        features = torch.randn(len(listed), TOKENS, WIDTH, generator=generator)
        weights = torch.randn(2, len(listed), TOKENS, WIDTH, generator=generator)  # weights of the features in each process's loss
        for sequence_parallel in (False, True):
            case = f"{name}, sequence parallel {sequence_parallel}"
            # A process without an image encodes a blank one, as the models do.
            owned = (features[mine] if mine.any() else torch.full((1, TOKENS, WIDTH), 7.0)).requires_grad_()
            gathered = TensorParallelImages(group, sequence_parallel=sequence_parallel).gather(owned, owners=owners)
            assert torch.equal(gathered, features), case
            # Without sequence parallelism both compute the same; with it each has its own tokens, and their gradients are summed.
            (gathered * (weights[topology.tensor_rank] if sequence_parallel else weights[0])).sum().backward()
            assert owned.grad is not None, case
            expected = (weights.sum(0) if sequence_parallel else weights[0])[mine] if mine.any() else torch.zeros_like(owned)
            torch.testing.assert_close(owned.grad, expected, msg=lambda text, case=case: f"{case}: {text}")
        had[name] = int(mine.sum())
    topologies.shutdown()
    return had


def test_features_and_gradients_find_their_owners() -> None:
    first, second = run_processes(_gather, 2)
    assert first == {"in turn": 2, "last first": 1, "all of one": 0, "one image": 1, "none": 0}
    assert second == {"in turn": 1, "last first": 3, "all of one": 2, "one image": 0, "none": 0}


class _Group:
    """Process 2 of 4."""

    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 2


def test_a_process_holds_its_part_of_the_tokens_under_sequence_parallelism_alone() -> None:
    assert TensorParallelImages(_Group(), sequence_parallel=True).local_tokens(96) == range(48, 72)  # type: ignore[arg-type]
    assert TensorParallelImages(_Group(), sequence_parallel=False).local_tokens(96) == range(96)  # type: ignore[arg-type]
