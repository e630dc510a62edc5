"""What the host does in a step, as the planner counts it, against real models: passes through linear layers, trainable tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.small_infimm import small_infimm
from support.small_mono import mono_batch, small_mono
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm.config import Experiment, ResamplerConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.flops import StepWork
from megatron_mm.models.eva import EvaTower
from megatron_mm.models.resampler import ResamplerLayer
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.planning.decoder_shape import Trained
from megatron_mm.planning.encoder_blocks import resampler_block, tower_blocks
from megatron_mm.planning.hardware import GPUS, OURS, with_host
from megatron_mm.planning.kernels import Attention, Block, Kernel, Product, Stream
from megatron_mm.planning.recipe_job import plan_recipe
from megatron_mm.planning.step import StepModel
from megatron_mm.planning.workload import MicroBatch, Workload
from megatron_mm.training.build import build_chunks
from megatron_mm.training.freezing import freeze, trainable_patterns

aten = torch.ops.aten


class _Counted(TorchDispatchMode):
    """Counts matrix products, without attention, and all operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases) or func._overloadpacket is aten._unsafe_view
        self.products += func._overloadpacket in (aten.mm, aten.addmm)
        self.operations += not is_view
        return func(*args, **(kwargs or {}))


def _blocks(experiment: Experiment) -> list[Block]:
    train = replace(experiment.train, global_batch_size=1, micro_batch_size=1)
    micro = MicroBatch(tokens=96, real_tokens=96, sum_squared_lengths=3000, images=1)
    whole = StepWork(num_tokens=96, sum_squared_lengths=3000, num_images=1)
    planned = plan_recipe(replace(experiment, train=train), GPUS["h200"], 1, work=Workload((micro,), whole, drawn=True))
    return list(planned.job.kinds[0][0])


@pytest.fixture
def chunk_of() -> Iterable[Callable[[Experiment], tuple[Any, Any]]]:
    def build(experiment: Experiment) -> tuple[Any, Any]:
        topology = topologies.initialize(experiment.parallel, seed=1)
        (chunk,) = build_chunks(experiment, topology)
        initialize_weights([chunk], seed=1)
        freeze(chunk, trainable_patterns(experiment))
        return chunk, topology

    yield build
    topologies.shutdown()


@pytest.mark.parametrize("policy", ["s1_1", "s1_3", "s2"])
def test_mono_internvl_has_the_planned_products(policy: str, chunk_of: Callable[..., Any]) -> None:
    """Each is a pass through a module, the largest part of the host's time. Patches are a convolution, not a product."""
    experiment = small_mono(policy=policy)
    chunk, topology = chunk_of(experiment)
    blocks = [block for block in _blocks(experiment) if block.name != "patches"]

    def planned(kernels: Callable[[Block], tuple[Kernel, ...]]) -> int:
        return sum(isinstance(kernel, Product) for block in blocks for kernel in kernels(block))

    with _Counted() as forward:
        loss = chunk(mono_batch(experiment, topology, number=1)).sum()
    with _Counted() as backward:
        loss.backward()
    assert (forward.products, backward.products) == (planned(lambda block: block.forward), planned(lambda block: block.backward))


@pytest.mark.parametrize(
    "experiment", [small_mono(policy="s1_1"), small_mono(), small_infimm(policy="pt")], ids=lambda e: e.train.freeze_policy
)
def test_trainable_tensors_are_those_of_the_model(experiment: Experiment, chunk_of: Callable[..., Any]) -> None:
    """In layers, gated blocks, the resampler and the projector."""
    chunk, _ = chunk_of(experiment)
    names = [name for name, parameter in chunk.named_parameters() if parameter.requires_grad]
    counted = Counter(name.split(".")[0] for name in names if "decoder.layers" in name or name.startswith(("resampler", "projector")))
    planned: Counter[str] = Counter()
    for block in _blocks(experiment):
        planned[block.name if block.name in ("resampler", "projector") else "language"] += block.tensors
    assert +planned == counted


def test_a_layer_of_the_eva_tower_is_so_many_operations() -> None:
    """On a GPU one kernel each rotates queries and keys. The two matrices, SiLU, product and norm are five operations here and there: three
    to fill up the weights, one matrix, and one kernel for the rest."""
    config = replace(get_recipe("infimm_zephyr_7b_pt").model.vision, image_size=28, hidden_size=64, num_attention_heads=4, num_layers=1)
    layer = EvaTower(config, dtype=torch.float32, fused=False).layers[0]
    tokens = torch.randn(1, config.grid_size**2 + 1, 64)
    with torch.no_grad(), _Counted() as counted:
        layer(tokens, torch.nn.Identity())
    frozen = Trained(weights=False, inputs=False)
    planned = tower_blocks(config, images=1, trained=frozen, recompute=frozenset())[-1]
    assert _operations(planned.forward) == counted.operations + 2
    assert planned.backward == ()


def test_a_layer_of_the_resampler_is_so_many_operations() -> None:
    """The planner also counts a copy of the latents, of queries, keys and values."""
    config = ResamplerConfig(num_latents=4, num_layers=1, num_attention_heads=4, head_dim=8)
    layer = ResamplerLayer(config, width=32, dtype=torch.float32)
    latents, features = torch.randn(2, 4, 32), torch.randn(2, 9, 32)
    with _Counted() as counted:
        layer(latents, features)
    planned = resampler_block(config, width=32, num_features=9, images=2, trained=Trained())
    assert _operations(planned.forward) == counted.operations + 5


def test_a_frozen_tower_takes_the_host_as_long_as_was_measured() -> None:
    """EVA02-L on one H200 whose host takes 1.6 times as long (benchmarks/results/h200_20261127/gpu_bench_tower.jsonl): up to 8 images, 14.0
    to 16.3 ms."""
    experiment = get_recipe("infimm_zephyr_7b_pt")
    frozen = Trained(weights=False, inputs=False)
    blocks = tower_blocks(experiment.model.vision, images=4, trained=frozen, recompute=frozenset())
    costs = StepModel(plan_recipe(experiment, GPUS["h200"], 32, software=with_host(OURS, 1.6)).job).costs
    assert 14.0e-3 < sum(costs.block(block, backward=False).launch for block in blocks) < 20e-3


def _operations(kernels: Iterable[Kernel]) -> int:
    assert all(kernel.plain for kernel in kernels if isinstance(kernel, Product | Attention))
    return sum(kernel.kernels if isinstance(kernel, Stream) else 1 for kernel in kernels)
