"""Verifies that a checkpoint is what was written: sizes and checksums of its files, and pickles that refer only to tensors."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.parallel.topology import Topology
from megatron_mm.platform.files import checksum_of, sync_to_disk
from megatron_mm.training.checkpoint.names import MANIFEST, TENSORS
from megatron_mm.training.safe_pickle import check_pickles

ADVICE = ": restore it or remove"
"""Start of the advice that follows the description of the damage in an error; left out where another checkpoint can be used."""


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint: its step, the number of processes that wrote it, and `files`, name -> [size in bytes, CRC-32].

    Raises ValueError if the file is not a valid manifest, OSError if it cannot be read.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        for name in [*manifest["files"], *manifest.get("descriptions", {})]:
            if PurePosixPath(name).name != name:  # fetching a copy writes to these names
                raise ValueError(f"checkpoint file {path} names the file {name}, which is outside its folder: remove {checkpoint}")
        if isinstance(manifest["files"], dict):
            return manifest
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"checkpoint file {path} is not the JSON that this program writes: restore it or remove {checkpoint}")


def verify(checkpoint: Path, topology: Topology) -> None:
    """Check a checkpoint's sizes, checksums and pickles. Called by all processes together: each checks its share of the files, and the
    main process the pickles.

    Raises ValueError on all processes, naming the damaged or unreadable file.
    """
    problem = ""
    try:
        _check_share(checkpoint, topology)
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = f"checkpoint {checkpoint} cannot be read by process {topology.rank} ({error}): restore it or remove it"
    agree(problem, world_size=topology.world_size, device=topology.device)


def agree(problem: str, *, world_size: int, device: torch.device) -> None:
    """Raise ValueError on all processes if any of them has a problem (a non-empty text). Called by all processes together."""
    any_problem = torch.tensor(float(bool(problem)), device=device)
    dist.all_reduce(any_problem, op=dist.ReduceOp.MAX)
    if not any_problem.item():
        return  # the usual case: no message grows with the number of processes
    problems: list[str] = [""] * world_size
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found:
            raise ValueError(found)


def _check_share(checkpoint: Path, topology: Topology) -> None:
    files = read_manifest(checkpoint)["files"]
    for name, (size, checksum) in sorted(files.items())[topology.rank :: topology.world_size]:
        path = checkpoint / TENSORS / name
        if not path.is_file():
            raise ValueError(f"checkpoint file {path} is missing: restore it or remove {checkpoint}")
        found = path.stat().st_size
        if found != size:
            raise ValueError(f"checkpoint file {path} is {found} bytes long, expected {size}: restore it or remove {checkpoint}")
        if (summed := checksum_of(path)) != checksum:
            raise ValueError(
                f"checkpoint file {path} is damaged (its CRC-32 is {summed:08x}, expected {checksum:08x}): "
                f"restore it or remove {checkpoint}"
            )
    if topology.is_main:
        check_descriptions(checkpoint)
        check_pickles(checkpoint / TENSORS)


def check_descriptions(checkpoint: Path) -> None:
    """Check a checkpoint's manifest and the description files next to its tensors.

    Raises ValueError, naming the damaged file, or OSError if one cannot be read.
    """
    for name, (size, checksum) in read_manifest(checkpoint).get("descriptions", {}).items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"checkpoint file {path} is missing: restore it or remove {checkpoint}")
        found, summed = path.stat().st_size, checksum_of(path)
        if (found, summed) != (size, checksum):
            raise ValueError(
                f"checkpoint file {path} is damaged ({found} bytes with CRC-32 {summed:08x}, expected {size} with {checksum:08x}): "
                f"restore it or remove {checkpoint}"
            )


def sum_descriptions(partial: Path) -> dict[str, list[int]]:
    """Flush the files next to a checkpoint's tensors to disk, and return their sizes and CRC-32s."""
    sums = {}
    for path in sorted(partial.iterdir()):
        if path.is_file():
            sums[path.name] = [path.stat().st_size, checksum_of(path)]
            sync_to_disk(path)
    return sums


def write_checksums(partial: Path, *, rank: int) -> None:
    """Flush the files that process `rank` has written to disk, and write their sizes and CRC-32s to a file."""
    sums = {}
    for path in sorted((partial / TENSORS).glob(f"__{rank}_*.distcp")):
        sums[path.name] = [path.stat().st_size, checksum_of(path)]
        sync_to_disk(path)
    (partial / f"checksums.{rank}.json").write_text(json.dumps(sums))


def merge_checksums(tensors: Path) -> dict[str, list[int]]:
    """Return size and CRC-32 of every file, and remove the processes' checksum files.

    Raises RuntimeError if a process wrote tensor files but no checksums, because it died.
    """
    sums: dict[str, list[int]] = {}
    for path in sorted(tensors.parent.glob("checksums.*.json")):
        sums.update(json.loads(path.read_text()))
        path.unlink()
    for path in sorted(tensors.iterdir()):
        if path.name not in sums:
            if path.suffix == ".distcp":
                raise RuntimeError(f"checkpoint file {path} has no checksum: the process that wrote it died")
            sums[path.name] = [path.stat().st_size, checksum_of(path)]
            sync_to_disk(path)
    return sums
