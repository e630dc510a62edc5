"""Warns if a resume changes what should rarely change during a run."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_mm.config import Experiment
from megatron_mm.families.serialize import load_experiment

logger = logging.getLogger(__name__)


def warn_of_changes(experiment: Experiment, path: Path) -> None:
    """Warn if a resume changes options that affect the samples, the update or the precision, which it may, but rarely should."""
    if not path.is_file():
        return
    try:
        before = load_experiment(path)
    except (ValueError, OSError) as error:  # truncated, or from another version; the checkpoint has its own copy
        logger.warning("changes since the previous start cannot be determined (%s): %s is rewritten", error, path)
        return
    watched = {
        "model.decoder.padding_rows": (before.model.decoder.padding_rows, experiment.model.decoder.padding_rows),
        "train.seed": (before.train.seed, experiment.train.seed),
        "train.global_batch_size": (before.train.global_batch_size, experiment.train.global_batch_size),
        "data.mixture": (before.data.mixture, experiment.data.mixture),
        "data.chat_template": (before.data.chat_template, experiment.data.chat_template),
        "data.caption_prompt": (before.data.caption_prompt, experiment.data.caption_prompt),
        "data.low_resolution_demonstrations": (before.data.low_resolution_demonstrations, experiment.data.low_resolution_demonstrations),
        "data.sequence_length": (before.data.sequence_length, experiment.data.sequence_length),
        "data.packing_window": (before.data.packing_window, experiment.data.packing_window),
        "train.schedule_steps": (before.train.schedule_steps, experiment.train.schedule_steps),
        "train.precision": (before.train.precision, experiment.train.precision),
        **_changed("optimizer", before.optimizer, experiment.optimizer),
        **_changed("precision", before.precision, experiment.precision),
    }
    for name, (old, new) in watched.items():
        if old != new:
            logger.warning(
                "this run had %s %s and resumes with %s: results will differ from those of an unchanged run", name, _shown(old), _shown(new)
            )


def _shown(value: Any) -> Any:
    """A value as it is written on the command line."""
    return " ".join(f"{name}={item}" for name, item in value.items()) if isinstance(value, dict) else value


def _changed(part: str, before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Old and new values of the fields in which two configurations of a part differ."""
    both = ((field.name, getattr(before, field.name), getattr(now, field.name)) for field in fields(before))
    return {f"{part}.{name}": (old, new) for name, old, new in both if old != new}
