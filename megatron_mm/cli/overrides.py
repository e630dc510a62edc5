"""Every field of an experiment as an option of the command line: `--train.steps 100`.

Names, types, units and defaults are the dataclasses' own: a field `steps: int` of the part `train` is `--train.steps INTEGER`, and its
docstring is the help. `values.py` says what its type means. An entry of a dict is an option, too: --data.mixture.pairs 0.5 changes one.

A part that the experiment does not have (`MoEConfig | None`) comes into being when one of its fields is given.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mm.cli.values import parse_words, takes_none, without_none
from megatron_mm.config import Experiment

ABSENT = object()
"""The value of a field of a part that the experiment does not have, where the field has no default."""
_NOT_OPTIONS = {("recipe",)}
"""The recipe's name says where an experiment came from; another one would be untrue."""


@dataclass(frozen=True)
class Override:
    """A field as an option."""

    path: tuple[str, ...]
    """Names of parts, and of the field."""
    hint: Any
    """The field's type; None for a whole part that may be taken away: it takes the word None alone."""
    value: Any
    """What it is without the option."""
    text: str
    """The field's docstring."""
    group_text: str
    """The first sentence of its part's docstring."""
    key: str | None = None
    """Of one entry of a dict: its key."""
    earlier: str | None = None
    """The field's name in earlier versions, which is an option still."""

    @property
    def name(self) -> str:
        return "--" + _dashed([*self.path, *([self.key] if self.key is not None else [])])

    @property
    def names(self) -> list[str]:
        """Its name, and the one that it had."""
        return [self.name, *(["--" + _dashed([*self.path[:-1], self.earlier])] if self.earlier is not None else [])]

    @property
    def negative(self) -> str | None:
        """The option that switches it off; None for what is no switch."""
        return "--" + _dashed([*self.path[:-1], f"no-{self.path[-1]}"]) if without_none(self.hint) is bool else None


def _dashed(names: Sequence[str]) -> str:
    return ".".join(name.replace("_", "-") for name in names)


def overrides_of(experiment: Experiment) -> list[Override]:
    """Every option of an experiment, in the order of its fields."""
    found = [option for option in _of_part(experiment, type(experiment), ()) if option.path not in _NOT_OPTIONS]
    return sorted(found, key=lambda option: len(option.path) > 1)  # its own fields before its parts'


def _of_part(part: Any, kind: type, path: tuple[str, ...]) -> Iterator[Override]:
    hints, texts, group = typing.get_type_hints(kind), field_texts(kind), _first_sentence(kind)
    earlier = {now: before for before, now in getattr(kind, "renamed", {}).items()}
    for field in dataclasses.fields(kind):
        value = _default(field) if part is None else getattr(part, field.name)
        here, hint = (*path, field.name), hints[field.name]
        inner = type(value) if dataclasses.is_dataclass(value) else _dataclass_of(hint)
        if inner is not None:
            if takes_none(hint):
                yield Override(here, None, None, texts.get(field.name, ""), group)
            yield from _of_part(None if value is None or value is ABSENT else value, inner, here)
            continue
        option = Override(here, hint, value, texts.get(field.name, ""), group, earlier=earlier.get(field.name))
        yield option
        if isinstance(value, dict):
            (_, kind_of_values) = typing.get_args(without_none(hint))
            for key, item in value.items():
                yield dataclasses.replace(option, hint=kind_of_values, value=item, text="", key=key)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else ABSENT


def _first_sentence(kind: type) -> str:
    text = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    return " ".join(text.split())


@functools.cache
def field_texts(kind: type) -> dict[str, str]:
    """The docstrings that stand below the fields of a dataclass and of those that it inherits from, by field."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # no file: made at run time
            continue
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value) if isinstance(below.value, ast.Constant) else ""
                found[field.target.id] = " ".join(str(text).split())
    return found


def _dataclass_of(hint: Any) -> type | None:
    kind = without_none(hint)
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def apply_overrides(experiment: Experiment, overrides: Sequence[Override], words: Mapping[str, Sequence[str]]) -> Experiment:
    """The experiment with new values; every part checks itself once, with all of them.

    Args:
        words: those that follow an option, by the option's name.

    Raises ValueError in one line that names the option and what it takes, or the part whose values do not fit.
    """
    values: dict[tuple[str, ...], Any] = {}
    for option in overrides:
        if option.name not in words:
            continue
        value = parse_words(option.name, option.hint, words[option.name])
        if option.key is not None:
            value = {**values.get(option.path, _value_at(experiment, option.path)), option.key: value}
        values[option.path] = value
    changed = _rebuild(experiment, type(experiment), values, ())
    assert isinstance(changed, Experiment)
    return changed


def _value_at(part: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        part = getattr(part, name)
    return part


def _rebuild(part: Any, kind: type, values: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> Any:
    """A part with the values that lie in it; None where it is not there and none does."""
    if not any(changed[: len(path)] == path for changed in values):
        return part
    hints, changes = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        here, value = (*path, field.name), None if part is None else getattr(part, field.name)
        inner = type(value) if dataclasses.is_dataclass(value) else _dataclass_of(hints[field.name])
        inside = [changed for changed in values if changed[: len(here)] == here and changed != here]
        if here in values:
            if inside:
                raise ValueError(f"--{_dashed(here)} None takes the part away that --{_dashed(inside[0])} is of: give one of them")
            changes[field.name] = values[here]
        elif inner is not None and inside:
            changes[field.name] = _rebuild(value, inner, values, here)
    try:
        return _make(kind, changes, path) if part is None else dataclasses.replace(part, **changes)
    except ValueError as error:
        raise ValueError(_in_part(str(error), path, kind)) from None


def _make(kind: type, values: dict[str, Any], path: tuple[str, ...]) -> Any:
    missing = [field.name for field in dataclasses.fields(kind) if _default(field) is ABSENT and field.name not in values]
    if missing:
        options = " and ".join("--" + _dashed([*path, name]) for name in missing)
        raise ValueError(f"{'.'.join(path)} is a part that the recipe does not have: to add it give {options}, too")
    return kind(**values)


def _in_part(message: str, path: tuple[str, ...], kind: type) -> str:
    """`steps is 0` -> `train.steps is 0`; a message that names its part stays as it is."""
    part, first = ".".join(path), message.split(" ", 1)[0]
    if not part or message.startswith((f"{part}.", f"{part} ")) or first.split(".")[0] in [path[0], path[-1]]:
        return message
    return f"{part}.{message}" if first in {field.name for field in dataclasses.fields(kind)} else f"{part}: {message}"
