"""Initial weights depend only on the seed and the parameter's global name: the pieces of every layout form the same model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from support.distributed import run_processes
from support.small import small_experiment

from megatron_mm.config import MoEConfig
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import STATE_METADATA, initial_value, initialize_weights
from megatron_mm.platform import engine
from megatron_mm.training.build import build_chunks

DECODERS: dict[str, dict[str, Any]] = {
    "dense": {"num_layers": 4},
    "untied": {"num_layers": 4, "tied_embeddings": False},
    "sparse": {"num_layers": 4, "moe": MoEConfig(num_experts=4, every_n_layers=2)},
}
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {"tensor": 4}),
    ("dense", {"tensor": 2, "pipeline": 2}),
    ("dense", {"pipeline": 2, "virtual": 2}),
    ("dense", {"pipeline": 2, "stage_layers": (0, 4)}),
    ("untied", {"tensor": 2, "pipeline": 2}),
    ("sparse", {"tensor": 2, "expert": 2}),
]


@dataclass(frozen=True)
class Piece:
    """A part of a parameter that one process holds."""

    name: str
    global_shape: tuple[int, ...]
    place: tuple[int | slice, ...]
    """Index into the whole parameter; a number for an axis that the piece itself lacks (its expert)."""
    value: torch.Tensor


@dataclass(frozen=True)
class Held:
    """Pieces that one process holds."""

    cut: list[list[Piece]]
    """Pieces in each of `LAYOUTS`."""
    whole: dict[str, list[Piece]]
    """Pieces of each decoder without any parallelism."""


def _pieces(decoder: str, parallel: dict[str, Any], *, seed: int) -> list[Piece]:
    experiment = small_experiment(parallel=parallel, decoder=DECODERS[decoder])
    topology = topologies.initialize(experiment.parallel, seed=seed)
    chunks = build_chunks(experiment, topology)
    initialize_weights(chunks, seed=seed)
    found = []
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata=dict(STATE_METADATA))
        apply_factories(state)
        for entry in nested_values(state):
            if isinstance(entry, ShardedTensor):
                found.append(Piece(entry.key, tuple(entry.global_shape), engine.place_of(entry), entry.data.detach().clone()))
    parallel_state.destroy_model_parallel()
    return found


def _held(seed: int) -> Held:
    cut = [_pieces(decoder, parallel, seed=seed) for decoder, parallel in LAYOUTS]
    return Held(cut=cut, whole={decoder: _pieces(decoder, {}, seed=seed) for decoder in DECODERS})


def _assemble(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    """Return whole parameters by name, with NaN where no piece is."""
    whole: dict[str, torch.Tensor] = {}
    for piece in pieces:
        target = whole.setdefault(piece.name, torch.full(piece.global_shape, float("nan")))
        there = target[piece.place]
        assert there.isnan().all() or torch.equal(there, piece.value), f"copies of {piece.name} differ"
        target[piece.place] = piece.value
    return whole


@pytest.fixture(scope="module")
def by_rank() -> list[Held]:
    return run_processes(_held, 4, 1234)


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[f"{decoder} {parallel}" for decoder, parallel in LAYOUTS])
def test_the_pieces_of_every_layout_make_up_the_same_model(by_rank: list[Held], number: int) -> None:
    whole = _assemble(by_rank[0].whole[LAYOUTS[number][0]])
    cut = _assemble([piece for held in by_rank for piece in held.cut[number]])
    assert set(cut) == set(whole) and len(whole) > 50
    for name, value in whole.items():
        assert torch.equal(cut[name], value), name  # bit-identical; a NaN (missing piece) equals nothing
    most = max(sum(piece.value.numel() for piece in held.cut[number]) for held in by_rank)
    assert most < sum(value.numel() for value in whole.values()), "nothing was cut, so nothing was compared"


def test_names_experts_and_seeds_give_different_weights(by_rank: list[Held]) -> None:
    whole = _assemble(by_rank[0].whole["sparse"])
    (others,) = run_processes(_pieces_of_another_seed, 1)
    other = _assemble(others)
    drawn = {name: value for name, value in whole.items() if value.numel() > 1 and value.std() > 0}
    assert len(drawn) > 20
    assert all(not torch.equal(value, other[name]) for name, value in drawn.items())
    beginnings = [value.flatten()[:4] for value in drawn.values()]
    experts = [expert.flatten()[:4] for name, value in drawn.items() if ".experts." in name for expert in value[1:]]
    assert experts, "no experts, so none were compared"
    numbers = {tuple(beginning.tolist()) for beginning in [*beginnings, *experts]}
    assert len(numbers) == len(beginnings) + len(experts), "two parameters or experts drew the same numbers"


def _pieces_of_another_seed() -> list[Piece]:
    return _pieces("sparse", {}, seed=1235)


@pytest.mark.parametrize(("name", "shape"), [("connector.scale", (4,)), ("language.rms.weight", (4,)), ("connector.weight", (4, 4))])
def test_a_parameter_that_nobody_marked_is_an_error(name: str, shape: tuple[int, ...]) -> None:
    """A norm whose weight started at 0 would silence its layer for the whole run."""
    with pytest.raises(ValueError, match=f"parameter {name} of shape .* has no initial value: give it `init_std`"):
        initial_value(name, torch.nn.Parameter(torch.empty(shape)))


def test_a_bias_begins_at_0() -> None:
    assert initial_value("connector.bias", torch.nn.Parameter(torch.empty(4))).constant == 0.0
    assert initial_value("vision.layers.0.attention.q_bias", torch.nn.Parameter(torch.empty(4))).constant == 0.0
