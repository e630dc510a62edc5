"""Tables of names are exact in both directions, and raise errors for tensors that do not fit."""

from dataclasses import replace

import pytest
import torch

from megatron_mm.config import ConnectorConfig, DecoderConfig
from megatron_mm.config.towers import VIT_TINY
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mm1.names import mm1_table
from megatron_mm.hf.mapping import QKV, Direct, GatedMLP, Positions, StackedQKV, Vocabulary, expand, from_hf, to_hf

MODEL = MM1Config(
    decoder=DecoderConfig(
        num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, head_dim=4, vocab_size=32
    ),
    vision=VIT_TINY,
    connector=ConnectorConfig(kind="average", num_tokens=16),
)


def test_qkv_rows_by_key_value_head() -> None:
    """The worked example of the docstring, with one row per head."""
    entry = QKV("ours", "q", "k", "v", num_heads=4, num_groups=2, head_dim=1)
    fused = torch.tensor([[0], [1], [10], [20], [2], [3], [11], [21]])  # q0 q1 k0 v0 q2 q3 k1 v1
    q, k, v = entry.to_hf(fused)
    assert (q.flatten().tolist(), k.flatten().tolist(), v.flatten().tolist()) == ([0, 1, 2, 3], [10, 11], [20, 21])
    assert torch.equal(entry.from_hf((q, k, v)), fused)


@pytest.mark.parametrize("shape", [(32, 5), (32,)], ids=["weight", "bias"])
def test_qkv_round_trip_is_exact(shape: tuple[int, ...]) -> None:
    entry = QKV("ours", "q", "k", "v", num_heads=4, num_groups=2, head_dim=4)
    fused = torch.randn(shape)
    parts = entry.to_hf(fused)
    assert [part.shape[0] for part in parts] == [16, 8, 8]
    assert torch.equal(entry.from_hf(parts), fused)


def test_gated_mlp_is_gate_then_up() -> None:
    entry = GatedMLP("ours", "gate", "up")
    fused = torch.arange(12).view(6, 2)
    gate, up = entry.to_hf(fused)
    assert torch.equal(gate, fused[:3]) and torch.equal(up, fused[3:])
    assert torch.equal(entry.from_hf((gate, up)), fused)


def test_expand_keeps_a_layer_together() -> None:
    table = [Direct("first", "x"), Direct("a.{layer}", "b.{layer}"), Direct("c.{layer}", "d.{layer}"), Direct("last", "y")]
    names = [(entry.ours, *entry.hf) for entry in expand(table, placeholder="layer", count=2)]
    assert names == [("first", "x"), ("a.0", "b.0"), ("c.0", "d.0"), ("a.1", "b.1"), ("c.1", "d.1"), ("last", "y")]


@pytest.mark.parametrize("tied", [True, False])
def test_mm1_table_round_trip_is_bit_exact(tied: bool) -> None:
    """bf16 tensors are converted to Hugging Face names and back through every entry of the table."""
    entries = mm1_table(replace(MODEL, decoder=replace(MODEL.decoder, tied_embeddings=tied)))
    heads = {"vision": VIT_TINY.hidden_size * 3, "language": (4 + 2 * 2) * 4}
    rows = {e.ours: heads[e.ours.split(".")[0]] if isinstance(e, QKV) else 6 for e in entries}
    rows |= {e.ours: MODEL.decoder.vocab_size for e in entries if isinstance(e, Vocabulary)}
    rows |= {e.ours: VIT_TINY.num_patches + 1 for e in entries if isinstance(e, Positions)}
    ours = {name: torch.randn(count, 3).bfloat16() for name, count in rows.items()}
    theirs = to_hf(entries, ours)
    assert ("lm_head.weight" in theirs) is not tied
    back = from_hf(entries, theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_names_are_unique() -> None:
    entries = mm1_table(MODEL)
    for names in ([e.ours for e in entries], [name for e in entries for name in e.hf]):
        assert len(names) == len(set(names))


def test_missing_and_unknown_names_are_listed() -> None:
    entries = [Direct("a", "x"), Direct("b", "y")]
    with pytest.raises(ValueError, match=r"1 tensors are missing \(b\), 1 are unknown \(c\)"):
        to_hf(entries, {"a": torch.ones(1), "c": torch.ones(1)})


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"ours has 7 rows, but 4 query and 2 key/value heads of 4 make 32"):
        QKV("ours", "q", "k", "v", num_heads=4, num_groups=2, head_dim=4).to_hf(torch.ones(7, 2))
    with pytest.raises(ValueError, match="even number"):
        GatedMLP("ours", "gate", "up").to_hf(torch.ones(7, 2))
    with pytest.raises(ValueError, match="must be equal"):
        GatedMLP("ours", "gate", "up").from_hf((torch.ones(2, 2), torch.ones(3, 2)))


