"""Every field of an experiment as an option of the command line: `--train.steps 100`.

Names, types, units and defaults are the dataclasses' own: a field `steps: int` of the part `train` is `--train.steps INTEGER`, and its
docstring is the help. `values.py` defines how values of each type are written. An entry of a dict is an option as well:
--data.mixture.pairs 0.5 changes one entry.

A part that the experiment does not have (`MoEConfig | None`) is created if one of its fields is given.
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
"""The value of a field without a default, in a part that the experiment does not have."""
_NOT_OPTIONS = {("recipe",)}
"""The recipe's name records where an experiment came from, so it cannot be changed."""


@dataclass(frozen=True)
class Override:
    """A field as an option."""

    path: tuple[str, ...]
    """Names of the parts and of the field."""
    hint: Any
    """The field's type; None for a whole part that can be removed: this option accepts only the word None."""
    value: Any
    """Its value if the option is not given."""
    text: str
    """The field's docstring."""
    group_text: str
    """The first paragraph of its part's docstring."""
    key: str | None = None
    """For an entry of a dict: its key."""
    earlier: str | None = None
    """The field's name in earlier versions, which still works as an option."""

    @property
    def name(self) -> str:
        return "--" + _dashed([*self.path, *([self.key] if self.key is not None else [])])

    @property
    def names(self) -> list[str]:
        """Its name, and its earlier name."""
        return [self.name, *(["--" + _dashed([*self.path[:-1], self.earlier])] if self.earlier is not None else [])]

    @property
    def negative(self) -> str | None:
        """The option that turns it off; None if the field is not a switch."""
        return "--" + _dashed([*self.path[:-1], f"no-{self.path[-1]}"]) if without_none(self.hint) is bool else None


def _dashed(names: Sequence[str]) -> str:
    return ".".join(name.replace("_", "-") for name in names)


def overrides_of(experiment: Experiment) -> list[Override]:
    """All options of an experiment, in the order of its fields."""
    found = [option for option in _of_part(experiment, type(experiment), ()) if option.path not in _NOT_OPTIONS]
    return sorted(found, key=lambda option: len(option.path) > 1)  # the experiment's own fields first, then those of its parts


def _of_part(part: Any, kind: type, path: tuple[str, ...]) -> Iterator[Override]:
    hints, texts, group = typing.get_type_hints(kind), field_texts(kind), _first_paragraph(kind)
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


def _first_paragraph(kind: type) -> str:
    text = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    return " ".join(text.split())


@functools.cache
def field_texts(kind: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of its base classes, by field."""
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
    """The experiment with new values; every part checks itself once, with all of its new values.

    Args:
        words: the words that follow each option, by the option's name.

    Raises a one-line ValueError that names the option and what it accepts, or the part whose values do not fit together.
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
    """A part with its new values; None if the part does not exist and has no new values."""
    if not any(changed[: len(path)] == path for changed in values):
        return part
    hints, changes = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        here, value = (*path, field.name), None if part is None else getattr(part, field.name)
        inner = type(value) if dataclasses.is_dataclass(value) else _dataclass_of(hints[field.name])
        inside = [changed for changed in values if changed[: len(here)] == here and changed != here]
        if here in values:
            if inside:
                raise ValueError(f"--{_dashed(here)} None removes the part to which --{_dashed(inside[0])} belongs: use only one of them")
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
        raise ValueError(f"the recipe does not have the part {'.'.join(path)}: to add it, also set {options}")
    return kind(**values)


def _in_part(message: str, path: tuple[str, ...], kind: type) -> str:
    """`steps is 0` -> `train.steps is 0`; a message that names its part stays as it is."""
    part, first = ".".join(path), message.split(" ", 1)[0]
    if not part or message.startswith((f"{part}.", f"{part} ")) or first.split(".")[0] in [path[0], path[-1]]:
        return message
    return f"{part}.{message}" if first in {field.name for field in dataclasses.fields(kind)} else f"{part}: {message}"
