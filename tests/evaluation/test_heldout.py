"""A held-out split that has only some of the sources of the mixture."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.data_files import ALONE, experiment

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch
from megatron_mm.evaluation.heldout import HeldOut
from megatron_mm.run.data import held_out_batches, image_input, open_tokenizer
from megatron_mm.run.start import check
from megatron_mm.training.loss import LossTotals


class CountingStep:
    """Stands for a training step; the loss of every token is the number of its source."""

    def evaluate(self, micro_batches: list[PackedBatch]) -> LossTotals:
        ids = torch.cat([batch.source_ids[batch.loss_mask > 0] for batch in micro_batches])
        tokens = torch.bincount(ids.long(), minlength=3).tolist()
        return LossTotals(losses=[number * count for number, count in enumerate(tokens)], tokens=tokens)


def held_out(settings: Experiment) -> HeldOut:
    return HeldOut(settings, ALONE, open_tokenizer(settings), image=image_input(settings), batches=held_out_batches)


@pytest.fixture
def settings(demo_data: Path, tmp_path: Path) -> Experiment:
    """An experiment whose data has no held-out pairs, the second of its three sources."""
    data = Path(shutil.copytree(demo_data, tmp_path / "data"))
    shutil.rmtree(data / "heldout" / "pairs")
    small = experiment(data)
    return replace(small, eval=replace(small.eval, batches=1))


def test_the_sources_that_are_there_are_evaluated_and_the_others_named(
    settings: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check(settings, tmp_path / "run")
    assert "heldout lacks pairs of data.mixture: held-out losses are those of the other sources" in caplog.text
    found = held_out(settings)
    losses = found.losses(CountingStep())  # type: ignore[arg-type]
    assert {name: loss for name, loss in losses.items() if "/loss/" in name} == {"heldout/loss/interleaved": 0, "heldout/loss/text": 1}
    assert found.why_no_captions().startswith("none of the sources interleaved, text in ")


def test_a_split_with_none_of_the_sources_is_refused_only_where_it_is_needed(settings: Experiment, tmp_path: Path) -> None:
    for name in ("interleaved", "text"):
        shutil.rmtree(settings.data.path / "heldout" / name)
    with pytest.raises(ValueError, match=r"has none of the sources interleaved, pairs, text of data.mixture; it has .*conversations"):
        check(settings, tmp_path / "run")
    never = replace(settings, eval=replace(settings.eval, interval=0))
    check(never, tmp_path / "run")
    held_out(never)
