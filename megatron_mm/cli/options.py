"""The typed options of `megatron-mm train` and `eval`: every field of an Experiment, by tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile
from pathlib import Path
from typing import Annotated, Any, TypeVar

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


@dataclass(frozen=True)
class ModelOptions:
    """The model that a checkpoint is made for. Every option shows the recipe's value."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


def parse_model_arguments(recipe: Experiment, arguments: Sequence[str], *, program: str) -> Experiment:
    """The recipe with the command line's overrides, for a command that makes a checkpoint of it; raises and exits as the others do."""
    return _parse(ModelOptions(experiment=recipe), arguments, program=program).experiment


def parse_eval_arguments(experiment: Experiment, arguments: Sequence[str]) -> EvalOptions:
    """A checkpoint's experiment with the command line's overrides; raises and exits as `parse_train_arguments` does."""
    return _parse(EvalOptions(experiment=experiment), arguments, program="megatron-mm eval CHECKPOINT")


Options = TypeVar("Options", TrainOptions, EvalOptions, ModelOptions)


def _parse(default: Options, arguments: Sequence[str], *, program: str) -> Options:
    experiment, arguments = _take_mixture(default.experiment, list(arguments))
    _check_names(replace(default, experiment=experiment), arguments)
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


def _check_names(options: Any, arguments: Sequence[str]) -> None:
    """Raise ValueError for the first option that is no field's, naming the nearest one."""
    known = set(_option_names(options))
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if not name.startswith("--") or name in known or name == "--help":
            continue
        near = difflib.get_close_matches(name, known, n=1) or sorted(n for n in known if n.endswith(f".{name.removeprefix('--')}"))
        advice = f"did you mean {' or '.join(near)}?" if near else "--help lists every option"
        raise ValueError(f"unknown option {argument.partition('=')[0]}: {advice}")


def _option_names(part: Any, prefix: str = "--") -> Iterator[str]:
    """Every option of a dataclass, as tyro names them: groups joined by dots, and a no- beside each switch."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        inner = "" if field.name == "experiment" else f"{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            yield from _option_names(value, f"{prefix}{inner}." if inner else prefix)
        elif isinstance(value, dict):
            yield from (f"{prefix}{inner}.{key.replace('_', '-')}" for key in value)
        elif value is None and any(map(dataclasses.is_dataclass, typing.get_args(typing.get_type_hints(type(part))[field.name]))):
            continue  # a part that the recipe does not have
        else:
            yield f"{prefix}{inner}"
            if isinstance(value, bool):
                yield f"{prefix}no-{inner}"


def _one_line(message: str) -> str:
    """The first paragraph of tyro's message as one line: no title, frame (left out where output is ASCII) or help text."""
    lines = [line.strip("│╭╮╰╯ ") for line in message.splitlines()]
    body = list(dropwhile(_is_rule, [line for line in lines if line][1:]))
    end = next((i for i, line in enumerate(body) if _is_rule(line) or line == "Got errors:"), len(body))
    text = " ".join(" ".join(body[:end]).split()).removeprefix("Error parsing ").replace("experiment.", "", 1)
    text = re.sub(r"^(\w+): (?=\1\.)", "", text)  # "parallel: parallel.virtual is ..."
    return text or "the command line could not be understood: --help lists every option"


def _is_rule(line: str) -> bool:
    return set(line) <= set("─-")
