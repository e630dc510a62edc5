"""Saves and loads a run's checkpoints: asynchronous, complete or absent."""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_mm.config import CheckpointConfig, Experiment
from megatron_mm.families.serialize import save_experiment
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform import adam, engine
from megatron_mm.platform.files import sync_to_disk
from megatron_mm.training.checkpoint import integrity
from megatron_mm.training.checkpoint.compatible import check_same_model, same_layout
from megatron_mm.training.checkpoint.fallback import newest_whole_checkpoint
from megatron_mm.training.checkpoint.integrity import merge_checksums, read_manifest, verify
from megatron_mm.training.checkpoint.load import load_chunk, load_strategy
from megatron_mm.training.checkpoint.names import MANIFEST, TENSORS, completed_checkpoints
from megatron_mm.training.checkpoint.optimizer_state import load_optimizer_state
from megatron_mm.training.checkpoint.state import TrainState, restore_generators, run_state
from megatron_mm.training.spread_encoder import wrapped_modules

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and loads one run's checkpoints; every method is called by all processes together."""

    def __init__(
        self, experiment: Experiment, topology: Topology, run_dir: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer
    ) -> None:
        self.experiment = experiment
        self.config: CheckpointConfig = experiment.checkpoint
        self.topology = topology
        self.folder = run_dir / "checkpoints"
        self.model = model
        self.optimizer = optimizer
        self.queue = AsyncCallsQueue(persistent=False)
        self.started_at: float | None = None
        self.saved_step: int | None = None
        if topology.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in [*self.folder.glob(".partial-*"), *self.folder.glob(".removed-*")]:
                logger.warning("removing %s, left behind by a run that was stopped while it saved", stale.name)
                shutil.rmtree(stale, ignore_errors=True)
        dist.barrier()

    # ------------------------------------------------------------------------------------------------------------- save

    def save(self, state: TrainState) -> None:
        """Begin to save; `poll` finishes an asynchronous save. A save that is still under way is waited for first."""
        self.finish()
        if self.saved_step == state.step:
            return
        step, partial = state.step, self._fresh_directory(state)  # the state moves on while the files are written
        async_request = dist_checkpointing.save(
            run_state(self.model, self.optimizer, self.topology, loading=False),
            str(partial / TENSORS),
            sharded_strategy=FullyParallelSaveStrategyWrapper(
                get_default_save_sharded_strategy(), parallel_state.get_data_parallel_group(with_context_parallel=True)
            ),
            async_sharded_save=True,
            validate_access_integrity=True,
            **engine.SAVE_OPTIONS,
        )
        request = _with_checksums(async_request, partial, rank=self.topology.rank)
        request.add_finalize_fn(lambda: self._complete(partial, step=step))
        self.started_at, self.saved_step = time.monotonic(), step
        if self.config.asynchronous:
            self.queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def poll(self) -> None:
        """Finish a save whose files are written; give one up that takes too long. Cheap where nothing is under way."""
        if self.queue.get_num_unfinalized_calls() == 0 or self.started_at is None:
            return
        self.queue.maybe_finalize_async_calls(blocking=False)
        late = torch.tensor(float(time.monotonic() - self.started_at > 60 * self.config.timeout_minutes), device=self.topology.device)
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if late.item() and self.queue.get_num_unfinalized_calls():
            logger.error(
                "the checkpoint of step %s was not written within %s minutes and is given up", self.saved_step, self.config.timeout_minutes
            )
            for call in self.queue.async_calls:
                call.async_caller.close(abort=True)
            self.queue = AsyncCallsQueue(persistent=False)
            self.saved_step = None

    def finish(self) -> None:
        """Wait for a save that is under way."""
        while self.queue.get_num_unfinalized_calls():
            self.poll()
            time.sleep(0.02)

    def _fresh_directory(self, state: TrainState) -> Path:
        name = [f".partial-step_{state.step:08d}-{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(name, src=0)
        partial = self.folder / name[0]
        if self.topology.is_main:
            (partial / TENSORS).mkdir(parents=True)
            save_experiment(self.experiment, partial / "experiment.json")
            (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
            if self.experiment.data.tokenizer_path.is_file():
                shutil.copyfile(self.experiment.data.tokenizer_path, partial / "tokenizer.model")
        dist.barrier()
        return partial

    def _complete(self, partial: Path, *, step: int) -> None:
        """Give a finished save its name, once all parts are there, and drop the oldest checkpoints beyond `keep`."""
        if self.topology.is_main:
            files = merge_checksums(partial / TENSORS)
            manifest = partial / MANIFEST
            content = {
                "step": step,
                "world_size": self.topology.world_size,
                "files": files,
                "descriptions": integrity.sum_descriptions(partial),
            }
            manifest.write_text(json.dumps(content, indent=1) + "\n")
            sync_to_disk(manifest)
            final = self.folder / f"step_{step:08d}"
            if final.exists():  # saved again after a resume from an older checkpoint
                final.rename(self.folder / f".removed-{uuid.uuid4().hex[:8]}")
            partial.rename(final)
            sync_to_disk(self.folder)
            seconds = time.monotonic() - (self.started_at or time.monotonic())
            logger.info("checkpoint %s written in %.1f s", final, seconds)
            for old in completed_checkpoints(self.folder.parent)[: -self.config.keep]:
                old.rename(self.folder / f".removed-{uuid.uuid4().hex[:8]}")
            for removed in self.folder.glob(".removed-*"):
                shutil.rmtree(removed, ignore_errors=True)
        dist.barrier()

    # ------------------------------------------------------------------------------------------------------------- load

    def load_latest(self) -> TrainState | None:
        """Load the newest whole checkpoint of the run; None where it has none. Damaged ones are set aside.

        Raises ValueError where the checkpoint is of another model, or all are damaged.
        """
        newest = newest_whole_checkpoint(self.folder.parent, self.topology)
        return None if newest is None else self._load(newest)

    def load(self, checkpoint: Path) -> TrainState:
        """Load one checkpoint. Raises ValueError where it is of another model, or damaged."""
        verify(checkpoint, self.topology)
        return self._load(checkpoint)

    def _load(self, checkpoint: Path) -> TrainState:
        """Weights, optimizer and generators from any layout; generators only from a run of the same size."""
        check_same_model(self.experiment, checkpoint)
        same_size = read_manifest(checkpoint)["world_size"] == self.topology.world_size
        alike = same_size and same_layout(self.experiment, checkpoint)
        loaded = dist_checkpointing.load(
            run_state(self.model, self.optimizer, self.topology, loading=True, generators=alike),
            str(checkpoint / TENSORS),
            sharded_strategy=load_strategy(checkpoint),
            strict=StrictHandling.RAISE_UNEXPECTED,
        )
        for index, chunk in enumerate(wrapped_modules(self.model)):
            load_chunk(chunk.module, loaded[f"model{index}"])
        load_optimizer_state(self.optimizer, loaded["optimizer"])
        adam.complete_groups(self.optimizer)
        if alike:
            restore_generators(loaded["generators"])
        state = TrainState(**json.loads((checkpoint / "state.json").read_text()))
        self.saved_step = state.step
        if self.topology.is_main:
            logger.info("resumed from %s%s", checkpoint, "" if alike else " (written under another layout)")
        return state


def _with_checksums(request: AsyncRequest, partial: Path, *, rank: int) -> AsyncRequest:
    """The same request, whose process also writes the checksums of the files it wrote, off the training process."""
    write = request.async_fn

    def write_and_sum(*args: Any, **kwargs: Any) -> None:
        if write is not None:
            write(*args, **kwargs)
        integrity.write_checksums(partial, rank=rank)

    return request._replace(async_fn=write_and_sum, finalize_fns=list(request.finalize_fns))
