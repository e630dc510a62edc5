"""The two pickles of a distributed checkpoint, checked before megatron-core loads them.

torch's distributed checkpoint describes its tensors in a pickle (`.metadata`), and megatron-core writes everything that is not a tensor to
another one (`common.pt`, or from 0.19 on a part of a tensor file). A pickle can call any object that it names; these may only name the
types that such a description consists of. The check unpickles into inert objects, so not even an allowed type is instantiated.

Then the contents of the description are checked. torch would unpickle any further entry that is not a tensor when reading it, and would
read tensors from a file outside the folder if the description names one: this program writes neither.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mm.platform.common_state import ENTRY

_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"}
_STORAGES = {"FloatStorage", "BFloat16Storage", "HalfStorage", "DoubleStorage", "LongStorage", "IntStorage", "ByteStorage", "BoolStorage"}

_ALLOWED: dict[str, set[str]] = {
    "builtins": {"list", "dict", "set", "tuple", "int", "float", "bool", "str", "slice", "bytearray"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},  # as Python 3.13 writes them
    "torch": {"Size", "device", "strided", *_DTYPES, *_STORAGES},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MEM_FORMAT_ENCODING",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata"},
    "megatron.core.enums": {"ModelType"},
    "_codecs": {"encode"},
}
"""Objects that a checkpoint's pickles may name, by module."""


def check_pickles(folder: Path) -> None:
    """Raise ValueError if a pickle under `folder` names an object that is not allowed, naming the file and the object."""
    described = (folder / ".metadata").read_bytes()
    _check(folder / ".metadata", described)
    _check_description(folder / ".metadata", described)
    common = folder / "common.pt"
    if common.is_file():
        _check_saved(common, common.read_bytes())


def _check_saved(path: Path, saved: bytes) -> None:
    """Check the pickles in the output of torch.save, which is a file or a part of one. As torch requires, it must begin as an archive."""
    try:
        if not saved.startswith(b"PK\x03\x04"):
            raise zipfile.BadZipFile("it is not an archive")
        with zipfile.ZipFile(io.BytesIO(saved)) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # what zipfile raises
        raise ValueError(f"checkpoint file {path} is damaged ({error}): restore it or remove the checkpoint") from None
    for content in pickles:
        _check(path, content)


def _check_description(path: Path, data: bytes) -> None:
    """Check that a description, whose names are allowed, lists only tensors in files of its folder, and the one pickle checked here."""
    metadata = pickle.loads(data)
    if type(metadata) is not Metadata or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"checkpoint file {path} describes no tensors: restore it or remove the checkpoint")
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry) is not TensorStorageMetadata and name != ENTRY:
            raise ValueError(
                f"checkpoint file {path} says that {name} is a pickle, not a tensor. Loading it would run code, and this program did not "
                "write it: remove it"
            )
    for index, info in metadata.storage_data.items():
        if PurePosixPath(info.relative_path).name != info.relative_path:
            raise ValueError(f"checkpoint file {path} names the file {info.relative_path}, which is outside its folder: remove it")
        if getattr(info, "transform_descriptors", None):  # the data after a transformation would not be the data checked here
            raise ValueError(
                f"checkpoint file {path} says that {index.fqn} must be transformed; this program did not write that: remove it"
            )
        if index.fqn == ENTRY:
            holder = path.parent / info.relative_path
            if not holder.is_file():  # its size and checksum may be another process's share
                raise ValueError(f"checkpoint file {holder} is missing: restore it or remove the checkpoint")
            with holder.open("rb") as file:
                file.seek(info.offset)
                _check_saved(holder, file.read(info.length))


def _check(path: Path, data: bytes) -> None:
    try:
        _NamesOnly(io.BytesIO(data)).load()
    except _Forbidden as error:
        raise ValueError(
            f"checkpoint file {path} names {error}. Loading it would run that, and this program did not write it: remove it"
        ) from None
    except Exception as error:
        raise ValueError(
            f"checkpoint file {path} is damaged ({type(error).__name__}: {error}): restore it or remove the checkpoint"
        ) from error


class _Forbidden(Exception):
    pass


class _Inert:
    """Replaces any object: accepts every argument, state and item, and ignores them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class _NamesOnly(pickle.Unpickler):
    """An unpickler that checks the names of objects and creates none of them."""

    def find_class(self, module: str, name: str) -> type:
        if name not in _ALLOWED.get(module, set()):
            raise _Forbidden(f"{module}.{name}")
        return _Inert

    def persistent_load(self, pid: Any) -> _Inert:
        return _Inert()