def test_stacked_qkv_is_all_queries_then_all_keys_then_all_values() -> None:
    """With two heads of one row each."""
    entry = StackedQKV("ours", "theirs", num_heads=2, head_dim=1)
    ours = torch.tensor([[0], [10], [20], [1], [11], [21]])  # q0 k0 v0 q1 k1 v1
    (theirs,) = entry.to_hf(ours)
    assert theirs.flatten().tolist() == [0, 1, 10, 11, 20, 21]
    assert torch.equal(entry.from_hf((theirs,)), ours)
    with pytest.raises(ValueError, match="theirs has 7 rows, but 3 x 2 heads of 1 make 6"):
        entry.from_hf((torch.ones(7, 1),))


def test_new_tokens_begin_as_the_mean_of_the_old_ones_and_filling_rows_are_cut() -> None:
    entry = Vocabulary("ours", "theirs", rows=6, written_rows=4)
    table = torch.randn(4, 3).bfloat16()
    grown = entry.from_hf((table,))
    assert torch.equal(grown[:4], table)
    assert torch.equal(grown[4:], table.float().mean(dim=0).bfloat16().expand(2, 3))
    assert torch.equal(entry.to_hf(grown)[0], table)
    with pytest.raises(ValueError, match=r"theirs has 7 rows, but the model has only 6: use --model\.decoder\.vocab-size 7 or more"):
        entry.from_hf((torch.ones(7, 3),))


@pytest.mark.parametrize("class_token", [True, False])
def test_positions_of_the_same_resolution_are_untouched(class_token: bool) -> None:
    positions = torch.randn(9 + class_token, 4)
    assert Positions("ours", "theirs", num_patches=9, class_token=class_token).from_hf((positions,)) is positions


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("side", [8, 3])
def test_positions_of_another_resolution_keep_their_meaning(side: int, class_token: bool) -> None:
    """A field that increases linearly in both directions still does, away from the edges; rows and columns are not swapped."""
    there = 5
    row, column = torch.meshgrid(torch.arange(there) + 0.5, torch.arange(there) + 0.5, indexing="ij")
    field = torch.stack([row / there, column / there], dim=-1).flatten(0, 1)
    given = torch.cat([torch.tensor([[7.0, 9.0]]), field]) if class_token else field
    found = Positions("ours", "theirs", num_patches=side**2, class_token=class_token).from_hf((given,))
    assert found.shape == (side**2 + class_token, 2)
    if class_token:
        assert torch.equal(found[0], given[0])
    grid = found[class_token:].unflatten(0, (side, side))
    expected = (torch.arange(side) + 0.5) / side
    middle = slice(side // 4 + 1, side - side // 4 - 1)
    torch.testing.assert_close(grid[middle, middle, 0], expected[middle, None].expand_as(grid[middle, middle, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(grid[middle, middle, 1], expected[None, middle].expand_as(grid[middle, middle, 1]), atol=0.02, rtol=0)
    assert bool((grid[..., 0].diff(dim=0) > 0).all()) and bool((grid[..., 1].diff(dim=1) > 0).all())


def test_positions_that_are_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="theirs has 12 rows, which is not a square grid and a class token"):
        Positions("ours", "theirs", num_patches=9).from_hf((torch.ones(12, 2),))
