"""Tables of names: exact in both directions, and loud about what does not fit."""

from dataclasses import replace

import pytest
import torch

from megatron_mm.config import ConnectorConfig, DecoderConfig, MM1Config
from megatron_mm.conversion.mapping import QKV, Direct, GatedMLP, expand, from_hf, to_hf
from megatron_mm.conversion.mm1 import mm1_table
from megatron_mm.models.vision import VIT_TINY

MODEL = MM1Config(
    decoder=DecoderConfig(
        num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, head_dim=4, vocab_size=32
    ),
    vision=VIT_TINY,
    connector=ConnectorConfig(kind="average", num_tokens=16),
)


def test_qkv_rows_by_key_value_head() -> None:
    """The worked example of the docstring, each head one row."""
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
    """bf16 from one side to the other and back, through every entry of the table."""
    entries = mm1_table(replace(MODEL, decoder=replace(MODEL.decoder, tied_embeddings=tied)))
    heads = {"vision": VIT_TINY.hidden_size * 3, "language": (4 + 2 * 2) * 4}
    ours = {e.ours: torch.randn(heads[e.ours.split(".")[0]] if isinstance(e, QKV) else 6, 3).bfloat16() for e in entries}
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
    with pytest.raises(ValueError, match=r"1 tensors are missing \(b\), 1 are not known \(c\)"):
        to_hf(entries, {"a": torch.ones(1), "c": torch.ones(1)})


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"ours has 7 rows, but 4 query and 2 key/value heads of 4 make 32"):
        QKV("ours", "q", "k", "v", num_heads=4, num_groups=2, head_dim=4).to_hf(torch.ones(7, 2))
    with pytest.raises(ValueError, match="odd number"):
        GatedMLP("ours", "gate", "up").to_hf(torch.ones(7, 2))
    with pytest.raises(ValueError, match="should be equal"):
        GatedMLP("ours", "gate", "up").from_hf((torch.ones(2, 2), torch.ones(3, 2)))
