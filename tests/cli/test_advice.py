"""The advice for an option that does not exist."""

from __future__ import annotations

import pytest

from megatron_mm.cli.advice import ELSEWHERE, advice
from megatron_mm.cli.overrides import overrides_of
from megatron_mm.families.recipes import get_recipe

OWN = ["--run-dir", "--dry-run", "--force"]
OPTIONS = [*OWN, *(option.name for option in overrides_of(get_recipe("debug_mm1")))]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("--train.learning-rate", "--optimizer.peak-lr"),
        ("--train.lr", "--optimizer.peak-lr or --optimizer.min-lr"),
        ("--train.min-lr", "--optimizer.min-lr"),
        ("--train.warmup", "--optimizer.warmup-steps"),
        ("--train.weight-decay", "--optimizer.weight-decay"),
        ("--gradient-clip", "--optimizer.clip-grad-norm"),
        ("--train.stepz", "--train.steps"),
        ("--steps", "--train.steps"),
        ("--batch-size", "--train.global-batch-size or --train.micro-batch-size"),
        ("--bf16", "--train.precision"),
        ("--tensor", "--parallel.tensor"),
        ("--parralel.tensor", "--parallel.tensor"),
        ("--parallel.tp", "--parallel.tensor"),
        ("--checkpoint.every", "--checkpoint.interval"),
        ("--num-workers", "--data.decode-threads or --data.read-threads"),
        ("--output-dir", "--run-dir"),
        ("--data-path", "--data.path"),
        ("--model.decoder.num-heads", "--model.decoder.num-attention-heads"),
    ],
)
def test_options_of_other_programs_and_misspelled_ones(name: str, options: str) -> None:
    assert advice(name, OPTIONS) == f"did you mean {options}?"


def test_nothing_is_advised_for_what_resembles_no_option() -> None:
    assert advice("--train.zzz", OPTIONS) == ""
    assert advice("--bf16", ["--out"]) == "" and advice("--resume", ["--out"]) == ""
    assert advice("--resume", OPTIONS).startswith("the same command with the same --run-dir resumes a run")


def test_every_name_of_another_program_leads_to_options_that_exist() -> None:
    names = [name for names in ELSEWHERE for name in names]
    assert len(names) == len(set(names)) and not {f"--{name}" for name in names} & set(OPTIONS)
    assert {option for ours in ELSEWHERE.values() for option in ours} <= set(OPTIONS)
