"""The start of a run, as one process among any number of processes: the real code, from checking the experiment to the first batch.

Process groups are fake, and weights are on the meta device, because a stage of a large model does not fit on a CPU. Everything else is
real: the data set, its plan, reading and decoding, the run directory. Seconds are those of this machine. Counts show whether the cost of a
start grows with the number of processes: files opened, calls of stat, messages between processes and their bytes, process groups.
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
"""Numbers that are drawn to find out how many are drawn in a second."""


@dataclass
class Counts:
    """What a process has asked of the file system and of other processes."""

    opened: int = 0
    """Files that were opened for reading, Python's own apart."""
    asked: int = 0
    """How often the status of a file was asked for, or a folder listed, Python's own apart."""
    groups: int = 0
    """Process groups that this process is a member of."""
    messages: int = 0
    """Collective operations that this process took part in."""
    received: int = 0
    """Bytes that they brought."""

    def since(self, before: Counts) -> Counts:
        """What was counted since `before`."""
        return Counts(**{name: value - getattr(before, name) for name, value in asdict(self).items()})


@dataclass
class StartTrace:
    """The start of one process."""

    rank: int
    world_size: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the clock, by part."""
    processor_seconds: dict[str, float] = field(default_factory=dict)
    """Of all threads of the process, by part."""
    counts: dict[str, Counts] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """How often each file was opened."""
    drawn: int = 0
    """Numbers that initial weights would be drawn from."""
    drawn_a_second: float = 0.0
    """On this machine's processor, by one thread."""


class Watch(StartTimes):
    """Laps of the start, with what was counted in each."""

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
        """Inside, what this process asks of the file system and of others is counted."""
        sys.addaudithook(self._audit)
        new_group = dist.new_group

        def fake_group(*args: Any, **kwargs: Any) -> Any:
            group = new_group(*args, **{**kwargs, "backend": "fake"})
            self.counts.groups += group is not dist.GroupMember.NON_GROUP_MEMBER
            return group

        def broadcast_objects(values: list[Any], src: int = 0, group: Any = None, **options: Any) -> None:
            self._message(len(pickle.dumps(values)))  # the fake group brings nothing: each process keeps its own

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
    """Start as that process, up to the first batch. Changes modules of this process for good: call it in one of its own.

    Raises what the start raises.
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
    """Random numbers that `parallel.initial_weights` draws for these chunks: whole parameters, of which a process keeps its part."""
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
