"""Records errors in the part of a checkpoint that only the first process writes, instead of raising them.

What upstream lacks: in megatron-core, all processes agree on errors in the files of tensors. But the part that only the first process
writes (the common state, the metadata of all files, the configuration) is written between two messages, and an error there would leave the
others waiting for the next message. So the error is recorded, and `training.checkpoint` tells the other processes once no message is in
progress.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

_problems: list[str] = []


def install() -> None:
    """Record errors from here on; does nothing when called again."""
    of_common = getattr(common, "TorchCommonSaveStrategy", None)  # not in megatron-core 0.19, which has no common part any more
    for holder, name in ((of_common, "save_common"), (FileSystemWriterAsync, "finish"), (serialization, "save_config")):
        function = getattr(holder, name, None)
        if function is not None and not hasattr(function, "notes_problems"):
            setattr(holder, name, _noting(function))


def take_problems() -> list[str]:
    """Errors since the last call, on this process."""
    found, _problems[:] = list(_problems), []
    return found


def _noting(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def noting(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
            _problems.append(f"{type(error).__name__}: {error}".split("\n")[0])
            return None

    noting.notes_problems = True  # type: ignore[attr-defined]
    return noting
