"""Converts experiments to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_mm.config import ConnectorConfig, ModelConfig
from megatron_mm.config.checks import require
from megatron_mm.config.references import check_own, load_module
from megatron_mm.config.run import Experiment
from megatron_mm.families.registry import FAMILIES

EXPORT_SETTINGS = "megatron_mm.json"
"""File of an exported model with its recipe and settings (`conversion.export_settings`)."""


def to_dict(value: Any) -> Any:
    """Convert a config part to plain JSON values: a model includes its `family`, paths become strings, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"family": value.family, **result} if isinstance(value, ModelConfig) else result
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(kind: type, values: dict[str, Any], *, where: str = "config") -> Any:
    """Build the config part `kind` from plain values; the inverse of `to_dict`.

    Raises ValueError, naming it, for an unknown or missing field or an unknown model family.
    """
    if kind is ModelConfig:
        family = values.get("family")
        if family not in FAMILIES:
            raise ValueError(f"{where} has the unknown model family {family!r}; this version has {sorted(FAMILIES)}")
        return from_dict(FAMILIES[family].config, {k: v for k, v in values.items() if k != "family"}, where=where)
    if kind is ConnectorConfig:
        kind = _connector_config(values.get("kind"))
    renamed: dict[str, str] = getattr(kind, "renamed", {})
    values = {renamed.get(name, name) if renamed.get(name) not in values else name: value for name, value in values.items()}
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"{where} has unknown fields {unknown}; the fields of {kind.__name__} are {sorted(fields)}")
    optional = dataclasses.MISSING
    missing = [n for n, f in fields.items() if n not in values and f.default is optional and f.default_factory is optional]
    require(not missing, f"{where} lacks the fields {missing}")
    return kind(**{name: _convert(hints[name], value, where=f"{where}.{name}") for name, value in values.items()})


def _connector_config(kind: Any) -> type[ConnectorConfig]:
    """Return the configuration class of a kind of connector; an unknown kind is reported later, when the layout is checked."""
    from megatron_mm.models.connectors import CONNECTORS

    return CONNECTORS[kind].config if kind in CONNECTORS else ConnectorConfig


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    if hint is Path:
        return Path(value)
    return tuple(value) if typing.get_origin(hint) is tuple else value


def save_experiment(experiment: Experiment, path: Path) -> None:
    """Write the resolved experiment as JSON, atomically: a reader sees either the old file or the complete new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(to_dict(experiment), indent=2) + "\n")
    partial.rename(path)


def load_experiment(path: Path) -> Experiment:
    """Read a file written by `save_experiment`, after running its extensions.

    Raises ValueError, naming the file and the field, for invalid contents, and if code that the file names does not belong to the user
    (`references.check_own`).
    """
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a configuration written by this program, but is a JSON {type(values).__name__}: restore it")
    places = [*values.get("extensions", ()), *values.get("extra_hooks", ()), *values.get("data", {}).get("preprocessors", ())]
    for place in places:
        check_own(place, named_in=path)
    load_extensions(values.get("extensions", ()), where=str(path))
    return from_dict(Experiment, values, where=str(path))


def load_extensions(places: Iterable[str], *, where: str) -> None:
    """Run the code that registers families, connectors and the like (`Experiment.extensions`). Raises ValueError, with `where`, if a file
    or module is missing."""
    for place in places:
        try:
            load_module(place)
        except ValueError as error:
            raise ValueError(f"extensions of {where}: {error}") from None
