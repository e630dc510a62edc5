"""Traces the start of a run, as one process among any number, with the real code from checking the experiment to the first batch.

Process groups are fake, and weights are on the meta device, because a stage of a large model does not fit on a CPU. Everything else is
real: the data set, its plan, reading and decoding, the run directory. Seconds are those of this machine. Counts of opened files, calls of
stat, messages and their bytes, and process groups show whether the cost of a start grows with the number of processes.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

from megatron_mm.config import Experiment
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import STATE_METADATA, draw, initial_value
from megatron_mm.planning import watch
from megatron_mm.planning.hardware import GPUS
from megatron_mm.planning.tracing.recorder import Recorder
from megatron_mm.planning.tracing.world import META, answer_without_data, stand_in_world
from megatron_mm.run import start as starts
from megatron_mm.run.start_times import StartTimes
from megatron_mm.training import build

_DRAWN = 1 << 24
"""Number of random numbers that are drawn to measure the rate of drawing."""


@dataclass
class Counts:
    """Accesses of a process to the file system, and its messages."""

    opened: int = 0
    """Number of files opened, without Python's own."""
    asked: int = 0
    """Number of calls of stat and of listed folders, without Python's own."""
    groups: int = 0
    """Number of process groups of which this process is a member."""
    messages: int = 0
    """Number of collective operations in which this process took part."""
    received: int = 0
    """Bytes received in them."""

    def since(self, before: Counts) -> Counts:
        """Return the difference from earlier counts."""
        return Counts(**{name: value - getattr(before, name) for name, value in asdict(self).items()})


@dataclass
class StartTrace:
    """The start of one process."""

    rank: int
    world_size: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time, by part."""
    processor_seconds: dict[str, float] = field(default_factory=dict)
    """CPU time of all threads of the process, by part."""
    counts: dict[str, Counts] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """Number of times that each file was opened."""
    drawn: int = 0
    """Number of random numbers that would be drawn for initial weights."""
    drawn_a_second: float = 0.0
    """Random numbers that one thread draws in a second on this machine's processor."""


class Watch(StartTimes):
    """Times the parts of the start and counts in each of them."""

    def __init__(self, trace: StartTrace, recorder: Recorder) -> None:
        self.trace = trace
        self.recorder = recorder
        self.counts = Counts()
        self.files: Counter[str] = Counter()
        self._before = Counts()
        self._processor = time.process_time()
        super().__init__(launched=False)

    def lap(self, part: str) -> None:
        super().lap(part)
        for volume in self.recorder.messages.values():
            self._message(round(volume.amount), number=volume.count)
        self.recorder.messages.clear()
        trace, processor = self.trace, time.process_time()
        trace.seconds = self.seconds
        trace.processor_seconds[part] = trace.processor_seconds.get(part, 0.0) + processor - self._processor
        trace.counts[part] = self.counts.since(self._before)
        self._before, self._processor = Counts(**asdict(self.counts)), processor

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count file accesses and messages of this process inside the context."""
        sys.addaudithook(self._audit)
        new_group = dist.new_group

        def fake_group(*args: Any, **kwargs: Any) -> Any:
            group = new_group(*args, **{**kwargs, "backend": "fake"})
            self.counts.groups += group is not dist.GroupMember.NON_GROUP_MEMBER
            return group

        def broadcast_objects(values: list[Any], src: int = 0, group: Any = None, **options: Any) -> None:
            self._message(len(pickle.dumps(values)))  # a fake group sends nothing: each process keeps its own values

        def gather_objects(out: list[Any], value: Any, group: Any = None) -> None:
            self._message(len(pickle.dumps(value)) * len(out))
            out[:] = [value] * len(out)

        with contextlib.ExitStack() as stack:
            for module, name, stand_in in (
                (os, "stat", self._asking(os.stat)),
                (os, "lstat", self._asking(os.lstat)),
                (dist, "new_group", fake_group),
                (dist, "broadcast_object_list", broadcast_objects),
                (dist, "all_gather_object", gather_objects),
            ):
                stack.enter_context(patch.object(module, name, stand_in))
            yield

    def _message(self, size: int, *, number: int = 1) -> None:
        self.counts.messages += number
        self.counts.received += size

    def _asking(self, function: Any) -> Any:
        def ask(path: Any, *args: Any, **kwargs: Any) -> Any:
            self.counts.asked += not (isinstance(path, str | bytes | os.PathLike) and _is_pythons(os.fsdecode(path)))
            return function(path, *args, **kwargs)

        return ask

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.listdir", "os.scandir"):
            self.counts.asked += not (isinstance(arguments[0], str) and _is_pythons(arguments[0]))
        elif event == "open" and isinstance(arguments[0], str | bytes) and not _is_pythons(os.fsdecode(arguments[0])):
            self.counts.opened += 1
            self.files[os.fsdecode(arguments[0])] += 1


def _is_pythons(path: str) -> bool:
    return path.startswith((sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev")) or path.endswith((".py", ".pyc"))


def trace_start(experiment: Experiment, run_dir: Path, *, rank: int, world_size: int) -> StartTrace:
    """Start as the given rank, up to the first batch. This changes modules of the calling process permanently, so call it in a separate
    process.

    Raises any error that the start raises.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank % 8))
    trace = StartTrace(rank, world_size)
    recorder = Recorder(on_meta=True)
    watched = Watch(trace, recorder)
    with watched.counting():
        checked = starts.check(experiment, run_dir)
        watched.lap("data opened and checked")
        experiment = checked.experiment
        watch.predict(experiment, world_size=world_size, gpu=GPUS["h100-sxm"], plan=checked.plan)
        watched.lap("predicted memory")
        topology = stand_in_world(experiment, rank=rank, world_size=world_size)
        watched.lap("process groups")
        answer_without_data(experiment, recorder)
        build.initialize_weights = lambda chunks, *, seed: setattr(trace, "drawn", numbers_drawn(chunks))
        with patch.object(topologies, "local_device", lambda: META), recorder:
            trainer = starts.assemble(checked, run_dir, times=watched)
            next(trainer.data)
        watched.lap("first plan and batch")
    trainer.data.close()
    trace.files = dict(watched.files)
    assert topology.world_size == world_size
    began = time.thread_time()
    draw("a matrix", (_DRAWN,), std=0.01, seed=0)
    trace.drawn_a_second = _DRAWN / (time.thread_time() - began)
    return trace


def numbers_drawn(chunks: list[Any]) -> int:
    """Count the random numbers that `parallel.initial_weights` draws for chunks, which are those of whole parameters."""
    drawn = 0
    for chunk in chunks:
        for entry in nested_values(chunk.sharded_state_dict(metadata=dict(STATE_METADATA))):
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or not isinstance(entry.data, torch.nn.Parameter):
                continue
            if initial_value(entry.key, entry.data).constant is None:
                pieces = {"piece": entry}
                apply_factories(pieces)
                stacked = [(piece, piece.prepend_axis_num) for piece in nested_values(pieces)]
                whole = {(piece.key, piece.global_offset[:axes]): math.prod(piece.global_shape[axes:]) for piece, axes in stacked}
                drawn += sum(whole.values())
    return drawn
