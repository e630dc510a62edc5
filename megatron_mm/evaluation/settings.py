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
from collections.abc import Mapping
from typing import Any


def differences(setting: Mapping[str, Any]) -> dict[str, str]:
    """Return the options that differ from the task's own setting, as they are written on a command line; a switch has an empty value.

    --limit is not among them: tables give the number of items instead.
    """
    found = {}
    if "own_method" in setting:
        found["--method"] = str(setting["method"])
    if "form" in setting:
        found["--form"] = repr(setting["form"])
    if setting.get("beams", 1) != 1:
        found["--beams"] = str(setting["beams"])
    if setting.get("seed", 0) != 0:
        found["--seed"] = str(setting["seed"])
    if setting.get("text_demonstrations"):
        found["--text-demonstrations"] = str(setting["text_demonstrations"])
    if setting.get("low_resolution_demonstrations"):
        found["--low-resolution-demonstrations"] = ""
    fields = setting["model"].get("fields", {})
    return found | {f"--{name.replace('_', '-')}": str(value) for name, value in fields.items()}


def spelled(options: Mapping[str, str]) -> str:
    """Write options on one line: `--method rank --beams 3`."""
    return " ".join(f"{name} {value}".strip() for name, value in options.items())


def suffix(setting: Mapping[str, Any]) -> str:
    """Return the end of a result's name: empty for the task's own setting."""
    found = "" if setting["limit"] is None else f"_limit{setting['limit']}"
    if "own_method" in setting:
        found += f"_{setting['method']}"
    if "form" in setting:
        found += f"_form-{_hash(setting['form'])}"
    if setting.get("beams", 1) != 1:
        found += f"_beams{setting['beams']}"
    if setting.get("seed", 0) != 0:
        found += f"_seed{setting['seed']}"
    if setting.get("text_demonstrations"):
        found += f"_text{setting['text_demonstrations']}"
    if setting.get("low_resolution_demonstrations"):
        found += "_low-resolution"
    if setting["model"].get("fields"):
        found += f"_fields-{_hash(setting['model']['fields'])}"
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:6]
