"""Sparse models: experts are read and written one at a time, and the exported model equals the training model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.converted import exported_logits
from support.trained import Trained
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_mm.conversion.reader import CheckpointReader
from megatron_mm.conversion.to_hf import Export, convert_to_hf
from megatron_mm.families.mm1.names import mm1_table
from megatron_mm.hf.mapping import from_hf, to_hf

STACK = "language.decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


@pytest.fixture(scope="module")
def exported_sparse(sparse: Trained, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return convert_to_hf(sparse.checkpoint, tmp_path_factory.mktemp("export") / "model", dtype="float32", shard_size="500KB")


def test_logits_are_the_training_models(sparse: Trained, exported_sparse: Export) -> None:
    processor = AutoProcessor.from_pretrained(exported_sparse.path, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(exported_sparse.path, trust_remote_code=True).eval()
    assert type(model.language_model.layers[1].mlp).__name__ == "MM1SparseMLP"
    assert type(model.language_model.layers[0].mlp).__name__ == "LlamaMLP"
    for ours, theirs in zip(sparse.logits, exported_logits(model, processor, sparse.batch), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_one_expert_is_read_without_the_others(sparse: Trained) -> None:
    reader = CheckpointReader(sparse.checkpoint)
    whole = reader.read(STACK)
    assert whole.shape == (4, 640, 128)
    for expert in range(4):
        assert torch.equal(reader.read(STACK, row=expert), whole[expert])
        name = f"language.decoder.layers.1.mlp.experts.local_experts.{expert}.linear_fc1.weight"
        assert torch.equal(whole[expert], sparse.weights[name])


def test_there_and_back_again(sparse: Trained) -> None:
    reader, table = CheckpointReader(sparse.checkpoint), mm1_table(sparse.config)
    ours = {name: reader.read(name) for name in reader.names()}
    back = from_hf(table, to_hf(table, ours))
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_names_are_those_of_mixtures_of_experts(sparse: Trained) -> None:
    names = {name for entry in mm1_table(sparse.config) for name in entry.hf}
    assert "language_model.layers.1.mlp.gate.weight" in names
    assert {f"language_model.layers.1.mlp.experts.{e}.{x}_proj.weight" for e in range(4) for x in ("gate", "up", "down")} <= names
    assert "language_model.layers.1.mlp.gate_proj.weight" not in names


def test_a_missing_piece_is_named(sparse: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CheckpointReader(sparse.checkpoint)
    entry = reader._entries[STACK]
    monkeypatch.setattr(entry, "chunks", entry.chunks[1:])
    with pytest.raises(ValueError, match=f"{STACK} lacks parts of row 0"):
        reader.read(STACK, row=0)


def test_shards_stay_under_their_limit(exported_sparse: Export) -> None:
    sizes = [path.stat().st_size for path in Path(exported_sparse.path).glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 600_000
