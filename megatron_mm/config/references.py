"""References to Python objects by where they are defined: `path/to/file.py:NAME` or `package.module:NAME`.

With these, recipes, hooks and preprocessors of your own can be used without changing this package. A run's configuration records the
reference, so that the object can be found again.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_mm.config.checks import nearest


def is_reference(word: str) -> bool:
    """Whether a word is a reference (FILE.py:NAME or MODULE:NAME) and not a plain name."""
    return ":" in word


def load_object(reference: str) -> Any:
    """The object that a reference names. Its file or module is run only once.

    Raises ValueError if there is no such file, module or name, or if running the file fails.
    """
    place, separator, name = reference.rpartition(":")
    if not separator or not place or not name:
        raise ValueError(f"{reference!r} is not a reference: write FILE.py:NAME or MODULE:NAME")
    module = load_module(place)
    if not hasattr(module, name):
        raise ValueError(f"{place} defines no {name!r}{nearest(name, vars(module))}")
    return getattr(module, name)


def load_module(place: str) -> ModuleType:
    """The module of a file or of a dotted name. Like a script, a file may import other files in its folder. Raises ValueError as
    `load_object` does."""
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # the module exists, but something that it imports does not
            raise ValueError(f"there is no module {place!r}: install its package or put its folder on PYTHONPATH") from None
    path = Path(place).resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {path}: correct the path")
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module  # before it runs, because dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"extension {path} failed{line_in(path, error)}: {type(error).__name__}: {error}") from error
    return module


def line_in(file: str | Path, error: BaseException) -> str:
    """`, line N`: the line of a file at which an error was raised; an empty string if the error did not pass through the file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f", line {lines[-1]}" if lines else ""


def _module_name(path: Path) -> str:
    """The name of the module that is made from a file."""
    return f"megatron_mm_extension_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def check_own(word: str, *, named_in: Path) -> None:
    """Raise ValueError if code that a saved configuration names may come from somebody else: a downloaded checkpoint could bring code
    along, or name a file that another user of the machine left somewhere.

    Code that was already run in this process was named by the user. Other code must be outside the folder (run directory or checkpoint) of
    the configuration, be given by its full path, and belong to this user or to root, and nobody else may be able to write to it.
    """
    place = word.rpartition(":")[0] if is_reference(word) else word
    is_file = place.endswith(".py")
    if not is_file and place in sys.modules:
        return
    path = Path(place) if is_file else _origin(place)
    if path is None or (is_file and _module_name(path.resolve()) in sys.modules):
        return
    folder = named_in.resolve().parent
    folder = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    run = f"{named_in} names {place}, whose Python code would be run"
    if not path.is_absolute():
        raise ValueError(f"{run}, but not by its full path: write the full path there")
    if path.resolve().is_relative_to(folder):
        raise ValueError(
            f"{run}, but that file came with it: inspect it; if you trust it, move it out of {folder} and write its new path there"
        )
    if path.is_file():
        found = path.stat()
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o002:
            raise ValueError(
                f"{run}, but other users of this machine can change that file: deny them write access (chown, chmod o-w), or remove it"
            )


def _origin(module: str) -> Path | None:
    """The file of a module that has not been imported yet; None if there is none."""
    try:
        found = importlib.util.find_spec(module.partition(".")[0])  # only the outermost package: finding a submodule would run its parents
    except (ImportError, ValueError):
        return None
    return Path(found.origin).absolute() if found is not None and found.origin not in (None, "built-in", "frozen") else None


def absolute(word: str) -> str:
    """The same file or reference with the file's full path, so that it is found from any working directory."""
    place, separator, name = word.rpartition(":") if is_reference(word) else (word, "", "")
    return f"{Path(place).resolve()}{separator}{name}" if place.endswith(".py") else word
