"""The typed options of `megatron-mm train` and `eval`: every field of an Experiment, by tyro."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from megatron_mm.config import Experiment


@dataclass(frozen=True)
class TrainOptions:
    """Train a recipe. Every option below shows the recipe's value."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """Directory of the run: configuration, metrics, checkpoints, W&B. Goes on with the run that is there."""
    dry_run: bool = False
    """Print the resolved configuration, the parameters of every pipeline stage and the first steps' plan, and stop."""


def parse_train_arguments(recipe: Experiment, arguments: Sequence[str]) -> TrainOptions:
    """The recipe with the command line's overrides.

    Raises ValueError with one line for an unknown field or a value of the wrong kind; prints and exits for --help.
    """
    return _parse(TrainOptions(experiment=recipe), arguments, program=f"megatron-mm train {recipe.recipe}")


@dataclass(frozen=True)
class EvalOptions:
    """Held-out losses with true, shuffled and blank images, and captions. Every option shows the checkpoint's value; the layout
    is a single process unless given."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


def parse_eval_arguments(experiment: Experiment, arguments: Sequence[str]) -> EvalOptions:
    """A checkpoint's experiment with the command line's overrides; raises and exits as `parse_train_arguments` does."""
    return _parse(EvalOptions(experiment=experiment), arguments, program="megatron-mm eval CHECKPOINT")


Options = TypeVar("Options", TrainOptions, EvalOptions)


def _parse(default: Options, arguments: Sequence[str], *, program: str) -> Options:
    experiment, arguments = _take_mixture(default.experiment, list(arguments))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                type(default),
                prog=program,
                args=arguments,
                default=replace(default, experiment=experiment),
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_one_line(errors.getvalue())) from None


def _take_mixture(recipe: Experiment, arguments: list[str]) -> tuple[Experiment, list[str]]:
    """Apply `--data.mixture NAME=WEIGHT ...` here: tyro fixes a dict's keys to the default's, and sources have names of their own."""
    if "--data.mixture" not in arguments:
        return recipe, arguments
    begin = arguments.index("--data.mixture")
    end = next((i for i in range(begin + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    mixture = {}
    for entry in arguments[begin + 1 : end]:
        name, _, weight = entry.partition("=")
        try:
            mixture[name] = float(weight)
        except ValueError:
            raise ValueError(f"--data.mixture takes NAME=WEIGHT, for example pairs=0.5, not {entry!r}") from None
    return replace(recipe, data=replace(recipe.data, mixture=mixture)), arguments[:begin] + arguments[end:]


def _one_line(message: str) -> str:
    """tyro's boxed, many-line message as one line."""
    text = " ".join("".join(character for character in line if character not in "╭╮╰╯│─").strip() for line in message.splitlines())
    text = " ".join(text.split()).split(" For full helptext")[0]
    return text[:400] or "the command line could not be understood"
