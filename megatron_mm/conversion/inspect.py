"""Prints a checkpoint, ours or Hugging Face's, as a tree: tensors with shapes, types and norms, and the parameters of every branch.

Layers with the same shapes differ only in their norms, so they are folded: `layers.{0..31}` has one line for each tensor of a layer, with
the smallest and the largest norm. Each thread reads one tensor at a time, and a stack of experts one expert at a time.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_mm.conversion.files import TensorInfo
from megatron_mm.conversion.hf_reader import WEIGHT_FILES, HfReader
from megatron_mm.conversion.reader import CheckpointReader, is_weight
from megatron_mm.families.serialize import load_experiment
from megatron_mm.training.checkpoint import find_checkpoint

_BLOCK = 1 << 24
"""Number of values that a norm converts to float64 at once."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint of either kind."""

    title: list[str]
    infos: dict[str, TensorInfo]
    read: Callable[[str], Iterable[torch.Tensor]]
    """Reads a tensor by name, in one part or several."""
    note: str
    """Text about other tensors of the checkpoint, which are not listed."""


@dataclass(frozen=True)
class Norm:
    """2-norm of one tensor, and whether all of its values are finite."""

    value: float
    finite: bool


def inspect(path: Path, *, norms: bool = True, unfold: bool = False, threads: int = 4) -> Iterator[str]:
    """Lines for the terminal.

    Args:
        path: one of our checkpoints, a run directory (for its newest one), a Hugging Face directory or a file of weights.
        norms: read all tensors and print their norms.
        unfold: print a line for every tensor of every layer.
        threads: number of threads that read tensors.

    Raises ValueError if there is no checkpoint, or it is incomplete or damaged.
    """
    opened = _open(path)
    found: dict[str, Norm] = {}
    if norms:
        with ThreadPoolExecutor(threads) as pool:
            names = list(opened.infos)
            found = dict(zip(names, pool.map(lambda name: norm(opened.read(name)), names), strict=True))
    yield from opened.title
    yield from _tree(opened.infos, found, unfold=unfold)
    yield ""
    total, size = sum(i.numel for i in opened.infos.values()), sum(i.num_bytes for i in opened.infos.values())
    yield f"{total:,} parameters in {len(opened.infos)} tensors, {size / 1e9:.3f} GB{opened.note}"
    broken = [name for name, value in found.items() if not value.finite]
    if broken:
        yield f"NOT FINITE: {len(broken)} tensors hold infinities or NaN: {', '.join(broken)}"


def norm(parts: Iterable[torch.Tensor]) -> Norm:
    """2-norm of a tensor that is read in parts, summed in float64 block by block."""
    total = 0.0
    for part in parts:
        for block in part.flatten().split(_BLOCK):
            total += float(block.double().square().sum())
    return Norm(total**0.5, total == total and total != float("inf"))


def _open(path: Path) -> Opened:
    weights = path.is_file() or (path.is_dir() and any((path / name).is_file() for name in WEIGHT_FILES))
    return _open_hf(path) if weights else _open_ours(find_checkpoint(path))


def _open_hf(path: Path) -> Opened:
    reader = HfReader(path)
    config = reader.config() or {}
    kind = ", ".join([*config.get("architectures", []), *([config["model_type"]] if "model_type" in config else [])])
    files = reader.files[0].name if len(reader.files) == 1 else f"{len(reader.files)} files such as {reader.files[0].name}"
    return Opened([f"{path}: Hugging Face, {kind or 'no config.json'}; {files}"], reader.names(), lambda name: [reader.read(name)], "")


def _open_ours(checkpoint: Path) -> Opened:
    reader = CheckpointReader(checkpoint, verify=False)
    experiment = load_experiment(checkpoint / "experiment.json")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    parallel = experiment.parallel
    degrees = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "virtual": parallel.virtual, "expert": parallel.expert}
    layout = " ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "not split"
    everything = reader.all_names()
    others = {name: info for name, info in everything.items() if not is_weight(name)}
    weights_only = manifest.get("weights_only", False)
    title = [
        f"{checkpoint}: {experiment.recipe} ({experiment.model.family}), step {manifest['step']}, "
        + ("weights only" if weights_only else f"written by {manifest['world_size']} processes, {layout}"),
    ]
    extra = sum(info.num_bytes for info in others.values())
    note = f"; {len(others)} tensors, {extra / 1e9:.3f} GB, of optimizer and random generators" if others else ""
    return Opened(title, reader.names(), lambda name: _parts(reader, name, everything[name]), note)


