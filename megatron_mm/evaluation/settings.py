"""How the setting of a result differs from the task's own, in names of files and in tables.

A task's own setting is its method, its prompts, greedy generation, seed 0, and the fields of the run itself. Results in that setting are
written to CHECKPOINT_TASK_Nshot.json. What differs is appended, so that results of different settings never overwrite each other:

    --limit 60                                  _limit60
    --method rank                               _rank
    --form '{image}Q: {question} A:'            _form-751f7e           (a hash of the text)
    --beams 3                                   _beams3
    --seed 7                                    _seed7
    --text-demonstrations 2                     _text2
    --low-resolution-demonstrations             _low-resolution
    --train.precision fp32                      _fields-d43bd9         (a hash of all such fields)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any


def differences(setting: Mapping[str, Any]) -> dict[str, str]:
    """Return the options that differ from the task's own setting, as they are written on a command line; a switch has an empty value.

    --limit is not among them: tables give the number of items instead.
    """
    fields = setting["model"].get("fields", {})
    own = {option: value for option, value, _ in _parts(setting)}
    return own | {f"--{name.replace('_', '-')}": str(value) for name, value in fields.items()}


def spelled(options: Mapping[str, str]) -> str:
    """Write options on one line: `--method rank --beams 3`."""
    return " ".join(f"{name} {value}".strip() for name, value in options.items())


def suffix(setting: Mapping[str, Any]) -> str:
    """Return the end of a result's name: empty for the task's own setting."""
    limit = "" if setting["limit"] is None else f"_limit{setting['limit']}"
    fields = setting["model"].get("fields")
    return limit + "".join(end for _, _, end in _parts(setting)) + (f"_fields-{_hash(fields)}" if fields else "")


def _parts(setting: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(option, its value, the end of a result's name) for each option of `evaluate` that differs."""
    if "own_method" in setting:
        yield "--method", str(setting["method"]), f"_{setting['method']}"
    if "form" in setting:
        yield "--form", repr(setting["form"]), f"_form-{_hash(setting['form'])}"
    if (beams := setting.get("beams", 1)) != 1:
        yield "--beams", str(beams), f"_beams{beams}"
    if (seed := setting.get("seed", 0)) != 0:
        yield "--seed", str(seed), f"_seed{seed}"
    if texts := setting.get("text_demonstrations"):
        yield "--text-demonstrations", str(texts), f"_text{texts}"
    if setting.get("low_resolution_demonstrations"):
        yield "--low-resolution-demonstrations", "", "_low-resolution"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:6]
