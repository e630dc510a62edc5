"""A copy of the training state in each node's memory, for processes that are restarted on the same nodes.

Every process writes its state (weights, its share of the optimizer, generators) to a file of its own under `checkpoint.memory`, usually
in /dev/shm. This takes seconds, and uses neither the network nor a disk. Two generations alternate, so a process that dies while it writes
one still leaves the previous one. At a start, processes load the newest step that all of them have, if it is newer than the newest
checkpoint and was written by the same run in the same layout. The result is bit for bit that of a checkpoint of the same step. If a node
was replaced, its processes find no copy, and all processes load the checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_mm.config import Experiment
from megatron_mm.families.serialize import to_dict
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform import fp8_weights
from megatron_mm.training.checkpoint.load import load_chunk
from megatron_mm.training.checkpoint.state import TrainState, generator_state, restore_generators
from megatron_mm.training.spread_encoder import wrapped_modules

logger = logging.getLogger(__name__)

_GENERATIONS = ("a", "b")


class MemoryCopy:
    """This process's part of the copies. All processes must call every method together."""

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        run_dir: Path,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
    ) -> None:
        assert experiment.checkpoint.memory is not None
        self.topology, self.model, self.optimizer = topology, model, optimizer
        self.precision = experiment.train.precision
        self.made_by = _made_by(experiment, topology, run_dir)
        """Run, layout and model that a copy must come from to be loaded."""
        self.folder = _folder(experiment.checkpoint.memory, run_dir)
        self.next = 0
        self.saved_step: int | None = None

    def save(self, state: TrainState) -> None:
        """Write the state of this step over the older generation. If the memory is full, no copy is written and an error is logged."""
        began = time.monotonic()
        final = self._path(_GENERATIONS[self.next])
        content = {
            "state": json.dumps(asdict(state)),
            "made_by": self.made_by,
            "weights": [_weights(chunk.module) for chunk in wrapped_modules(self.model)],
            "optimizer": [_tensors(part) for part in _parts(self.optimizer)],
            "generators": {name: entry.data for name, entry in generator_state(self.topology).items()},
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _check_private(self.folder)
            final.unlink(missing_ok=True)
            partial = final.with_suffix(".partial")
            torch.save(content, partial)
            partial.rename(final)
        except (OSError, RuntimeError) as error:
            full = isinstance(error, RuntimeError)  # torch.save reports only an unexpected position in the file
            reason = f"not enough space ({shutil.disk_usage(self.folder).free / 1e9:.3g} GB free)" if full else error
            logger.error("rank %d: no copy of step %d in %s: %s", self.topology.rank, state.step, self.folder, reason)
            final.with_suffix(".partial").unlink(missing_ok=True)
            return
        self.next, self.saved_step = 1 - self.next, state.step
        logger.debug("copy of step %d in %s after %.2f s", state.step, self.folder, time.monotonic() - began)

    @torch.no_grad()
    def load_latest(self, *, newer_than: int) -> TrainState | None:
        """Load the newest copy that all processes have; return None if there is none, or if it is not newer than step `newer_than`."""
        found = {step: path for path in map(self._path, _GENERATIONS) if (step := self._step_of(path)) is not None}
        newest = torch.tensor(float(max(found, default=-1)), dtype=torch.float64, device=self.topology.device)
        dist.all_reduce(newest, op=dist.ReduceOp.MIN)
        step = int(newest.item())
        complete = torch.tensor(float(step in found and step > newer_than), device=self.topology.device)
        dist.all_reduce(complete, op=dist.ReduceOp.MIN)
        if not complete.item():
            return None
        content = torch.load(found[step], map_location="cpu", weights_only=True, mmap=True)
        for chunk, weights in zip(wrapped_modules(self.model), content["weights"], strict=True):
            load_chunk(chunk.module, weights)
        for part, saved in zip(_parts(self.optimizer), content["optimizer"], strict=True):
            _restore(part, saved)
        if self.precision == "fp8":
            fp8_weights.round_master_weights(self.optimizer)
        restore_generators(content["generators"])
        self.next = 1 - [self._path(name) for name in _GENERATIONS].index(found[step])
        self.saved_step = step
        return TrainState(**json.loads(content["state"]))

    def remove(self) -> None:
        """Free the memory."""
        for name in _GENERATIONS:
            self._path(name).unlink(missing_ok=True)
        dist.barrier()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, generation: str) -> Path:
        return self.folder / f"rank-{self.topology.rank:05d}-{generation}.pt"

    def _step_of(self, path: Path) -> int | None:
        """Return the step of a copy, or None if it does not exist or cannot be used."""
        if not path.is_file():
            return None
        try:
            _check_private(self.folder)
            content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            return json.loads(content["state"])["step"] if content["made_by"] == self.made_by else None
        except Exception as error:  # truncated, or from another version: the checkpoint is used instead
            logger.warning("rank %d: the copy %s cannot be used: %s", self.topology.rank, path, error)
            return None


def _folder(memory: Path, run_dir: Path) -> Path:
    """Return the folder of this run, distinct from those of other runs on the same node."""
    return memory / f"{run_dir.name}-{zlib.crc32(str(run_dir.resolve()).encode()):08x}"


def _check_private(folder: Path) -> None:
    """Raise PermissionError unless a folder is private to this user: in /dev/shm any user may create one of that name."""
    found = folder.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077 or not stat.S_ISDIR(found.st_mode):
        raise PermissionError(
            f"{folder} is not private to this user (owner {found.st_uid}, mode {found.st_mode & 0o777:o}): remove it, or choose "
            "another checkpoint.memory"
        )


def _made_by(experiment: Experiment, topology: Topology, run_dir: Path) -> str:
    layout = {"model": to_dict(experiment.model), "parallel": to_dict(experiment.parallel), "policy": experiment.train.freeze_policy}
    return json.dumps(
        {**layout, "world_size": topology.world_size, "run_dir": str(run_dir.resolve()), "v": torch.__version__}, sort_keys=True
    )


def _weights(chunk: torch.nn.Module) -> dict[str, Any]:
    return {name: fp8_weights.values_of(value) if torch.is_tensor(value) else value for name, value in chunk.state_dict().items()}


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _tensors(part: Any) -> dict[str, Any]:
    """Return the state of an optimizer on this process."""
    if not isinstance(part, DistributedOptimizer):
        return {"state": part.state_dict()}
    return {"state": part.state_dict(), "runs": [part._get_main_param_and_optimizer_states(parameter) for parameter in _parameters(part)]}


def _restore(part: Any, saved: dict[str, Any]) -> None:
    part.load_state_dict(saved["state"])  # the distributed optimizer's has no tensors; this call allocates them
    if isinstance(part, DistributedOptimizer):
        for parameter, tensors in zip(_parameters(part), saved["runs"], strict=True):
            for name, values in part._get_main_param_and_optimizer_states(parameter).items():
                values.copy_(tensors[name])


def _parameters(part: DistributedOptimizer) -> list[torch.nn.Parameter]:
    return [
        parameter for buffer in part.gbuf_ranges for buckets in buffer.values() for bucket in buckets for parameter in bucket["param_map"]
    ]
