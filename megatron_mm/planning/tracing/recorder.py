"""Records the memory, messages and matrix products of a process, operation by operation, for real tensors as well as for meta tensors.

A `TorchDispatchMode` sees every operation below autograd, including c10d's messages. Memory is counted by storage: a view costs nothing,
and a storage is freed when its last tensor is deleted. Therefore the recorder must not keep tensors itself: a tensor in a reference cycle
would live until the garbage collector runs, and raise every peak.

Two things need special treatment on meta tensors. Integers computed by the plan are kept as real tensors next to their meta tensors
(`_twins`), because document bounds and rows of images determine shapes. Numbers that would be read back from a device (a norm, a loss) are
replaced with ones.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork, ProcessGroup, PythonCallbackWork, Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

LARGEST_TWIN = 1 << 20
"""Number of elements of the largest integer tensor whose values are kept."""


@dataclass(frozen=True)
class MessageKey:
    """Messages that are counted together."""

    kind: str
    """c10d's name of the operation, without outer underscores: allreduce, allgather_base, send, ..."""
    group: str
    """megatron-core's description of the group."""
    size: int
    """Number of processes in the group."""
    phase: str
    part: str


@dataclass(frozen=True)
class ProductKey:
    """Matrix products and attention calls that are counted together."""

    operation: str
    shapes: tuple[tuple[int, ...], ...]
    phase: str
    part: str


@dataclass
class Volume:
    """Number and total amount of messages or products."""

    count: int = 0
    amount: float = 0.0
    """Bytes of messages (of the larger side of a gather or a scatter), or FLOPs of products."""


