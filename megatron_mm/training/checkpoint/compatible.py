"""Checks whether a checkpoint fits an experiment: the same model, kind of optimizer state, and meaning of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mm.config import Experiment, ModelConfig
from megatron_mm.families.registry import family_of
from megatron_mm.families.serialize import load_experiment, to_dict
from megatron_mm.training.checkpoint.integrity import read_manifest

_DIFFERENCES = 4
"""Maximum number of differences that an error lists."""
_DESCRIPTIVE = ("decoder.max_positions", "decoder.attention_window", "decoder.rotary_scaling", "decoder.padding_rows")
"""Fields that do not affect parameters. Most only appear in exported configurations."""


def check_same_model(experiment: Experiment, checkpoint: Path, *, with_optimizer: bool = True) -> None:
    """Raise ValueError if the model in a checkpoint differs from the experiment's, naming the differences.

    With the optimizer, its kind of state must match, too. Without it, the settings in `Family.adapts` (how images are shown) may differ.
    """
    saved = load_experiment(checkpoint / "experiment.json")
    differences = model_differences(experiment.model, saved.model)
    if not with_optimizer:
        adapts = family_of(experiment.model).adapts
        differences = [found for found in differences if not any(f"{found[0]}.".startswith(f"{name}.") for name in adapts)]
    if differences:
        told = [f"model.{name} is {theirs!r} there and {ours!r} here" for name, ours, theirs in differences[:_DIFFERENCES]]
        more = f", and {len(differences) - len(told)} more settings differ" if len(differences) > len(told) else ""
        advice = "use another --run-dir, or" if with_optimizer else "use"
        raise ValueError(
            f"checkpoint {checkpoint} holds a different model ({saved.recipe}): {', '.join(told)}{more}: "
            f"{advice} the recipe and model settings of the checkpoint"
        )
    if with_optimizer and experiment.train.freeze_policy != saved.train.freeze_policy:
        raise ValueError(
            f"checkpoint {checkpoint} was trained with train.freeze_policy {saved.train.freeze_policy!r}, "
            f"not {experiment.train.freeze_policy!r}: "
            f"for another stage start a new run with --run-dir NEW --init-from {checkpoint}"
        )
    if with_optimizer and read_manifest(checkpoint).get("weights_only", False):
        raise ValueError(
            f"checkpoint {checkpoint} has only weights and cannot be resumed: use another --run-dir and --init-from {checkpoint}"
        )
    if with_optimizer and experiment.parallel.distributed_optimizer != saved.parallel.distributed_optimizer:
        raise ValueError(
            f"checkpoint {checkpoint} has parallel.distributed_optimizer {saved.parallel.distributed_optimizer}: use the same here"
        )


def check_same_tokenizer(experiment: Experiment, checkpoint: Path, *, resumes: bool = False) -> None:
    """Raise ValueError if a checkpoint was trained with another tokenizer than the experiment's data uses. A checkpoint without a copy of
    its tokenizer fits every one.

    Args:
        resumes: the run of the checkpoint is resumed with the experiment.
    """
    ours, theirs = experiment.data.tokenizer_path, checkpoint / "tokenizer.model"
    if theirs.is_file() and ours.read_bytes() != theirs.read_bytes():
        fix = (
            f"copy {theirs} to {ours} and index the data with it again, or start a new run with another --run-dir"
            if resumes
            else f"use --data.tokenizer {theirs} and index the data with it"
        )
        raise ValueError(f"{checkpoint} was trained with a different tokenizer than {ours}: {fix}")


def model_differences(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Return the fields in which two models differ, with both values; for models of different families, only the family."""
    if ours.family != theirs.family:
        return [("family", ours.family, theirs.family)]
    return [found for found in _differences(to_dict(ours), to_dict(theirs)) if found[0] not in _DESCRIPTIVE]


def same_layout(experiment: Experiment, checkpoint: Path) -> bool:
    """Return whether a checkpoint was written with the experiment's degrees of tensor, pipeline, virtual and expert parallelism."""
    saved = load_experiment(checkpoint / "experiment.json").parallel
    ours = experiment.parallel
    return (saved.tensor, saved.pipeline, saved.virtual, saved.expert) == (ours.tensor, ours.pipeline, ours.virtual, ours.expert)


def _differences(ours: Any, theirs: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted(set(ours) | set(theirs))
        return [found for name in names for found in _differences(ours.get(name), theirs.get(name), f"{prefix}{name}.")]
    return [] if ours == theirs else [(prefix.rstrip("."), ours, theirs)]
