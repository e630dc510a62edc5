"""Our FLOP counts of a step against those that torch counts while it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.small import random_batch, small_experiment
from support.small_infimm import infimm_batch, small_infimm
from support.small_mono import mono_batch, small_mono
from torch.utils.flop_counter import FlopCounterMode

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.registry import family_of
from megatron_mm.flops import StepWork
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.training.build import build_chunks
from megatron_mm.training.freezing import freeze, trainable_patterns

WIDE = {"hidden_size": 256, "ffn_hidden_size": 512, "head_dim": 32}
"""A decoder that dominates the model, as in a real one."""


@pytest.mark.parametrize(
    ("make", "batch_of", "policy"),
    [
        (small_experiment, random_batch, "all"),
        (small_infimm, infimm_batch, "pt"),
        (small_infimm, infimm_batch, "ift"),
        (small_mono, mono_batch, "s1_1"),
        (small_mono, mono_batch, "s1_3"),
        (small_mono, mono_batch, "s2"),
    ],
)
def test_as_many_as_torch_counts(make: Callable[..., Experiment], batch_of: Callable[..., PackedBatch], policy: str) -> None:
    """Within 3%: torch counts causal attention in full and the gated blocks' attention as computed; we count half of the former, and the
    latter for all tokens."""
    experiment = make(policy=policy, decoder=WIDE)
    topology = topologies.initialize(experiment.parallel, seed=1)
    (chunk,) = build_chunks(experiment, topology)
    initialize_weights([chunk], seed=1)
    freeze(chunk, trainable_patterns(experiment))
    batch = batch_of(experiment, topology, number=2)
    assert batch.num_images > 1
    with FlopCounterMode(display=False) as counter:
        chunk(batch).sum().backward()
    topologies.shutdown()
    lengths = batch.cu_seqlens.diff()
    work = StepWork(num_tokens=batch.num_tokens, sum_squared_lengths=int((lengths**2).sum()), num_images=batch.num_images)
    ours = family_of(experiment.model).step_flops(experiment.model, policy, work)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.03)