def _runs_on_a_device(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    views = any(alias is not None and not alias.is_write for alias in aliases)
    return not views and "empty" not in func.__name__ and func._overloadpacket is not aten._local_scalar_dense


class Recorder(TorchDispatchMode):
    """Context manager that records a run. `phase` and `part`, which are set from outside, label its operations."""

    def __init__(self, *, on_meta: bool, routed_rows: int = 0, settle: Callable[[], None] | None = None) -> None:
        """
        Args:
            on_meta: tensors have no data, and messages are not sent.
            routed_rows: rows that the experts of this process receive in a micro-batch, under balanced routing.
            settle: called after each real message, to wait until its threads have released their tensors.
        """
        super().__init__()
        self.on_meta = on_meta
        self.device_type = "meta" if on_meta else "cpu"
        self.routed_rows = routed_rows
        self.settle = settle
        self.phase, self.part = "build", "-"
        self.live = 0
        self.peak = 0
        self.peak_parts: dict[tuple[str, str], int] = {}
        self.phase_peaks: Counter[str] = Counter()
        self.timeline: list[tuple[int, int, str]] = []
        """(operations so far, live bytes, text) at the start of each phase and at peaks."""
        self.messages: dict[MessageKey, Volume] = {}
        self.products: dict[ProductKey, Volume] = {}
        self.operations = 0
        self.launches: Counter[tuple[str, str]] = Counter()
        """Number of operations that a device would run, by phase and part, without views and empty tensors."""
        self.guessed: Counter[str] = Counter()
        """Number of values that a device would have returned, by operation; ones are returned in their place."""
        self._at_peak = False
        self._parts: Counter[tuple[str, str]] = Counter()
        self._known: dict[int, tuple[Any, int, tuple[str, str]]] = {}
        self._twins = WeakTensorKeyDictionary()

    # -- phases and products

    def enter(self, phase: str, part: str = "-") -> None:
        """Begin a phase of the step."""
        if phase != self.phase:
            self.timeline.append((self.operations, self.live, phase))
        self.phase, self.part = phase, part

    def start_peak(self) -> None:
        """Reset the peak, so that it covers only what follows."""
        self.peak, self._at_peak = self.live, True
        self.phase_peaks.clear()

    def finish(self) -> None:
        """Record the peak's composition if memory is still at the peak."""
        if self._at_peak:
            self._snapshot()

    @property
    def flops(self) -> float:
        return sum(volume.amount for volume in self.products.values())

    def add_product(self, operation: str, shapes: Sequence[Sequence[int]], flops: float) -> None:
        """Count a product, for example one that is not an operation of torch."""
        key = ProductKey(operation, tuple(tuple(shape) for shape in shapes), self.phase, self.part)
        volume = self.products.setdefault(key, Volume())
        volume.count += 1
        volume.amount += flops

    # -- memory

    def _track(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        label = (self.phase, self.part)
        self._known[key] = (weakref.ref(storage, partial(self._freed, key)), size, label)
        self.live += size
        self._parts[label] += size
        self.phase_peaks[self.phase] = max(self.phase_peaks[self.phase], self.live)
        if self.live > self.peak:
            self.peak, self._at_peak = self.live, True

    def _freed(self, key: int, reference: Any) -> None:
        entry = self._known.pop(key, None)
        if entry is None:
            return
        _, size, label = entry
        if self._at_peak:
            self._snapshot()
        self.live -= size
        self._parts[label] -= size

    def _snapshot(self) -> None:
        self._at_peak = False
        self.peak_parts = {label: size for label, size in self._parts.items() if size}
        self.timeline.append((self.operations, self.peak, f"peak in {self.phase}"))

    # -- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        if _runs_on_a_device(func):
            self.launches[self.phase, self.part] += 1
        if func.namespace == "c10d":
            return self._message(func, args, kwargs)
        packet = func._overloadpacket
        out = self._without_data(packet, args, kwargs) if self.on_meta else NotImplemented
        if out is NotImplemented:
            out = func(*args, **kwargs)
            if self.on_meta:
                self._keep_values(func, args, kwargs, out)
        if packet in flop_registry:
            shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
            self.add_product(str(packet), shapes, flop_registry[packet](*args, **kwargs, out_val=out))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor)
        return out

    def _without_data(self, packet: Any, args: Any, kwargs: Any) -> Any:
        """Return a substitute for the result of an operation that needs data; NotImplemented for all other operations."""
        first = args[0] if args else None
        if not isinstance(first, torch.Tensor):
            return NotImplemented
        on_meta = first.device.type == "meta"
        if packet is aten._local_scalar_dense and on_meta:
            if first in self._twins:
                return self._twins[first].item()
            self.guessed["item"] += 1
            return True if first.dtype is torch.bool else 1.0 if first.dtype.is_floating_point else 1
        if packet is aten._to_copy and on_meta:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cpu":
                return self._to_host(first, kwargs.get("dtype") or first.dtype)
        if packet is aten.copy_ and not on_meta and args[1].device.type == "meta":
            return first.copy_(self._to_host(args[1], first.dtype))
        if packet in (aten.masked_select, aten.nonzero) and on_meta and first not in self._twins:
            self.guessed[str(packet)] += 1
            if packet is aten.masked_select:
                return torch.empty((self.routed_rows,), dtype=first.dtype, device="meta")
            return torch.empty((self.routed_rows, first.dim()), dtype=torch.int64, device="meta")
        if packet is aten.equal and on_meta:
            return True
        return NotImplemented

    def _to_host(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if tensor in self._twins:
            return self._twins[tensor].to(dtype)
        self.guessed["copy to the host"] += 1
        return torch.ones(tensor.shape, dtype=dtype)

    def _keep_values(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Keep real values for a small integer tensor on meta, if all of its inputs have them."""
        made = out if isinstance(out, tuple | list) else (out,)
        if not any(_small_integers(tensor) for tensor in made):
            return
        found = _tensors(args)
        if not found or not all(x.device.type == "cpu" or x in self._twins for x in found):
            return
        real = [self._twins.get(x, x) for x in found]
        if func._overloadpacket is aten._to_copy:
            values = real[0].to(made[0].dtype)
        else:
            settings = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
            values = func(*_replaced(args, iter(real)), **settings)
        for tensor, value in zip(made, values if isinstance(values, tuple | list) else (values,), strict=True):
            if _small_integers(tensor):
                self._twins[tensor] = value

    # -- messages

    def _message(self, func: Any, args: Any, kwargs: Any) -> Any:
        group = _group(args)
        tensors = _tensors(args)
        sides = [sum(t.numel() * t.element_size() for t in _tensors(side)) for side in args[:2]]
        kind = func._schema.name.split("::")[1].strip("_")
        described = getattr(group, "group_desc", "") or ""
        size = group.size() if group is not None else 0
        volume = self.messages.setdefault(MessageKey(kind, described, size, self.phase, self.part), Volume())
        volume.count += 1
        volume.amount += max(sides, default=0)
        for tensor in tensors:
            self._track(tensor)
        if not self.on_meta:
            out = func(*args, **kwargs)
            if self.settle is not None:
                if kind not in ("send", "recv"):
                    Work.unbox(out[-1] if isinstance(out, tuple) else out).wait()
                self.settle()
            return out
        # Like a real message, this one keeps its tensors until its handle is deleted.
        held = list(tensors)
        work = Work.boxed(PythonCallbackWork(partial(_done, held)) if held else FakeWork())
        return (args[0], work) if len(func._schema.returns) == 2 else work


def _done(held: list[torch.Tensor], timeout: Any) -> bool:
    return True


def _small_integers(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "meta"
        and not value.dtype.is_floating_point
        and not value.dtype.is_complex
        and value.numel() <= LARGEST_TWIN
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []


def _replaced(value: Any, real: Any) -> Any:
    """Replace the tensors in arguments with tensors from an iterator, in the order of `_tensors`."""
    if isinstance(value, torch.Tensor):
        return next(real)
    if isinstance(value, list | tuple):
        return type(value)(_replaced(entry, real) for entry in value)
    return value


def _group(args: Any) -> Any:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(argument)
            except RuntimeError:
                continue
    return None
