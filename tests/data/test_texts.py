"""Texts are read and tokenized only once for all processes of a data-parallel rank, and for all pieces of a document."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_files import ALONE, experiment
from support.distributed import run_processes

from megatron_mm.config import ParallelConfig
from megatron_mm.data.load import texts
from megatron_mm.data.prepare.index import prepare_index
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import TrainingData


def batches(path: Path, topology: topologies.Topology, *, steps: int, **data: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    settings = experiment(path, **data)
    loader = TrainingData(settings, topology, Tokenizer.open(settings.data.tokenizer_path))
    try:
        found = [batch for _ in range(steps) for batch in next(loader).micro_batches]
    finally:
        loader.close()
    return [(batch.token_ids, batch.labels, batch.loss_mask) for batch in found]


def read_by_each(path: Path, parallel: ParallelConfig) -> tuple[int, list[Any]]:
    """Load batches with two loaders in turn on this process; return the number of documents it tokenized, and the batches."""
    reads = Counter[str]()
    original = texts.TextReader._read

    def counting(self: texts.TextReader, source: int, sample: int) -> Any:
        reads["documents"] += 1
        return original(self, source, sample)

    texts.TextReader._read = counting  # type: ignore[method-assign]
    topology = topologies.initialize(parallel, seed=0)
    found = batches(path, topology, steps=2) + batches(path, topology, steps=1, mixture={"text": 1.0})
    topologies.shutdown()
    return reads["documents"], found


def test_one_process_of_a_data_parallel_rank_reads_the_texts(demo_data: Path) -> None:
    """On two pipeline stages of two tensor-parallel ranks; all get the same texts as a single process."""
    found = run_processes(read_by_each, 4, demo_data, ParallelConfig(tensor=2, pipeline=2), timeout=240)
    assert [count > 0 for count, _ in found] == [True, False, False, False]
    alone = batches(demo_data, ALONE, steps=2) + batches(demo_data, ALONE, steps=1, mixture={"text": 1.0})
    for _, mine in found:
        assert len(mine) == len(alone)
        assert all(torch.equal(a, b) for one, other in zip(mine, alone, strict=True) for a, b in zip(one, other, strict=True))


def test_a_document_in_many_pieces_is_tokenized_once(demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four documents of many pieces each, and short ones, which are not cached."""
    lines = [{"text": "a red circle over a blue square " * (800 if n % 21 == 0 else 1) + f"{n:03}"} for n in range(64)]
    folder = tmp_path / "train" / "text"
    folder.mkdir(parents=True)
    (folder / "0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tokenizer.model").write_bytes((demo_data / "tokenizer.model").read_bytes())
    prepare_index(tmp_path)
    encoded: list[str] = []
    original = Tokenizer.encode_batch

    def counting(self: Tokenizer, written: list[str]) -> list[list[int]]:
        encoded.extend(text[-3:] for text in written if len(text) > 1000)
        return original(self, written)

    monkeypatch.setattr(Tokenizer, "encode_batch", counting)
    settings = {"mixture": {"text": 1.0}, "sequence_length": 128}
    kept = batches(tmp_path, ALONE, steps=6, **settings)
    assert sorted(set(encoded)) == sorted(text["text"][-3:] for text in lines[::21]) and len(encoded) == 4
    encoded.clear()
    monkeypatch.setattr(texts, "_KEPT_TOKENS", 0)  # at most one is kept
    again = batches(tmp_path, ALONE, steps=6, **settings)
    assert len(encoded) > 10
    assert all(torch.equal(a, b) for one, other in zip(kept, again, strict=True) for a, b in zip(one, other, strict=True))
