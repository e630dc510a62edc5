"""Name mappings between our checkpoints and Hugging Face's, as tables.

A table is a list of entries; each maps one of our tensors to one or more of theirs. A name may contain placeholders such as `{layer}`,
which `expand` replaces with 0, 1, 2, ... Every entry works in both directions, without rounding or loss.

    Direct("language.decoder.final_layernorm.weight", "language_model.norm.weight")
    GatedMLP("language.decoder.layers.{layer}.mlp.linear_fc1.weight", gate="...gate_proj.weight", up="...up_proj.weight")
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self

import torch
import torch.nn.functional as F


class Entry(Protocol):
    """Maps one of our tensors to the Hugging Face tensors with the same values."""

    @property
    def ours(self) -> str: ...

    @property
    def hf(self) -> tuple[str, ...]: ...

    @property
    def row(self) -> int | None:
        """Index in a stack, such as the number of an expert; None if the tensor is not part of a stack."""
        ...

    def renamed(self, rename: Mapping[str, int]) -> Entry:
        """Return the entry with placeholders in its names replaced by values."""
        ...

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Our tensor -> Hugging Face tensors, in the order of `hf`. Raises ValueError if its shape does not fit."""
        ...

    def from_hf(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Hugging Face tensors, in the order of `hf` -> our tensor. Raises ValueError if shapes do not fit."""
        ...


@dataclass(frozen=True)
class _OneToOne:
    """An entry with a single Hugging Face tensor."""

    row: ClassVar[None] = None
    ours: str
    theirs: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.theirs,)

    def renamed(self, rename: Mapping[str, int]) -> Self:
        return replace(self, ours=_put(self.ours, rename), theirs=_put(self.theirs, rename))


@dataclass(frozen=True)
class Direct(_OneToOne):
    """The same tensor under another name."""

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (tensor,)

    def from_hf(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return tensors[0]


@dataclass(frozen=True)
class QKV:
    """Queries, keys and values in one matrix (or bias) whose rows are grouped by key/value head.

    Worked example: 4 query heads, 2 key/value heads. Our rows, in blocks of head_dim, are q0 q1 k0 v0 q2 q3 k1 v1. A tensor-parallel
    process with the first half has all rows that belong to the first key/value head.
    """

    row: ClassVar[None] = None
    ours: str
    q: str
    k: str
    v: str
    num_heads: int
    num_groups: int
    head_dim: int

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v)

    def renamed(self, rename: Mapping[str, int]) -> QKV:
        names = {field: _put(getattr(self, field), rename) for field in ("ours", "q", "k", "v")}
        return replace(self, **names)  # type: ignore[arg-type]

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = (self.num_heads + 2 * self.num_groups) * self.head_dim
        _check_rows(self.ours, tensor, rows, f"{self.num_heads} query and {self.num_groups} key/value heads of {self.head_dim}")
        grouped = tensor.unflatten(0, (self.num_groups, self.num_heads // self.num_groups + 2, self.head_dim))
        return tuple(part.flatten(0, 2) for part in (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]))

    def from_hf(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        rows = (self.num_heads * self.head_dim, self.num_groups * self.head_dim, self.num_groups * self.head_dim)
        for name, tensor, count in zip(self.hf, tensors, rows, strict=True):
            _check_rows(name, tensor, count, f"heads of {self.head_dim}")
        return torch.cat([t.unflatten(0, (self.num_groups, -1, self.head_dim)) for t in tensors], dim=1).flatten(0, 2)


@dataclass(frozen=True)
class GatedMLP:
    """The two branches of a gated MLP in one matrix: the gate's rows, then the other branch's."""

    row: ClassVar[None] = None
    ours: str
    gate: str
    up: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def renamed(self, rename: Mapping[str, int]) -> GatedMLP:
        return GatedMLP(_put(self.ours, rename), _put(self.gate, rename), _put(self.up, rename))

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if tensor.shape[0] % 2:
            raise ValueError(
                f"{self.ours} has {tensor.shape[0]} rows, but must have an even number: half for the gate, half for the other branch"
            )
        return tuple(tensor.chunk(2))

    def from_hf(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        gate, up = tensors
        if gate.shape != up.shape:
            raise ValueError(f"{self.gate} has shape {tuple(gate.shape)}, but {self.up} has {tuple(up.shape)}: they must be equal")
        return torch.cat([gate, up])


@dataclass(frozen=True)
class StackedQKV(_OneToOne):
    """Queries, keys and values in one matrix (or bias) on both sides. Theirs has all queries, then all keys, then all values."""

    num_heads: int
    head_dim: int

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.cat(self._heads(self.ours).to_hf(tensor)),)

    def from_hf(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (stacked,) = tensors
        _check_rows(self.theirs, stacked, 3 * self.num_heads * self.head_dim, f"3 x {self.num_heads} heads of {self.head_dim}")
        return self._heads(self.theirs).from_hf(stacked.chunk(3))

    def _heads(self, name: str) -> QKV:
        return QKV(name, name, name, name, num_heads=self.num_heads, num_groups=self.num_heads, head_dim=self.head_dim)


@dataclass(frozen=True)
class StackedKV(_OneToOne):
    """Keys and values in one matrix on both sides. Theirs has all keys, then all values; ours has each head's key, then its value.

    Worked example with 2 heads: theirs, in blocks of head_dim, is k0 k1 v0 v1; ours is k0 v0 k1 v1.
    """

    num_heads: int
    head_dim: int

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _check_rows(self.ours, tensor, 2 * self.num_heads * self.head_dim, f"2 x {self.num_heads} heads of {self.head_dim}")
        return (tensor.unflatten(0, (self.num_heads, 2, self.head_dim)).transpose(0, 1).flatten(0, 2),)

    def from_hf(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (stacked,) = tensors
        _check_rows(self.theirs, stacked, 2 * self.num_heads * self.head_dim, f"2 x {self.num_heads} heads of {self.head_dim}")
        return stacked.unflatten(0, (2, self.num_heads, self.head_dim)).transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True)
class Wrapped(_OneToOne):
    """The same tensor; theirs has additional leading axes of length 1."""

    axes: int = 1

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (tensor[(None,) * self.axes],)

    def from_hf(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return _unwrapped(self.theirs, tensors[0], axes=self.axes)


@dataclass(frozen=True)
class Positions(_OneToOne):
    """Learned positions of an image tower: one row per patch, row by row of the image, after the class token's row if there is one.

    If the number of rows differs, positions are interpolated to our resolution: each channel is an image of grid x grid values, resized
    bicubically as in transformers, with antialiasing if the grid shrinks. The class token's row does not change.
    """

    num_patches: int
    class_token: bool = True
    axes: int = 0
    """Number of leading axes of length 1 on their side."""

    @property
    def num_rows(self) -> int:
        """Number of rows of our table."""
        return self.num_patches + self.class_token

    def describe(self, rows: int) -> str:
        """Line for the log about the interpolation of a table with this many rows."""
        there, here = (math.isqrt(count - self.class_token) for count in (rows, self.num_rows))
        return f"{self.ours}: positions of {there} x {there} patches are interpolated to {here} x {here} (bicubic)"

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (tensor[(None,) * self.axes],)

    def from_hf(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        positions = _unwrapped(self.theirs, tensors[0], axes=self.axes)
        first = int(self.class_token)
        there, here = math.isqrt(positions.shape[0] - first), math.isqrt(self.num_patches)
        if positions.shape[0] == self.num_patches + first:
            return positions
        if there**2 + first != positions.shape[0] or here**2 != self.num_patches:
            raise ValueError(
                f"{self.theirs} has {positions.shape[0]} rows, which is not a square grid{' and a class token' if first else ''}"
            )
        grid = positions[first:].float().unflatten(0, (there, there)).permute(2, 0, 1)[None]
        resized = F.interpolate(grid, size=(here, here), mode="bicubic", align_corners=False, antialias=here < there)
        return torch.cat([positions[:first], resized[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)])


@dataclass(frozen=True)
class Vocabulary(_OneToOne):
    """An embedding table or an output layer: one row per token.

    If a table that is read has fewer rows than ours, the missing ones become the mean of the others (in float32). A token that the model
    has never seen then starts near the known tokens and takes little probability from them. Padding rows at the end need not be written.
    """

    rows: int
    """Number of rows of our table."""
    written_rows: int
    """Number of rows that are written, at most `rows`."""

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _check_rows(self.ours, tensor, self.rows, "the tokens of the vocabulary")
        return (tensor[: self.written_rows],)

    def from_hf(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (table,) = tensors
        missing = self.rows - table.shape[0]
        if missing < 0:
            raise ValueError(
                f"{self.theirs} has {table.shape[0]} rows, but the model has only {self.rows}: "
                f"use --model.decoder.vocab-size {table.shape[0]} or more"
            )
        if missing == 0:
            return table
        mean = table.mean(dim=0, dtype=torch.float32, keepdim=True).to(table.dtype)
        return torch.cat([table, mean.expand(missing, -1)])


@dataclass(frozen=True)
class Row:
    """One tensor of a stack: applies `entry` to tensor[row] only, so that experts are converted one at a time."""

    entry: Entry
    row: int

    @property
    def ours(self) -> str:
        return self.entry.ours

    @property
    def hf(self) -> tuple[str, ...]:
        return self.entry.hf

    def renamed(self, rename: Mapping[str, int]) -> Row:
        return replace(self, entry=self.entry.renamed(rename))

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.entry.to_hf(tensor)

    def from_hf(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.entry.from_hf(tensors)


def stack(entries: Iterable[Entry], *, placeholder: str, count: int) -> list[Entry]:
    """Repeat the entries for every row 0 .. count - 1 of a stack, with `{placeholder}` in names replaced by the row."""
    return [Row(entry.renamed({placeholder: row}), row) for row in range(count) for entry in entries]


def both(ours: str, theirs: str) -> list[Entry]:
    """Entries for a module that has a weight and a bias under another name."""
    return [Direct(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def expand(table: Iterable[Entry], *, placeholder: str, count: int) -> list[Entry]:
    """Repeat the entries that contain `{placeholder}`, replaced by 0 .. count - 1.

    Neighbouring entries with the placeholder are repeated together, so that the tensors of a layer stay together.
    """
    entries: list[Entry] = []
    for repeated, group in itertools.groupby(table, key=lambda entry: f"{{{placeholder}}}" in entry.ours):
        members = list(group)
        entries += [entry.renamed({placeholder: i}) for i in range(count) for entry in members] if repeated else members
    return entries


def check_names(expected: Iterable[str], present: Iterable[str], *, where: str) -> None:
    """Raise ValueError that lists missing and unknown names, if there are any."""
    wanted, found = set(expected), set(present)
    missing, unexpected = sorted(wanted - found), sorted(found - wanted)
    if missing or unexpected:
        raise ValueError(
            f"{where} does not contain this model: {len(missing)} tensors are missing {_some(missing)}, "
            f"{len(unexpected)} are unknown {_some(unexpected)}"
        )


def from_hf(entries: Iterable[Entry], tensors: Mapping[str, torch.Tensor], *, where: str = "checkpoint") -> dict[str, torch.Tensor]:
    """Hugging Face tensors -> ours. Raises ValueError for missing or unknown names and for shapes that do not fit."""
    entries = list(entries)
    check_names((name for entry in entries for name in entry.hf), tensors, where=where)
    found: dict[str, list[torch.Tensor]] = {}
    stacked = {entry.ours for entry in entries if entry.row is not None}
    for entry in sorted(entries, key=lambda entry: entry.row or 0):
        found.setdefault(entry.ours, []).append(entry.from_hf(tuple(tensors[name] for name in entry.hf)))
    return {name: torch.stack(parts) if name in stacked else parts[0] for name, parts in found.items()}


def to_hf(entries: Iterable[Entry], tensors: Mapping[str, torch.Tensor], *, where: str = "checkpoint") -> dict[str, torch.Tensor]:
    """Our tensors -> Hugging Face tensors. Raises ValueError for missing or unknown names and for shapes that do not fit."""
    entries = list(entries)
    check_names((entry.ours for entry in entries), tensors, where=where)
    return {
        name: tensor
        for entry in entries
        for name, tensor in zip(
            entry.hf, entry.to_hf(tensors[entry.ours] if entry.row is None else tensors[entry.ours][entry.row]), strict=True
        )
    }


def _put(name: str, rename: Mapping[str, int]) -> str:
    for placeholder, value in rename.items():
        name = name.replace(f"{{{placeholder}}}", str(value))
    return name


def _check_rows(name: str, tensor: torch.Tensor, rows: int, meaning: str) -> None:
    if tensor.shape[0] != rows:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, but {meaning} make {rows}: the configuration belongs to a different model")


def _unwrapped(name: str, wrapped: torch.Tensor, *, axes: int) -> torch.Tensor:
    if wrapped.ndim <= axes or any(size != 1 for size in wrapped.shape[:axes]):
        raise ValueError(f"{name} has shape {tuple(wrapped.shape)}, but must begin with {axes} axes of length 1")
    return wrapped.flatten(0, axes) if axes else wrapped


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"({shown}{', ...' if len(names) > 8 else ''})" if names else "()"
