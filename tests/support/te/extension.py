"""A module `transformer_engine_torch` with the interface recorded in VERSION.json and kernels written in PyTorch."""

from __future__ import annotations

import enum
import inspect
import json
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support.recorded_graph import as_one
from support.te import fp8, kernels

CALLS: Counter[str] = Counter()
"""Number of calls of each kernel."""


def recorded(version: str) -> dict[str, Any]:
    """Return the content of VERSION.json. Raises ValueError for a version that was not recorded."""
    path = Path(__file__).with_name(f"{version}.json")
    if not path.is_file():
        known = sorted(path.stem for path in Path(__file__).parent.glob("*.json"))
        raise ValueError(f"Transformer Engine {version} was not written down, only {known}: run tests/support/te/record.py on its source")
    return json.loads(path.read_text())


def extension(version: str) -> types.ModuleType:
    """Return the module; a function without a kernel here raises NotImplementedError with its name."""
    module = types.ModuleType("transformer_engine_torch")
    record = recorded(version)
    for name, members in record["enumerations"].items():
        setattr(module, name, enum.IntEnum(name, members))
    for name in (
        "CommOverlapCore",
        "CommOverlapBase",
        "CommOverlapP2PBase",
        "CommOverlap",
        "CommOverlapP2P",
        "CommOverlapHelper",
        "FP8TensorMeta",
    ):
        setattr(module, name, type(name, (), {"__init__": _record_arguments}))
    fp8.bind(module)
    kernels.bind(module)
    own = {**kernels.KERNELS, **fp8.KERNELS}
    for name, parameters in record["functions"].items():
        setattr(module, name, _function(name, parameters, [own[n] for n in (name, f"{name}_of_arguments") if n in own]))
    return module


def _record_arguments(self: Any, *args: Any, **kwargs: Any) -> None:
    """Constructor of a stand-in for a class that allocates communication buffers: only keep the arguments."""
    self.args, self.kwargs = args, kwargs


def _function(name: str, parameters: list[str] | None, candidates: list[Callable[..., Any]]) -> Callable[..., Any]:
    """Return a function with the compiled one's parameters, which passes a kernel the arguments that it names.

    The kernel is the first candidate that names only parameters of the compiled function.
    """
    if not candidates:

        def missing(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"transformer_engine_torch.{name} has no kernel in tests/support/te")

        return missing
    kinds = inspect.Parameter
    kind, signature = kinds.POSITIONAL_OR_KEYWORD, []
    for parameter in parameters or []:
        if parameter == "*":
            kind = kinds.KEYWORD_ONLY
            continue
        default = None if parameter.endswith("?") else kinds.empty
        signature.append(kinds(parameter.rstrip("?"), kind, default=default))
    takes = inspect.Signature(signature)
    fitting = [kernel for kernel in candidates if inspect.signature(kernel).parameters.keys() <= takes.parameters.keys()]
    assert fitting, f"{name} takes {list(takes.parameters)}, and no kernel of it is content with some of these"
    kernel, wanted = fitting[0], list(inspect.signature(fitting[0]).parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        bound = takes.bind(*args, **kwargs)
        bound.apply_defaults()
        with torch.no_grad():  # compiled functions record nothing for autograd
            return as_one(kernel, **{parameter: bound.arguments[parameter] for parameter in wanted})

    return call
