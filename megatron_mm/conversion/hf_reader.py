"""Reading single tensors of a Hugging Face checkpoint: safetensors, or pickles that contain only tensors.

Problems with the files are found before the first tensor is read: an index that names files elsewhere or tensors that do not exist, a
tensor that is in two files, a truncated file. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_mm.conversion.files import Place, TensorInfo, read_safetensors_header, read_tensor

T = TypeVar("T")

WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
"""Names of weight files and indexes; the first one that a directory has is read."""
_WRAPPERS = ("state_dict", "model", "module")
"""Keys under which training programs store the tensors in a file. Other keys of such a file are not read."""


class HfReader:
    """The tensors of a Hugging Face directory, or of one file of weights. May be used by several threads."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if there are no weights, a file is damaged, or index and files do not agree."""
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.files = _weight_files(path)
        self._places: dict[str, Place] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        names: Counter[str] = Counter()
        holders: dict[str, str] = {}
        for file in self.files:
            held = self._open(file)
            names.update(held)
            holders.update(dict.fromkeys(held, file.name))
        doubled = sorted(name for name, count in names.items() if count > 1)
        if doubled:
            raise ValueError(f"{path} holds {len(doubled)} tensors in more than one file: {_some(doubled)}")
        _check_index(path, holders)

    @property
    def fingerprint(self) -> list[list[Any]]:
        """Identity of the files: their names, sizes and modification times."""
        return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in self.files]

    def names(self) -> dict[str, TensorInfo]:
        """Return all tensors by name."""
        return dict(self._infos)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor. Raises KeyError for a name that is not in `names()`."""
        if name in self._pickled:
            return self._pickled[name].clone(memory_format=torch.contiguous_format)
        return read_tensor(self._places[name], self._infos[name])

    def below(self, prefix: str, *, also: Collection[str] = ()) -> HfReader:
        """Return a view of the tensors below a prefix, named without it.

        Args:
            also: tensors without the prefix that are kept, under their full names.
        """

        def named(tensors: Mapping[str, T]) -> dict[str, T]:
            return {name.removeprefix(prefix): found for name, found in tensors.items() if name.startswith(prefix) or name in also}

        view = copy.copy(self)
        view._infos, view._places, view._pickled = named(self._infos), named(self._places), named(self._pickled)
        return view

    def config(self, name: str = "config.json") -> dict[str, Any] | None:
        """Read a JSON document next to the weights; None if it does not exist. Raises ValueError if it cannot be read."""
        file = self.folder / name
        if not file.is_file():
            return None
        try:
            document = json.loads(file.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        if not isinstance(document, dict):
            raise ValueError(f"{file} contains a {type(document).__name__}, but a configuration must be a JSON object")
        return document

    def _open(self, file: Path) -> list[str]:
        """Register the tensors of a file; return their names."""
        if file.suffix == ".safetensors":
            entries = read_safetensors_header(file)
            self._infos.update({name: info for name, (info, _) in entries.items()})
            self._places.update({name: place for name, (_, place) in entries.items()})
            return list(entries)
        tensors = _open_pickle(file)
        self._infos.update({name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
        self._pickled.update(tensors)
        return list(tensors)


def _weight_files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"{path} does not exist: specify a Hugging Face directory or a file of weights in it")
    if path.is_file():
        found = path
    else:
        there = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not there:
            others = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))
            shards = [name for name in others if "-of-" in name]
            if shards:
                raise ValueError(f"{path} has shards {_some(shards)} without their index {_index_of(shards[0])}: download that file, too")
            hint = f"; to read one of {_some(others)}, specify the path of the file" if others else ""
            raise ValueError(f"{path} holds no weights: looked for {', '.join(WEIGHT_FILES)}{hint}")
        found = there[0]
    if not found.name.endswith(".index.json"):
        return [found]
    names = sorted(set(_weight_map(found).values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{found} names the file {name!r}, which is outside its own folder: such files are not read")
        if not (found.parent / name).is_file():
            raise ValueError(f"{found} names the file {name}, which does not exist: download it again")
    return [found.parent / name for name in names]


def _index_of(shard: str) -> str:
    """`model-00001-of-00002.safetensors` -> `model.safetensors.index.json`."""
    return f"{shard.rpartition('-of-')[0].rpartition('-')[0]}{Path(shard).suffix}.index.json"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of weights ({type(error).__name__}: {error})") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{index} is not an index of weights: it needs a weight_map that names the file of each tensor")
    return found


def _check_index(path: Path, holders: dict[str, str]) -> None:
    """Raise ValueError if an index and its files do not hold the same tensors, or the index names the wrong file for one.

    Args:
        holders: the file of each tensor.
    """
    index = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), path) if path.is_dir() else path
    if not index.name.endswith(".index.json"):
        return
    weight_map = _weight_map(index)
    listed = set(weight_map)
    missing, unexpected = sorted(listed - set(holders)), sorted(set(holders) - listed)
    if missing or unexpected:
        raise ValueError(
            f"{index} does not match its files: {len(missing)} tensors are in no file {_some(missing)}, "
            f"{len(unexpected)} are not in the index {_some(unexpected)}"
        )
    elsewhere = [f"{name} is in {holders[name]}, not in {file}" for name, file in sorted(weight_map.items()) if holders[name] != file]
    if elsewhere:
        raise ValueError(f"{index} does not match its files: {_some(elsewhere)}: download it again")


def _open_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Open the tensors of a pickled file, memory-mapped. Raises ValueError if it holds anything else."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read as a file that contains only tensors, and other files are not loaded ({reason})") from None
    for wrapper in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    others = sorted(str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)) if isinstance(found, dict) else [""]
    if others:
        raise ValueError(f"{file} should contain only named tensors, but contains something else {_some(others)}")
    return dict(found)


def _some(names: list[str]) -> str:
    return f"({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