def _parts(reader: CheckpointReader, name: str, info: TensorInfo) -> Iterator[torch.Tensor]:
    if len(info.shape) == 3:
        yield from (reader.read(name, row=row) for row in range(info.shape[0]))
    else:
        yield reader.read(name)


# ---------------------------------------------------------------------------------------------------------------------- tree


@dataclass
class _Branch:
    """Tensors whose names have a common prefix."""

    branches: dict[str, _Branch] = field(default_factory=dict)
    leaves: dict[str, _Leaf] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return sum(b.numel for b in self.branches.values()) + sum(leaf.numel for leaf in self.leaves.values())


@dataclass
class _Leaf:
    """A tensor, or the tensors of the same name and shape in folded layers."""

    infos: list[TensorInfo] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.infos)

    def __str__(self) -> str:
        first = self.infos[0]
        count = f"{len(self.infos)} x " if len(self.infos) > 1 else ""
        text = f"{count}{list(first.shape)} {str(first.dtype).removeprefix('torch.')}"
        if not self.norms:
            return text
        low, high = min(n.value for n in self.norms), max(n.value for n in self.norms)
        return f"{text}  norm {low:.6g}" + (f" .. {high:.6g}" if len(self.norms) > 1 else "")


def _tree(infos: dict[str, TensorInfo], norms: dict[str, Norm], *, unfold: bool) -> Iterator[str]:
    root = _Branch()
    folded = {} if unfold else _folded_names(infos)
    for name, info in infos.items():
        *path, last = folded.get(name, name).split(".")
        branch = root
        for part in path:
            branch = branch.branches.setdefault(part, _Branch())
        leaf = branch.leaves.setdefault(last, _Leaf())
        leaf.infos.append(info)
        if name in norms:
            leaf.norms.append(norms[name])
    yield from _lines(root, "")


def _lines(branch: _Branch, indent: str) -> Iterator[str]:
    for name, leaf in branch.leaves.items():
        yield f"{indent}{name}  {leaf}"
    for name, inner in branch.branches.items():
        while len(inner.branches) == 1 and not inner.leaves:  # an only branch continues on the same line
            ((part, inner),) = inner.branches.items()
            name = f"{name}.{part}"
        if not inner.branches and len(inner.leaves) == 1:
            ((part, leaf),) = inner.leaves.items()
            yield f"{indent}{name}.{part}  {leaf}"
            continue
        yield f"{indent}{name}  {inner.numel:,}"
        yield from _lines(inner, indent + "  ")


def _folded_names(infos: dict[str, TensorInfo]) -> dict[str, str]:
    """Map names to names in which the layer's number is replaced by the numbers of all layers with the same names, shapes and types."""
    layers: dict[str, dict[int, dict[str, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    for name, info in infos.items():
        if found := re.match(r"(.*?)\.(\d+)\.(.*)", name):
            layers[found[1]][int(found[2])][found[3]] = info
    folded = {}
    for prefix, numbered in layers.items():
        alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number in sorted(numbered):
            alike[tuple(sorted((rest, info.shape, str(info.dtype)) for rest, info in numbered[number].items()))].append(number)
        for numbers in alike.values():
            for number in numbers:
                folded.update({f"{prefix}.{number}.{rest}": f"{prefix}.{_label(numbers)}.{rest}" for rest in numbered[number]})
    return folded


def _label(numbers: list[int]) -> str:
    """0 for [0], {0..3} for [0, 1, 2, 3], {1,3..7} for [1, 3, 5, 7], {0,1,5} for [0, 1, 5]."""
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    if len(numbers) == 1:
        return str(numbers[0])
    if len(numbers) > 2 and steps == {1}:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    if len(numbers) > 3 and len(steps) == 1:
        return f"{{{numbers[0]},{numbers[1]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"
