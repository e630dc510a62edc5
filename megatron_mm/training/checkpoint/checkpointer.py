"""Saves and loads a run's checkpoints: asynchronous, complete or absent."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_mm.config import CheckpointConfig, Experiment
from megatron_mm.families.serialize import save_experiment
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform import adam, engine, first_writer, fp8_weights, write_results
from megatron_mm.platform.files import full_disk, sync_to_disk
from megatron_mm.training.checkpoint import integrity
from megatron_mm.training.checkpoint.compatible import check_same_model, same_layout
from megatron_mm.training.checkpoint.copies import Copies
from megatron_mm.training.checkpoint.fallback import newest_whole_checkpoint
from megatron_mm.training.checkpoint.integrity import agree, merge_checksums, read_manifest, verify
from megatron_mm.training.checkpoint.load import load_chunk, load_strategy, shared_metadata
from megatron_mm.training.checkpoint.memory import MemoryCopy
from megatron_mm.training.checkpoint.names import (
    BEST,
    MANIFEST,
    TENSORS,
    completed_checkpoints,
    newest_checkpoint,
    point_to,
    step_of,
    superseded,
)
from megatron_mm.training.checkpoint.optimizer_state import load_optimizer_state
from megatron_mm.training.checkpoint.save_plan import SavePlans
from megatron_mm.training.checkpoint.staging import Staging
from megatron_mm.training.checkpoint.state import TrainState, restore_generators, run_state, to_be_forked
from megatron_mm.training.checkpoint.write_request import with_checksums
from megatron_mm.training.progress import Progress
from megatron_mm.training.spread_encoder import wrapped_modules

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Save:
    """A save in progress."""

    step: int
    best_step: int | None
    """Step with the lowest held-out loss so far."""
    partial: Path
    began: float
    """Start time on the monotonic clock."""


class Checkpointer:
    """Saves and loads one run's checkpoints. All processes must call every method together, except `tell`."""

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        run_dir: Path,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        *,
        progress: Progress | None = None,
    ) -> None:
        self.experiment = experiment
        self.config: CheckpointConfig = experiment.checkpoint
        self.topology = topology
        self.folder = run_dir / "checkpoints"
        self.model = model
        self.optimizer = optimizer
        self.progress = progress or Progress()
        self.queue = AsyncCallsQueue(persistent=False)
        self.under_way: Save | None = None
        self._told_of: Save | None = None
        self._waited = 0.0
        """Seconds for which training waited for the newest asynchronous save, also while an earlier one was still being written."""
        self.saved_step: int | None = None
        """Step of the newest complete checkpoint."""
        self.sound_step = 0
        """Last step with a finite gradient, as of the start of the newest save."""
        self.failed_saves = 0
        self.plans = SavePlans()
        self.staging = Staging(topology.device) if topology.device.type == "cuda" else None
        memory = experiment.checkpoint.memory
        self.memory = MemoryCopy(experiment, topology, run_dir, model, optimizer) if memory is not None else None
        copy_to = experiment.checkpoint.copy_to
        self.copies = Copies(copy_to, superseded=self._superseded) if copy_to is not None and topology.is_main else None
        first_writer.install()
        write_results.install()
        if topology.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in [*self.folder.glob(".partial-*"), *self.folder.glob(".removed-*")]:
                logger.warning("removing %s, left behind by a run that was stopped while saving", stale.name)
                shutil.rmtree(stale, ignore_errors=True)
        name = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(name, src=0)  # also a barrier: no process continues before the folder exists
        self._run, self._saves = name[0], 0

    # ------------------------------------------------------------------------------------------------------------- save

    def save(self, state: TrainState) -> None:
        """Start a save, after waiting for any save in progress. Calls of `tell` and `poll` in each step finish an asynchronous save.

        If a save fails (for example because the disk is full), the first process logs an error and removes the partial files; `saved_step`
        does not change.
        """
        began, self._waited = time.monotonic(), 0.0
        self.finish()
        if self.saved_step == state.step:
            return
        with self.progress.patient(60 * self.config.timeout_minutes):
            self._save(state)
        self._waited = time.monotonic() - began

    def _save(self, state: TrainState) -> None:
        step = state.step  # the state changes while the files are written
        self.sound_step = step - state.skipped_in_a_row
        engine.gather_weights(self.model)
        tensors = to_be_forked(run_state(self.model, self.optimizer, self.topology, loading=False))
        partial, problems = self._fresh_directory(state)
        failed, anew = self._any(bool(problems), self.plans.must_be_made(tensors))
        if failed:
            self._give_up("; ".join(problems), partial, step=step)
            return
        async_request = dist_checkpointing.save(
            tensors,
            str(partial / TENSORS),
            sharded_strategy=self.plans.strategy_for(tensors, anew=anew),
            async_sharded_save=True,
            validate_access_integrity=False,  # the first process validates: see `SavePlans`
            **engine.SAVE_OPTIONS,
        )
        if self._failed(first_writer.take_problems(), partial, step=step):
            return
        request = with_checksums(async_request, partial, rank=self.topology.rank)
        if self.staging is not None:
            request = self.staging.of(request)
        request.add_finalize_fn(lambda: self._complete(partial, step=step))
        self.under_way = Save(step, state.best_step, partial, time.monotonic())
        if self.config.asynchronous:
            self.queue.schedule_async_request(request)
        else:
            with self._giving_up():
                request.execute_sync()

    def tell(self) -> tuple[float, float]:
        """Return the status of the save in progress, on this process alone: 1 if its files are still being written, 1 if it is overdue."""
        self._told_of = save = self.under_way
        if save is None:
            return 0.0, 0.0
        return float(engine.is_writing(self.queue)), float(time.monotonic() - save.began > 60 * self.config.timeout_minutes)

    def poll(self, told: Sequence[float]) -> None:
        """Finish the save once all processes have written their files; abandon it if it is overdue. Otherwise send no messages.

        Args:
            told: the results of `tell`, summed over all processes. Ignored if a new save has started since that call of `tell`.
        """
        save, (writing, late) = self.under_way, told
        if save is None or save is not self._told_of or self.queue.get_num_unfinalized_calls() == 0:
            return
        if not writing:
            with self._giving_up():
                self.queue.maybe_finalize_async_calls(blocking=True, no_dist=True)  # all writers have ended
        elif late:
            for call in self.queue.async_calls:
                call.async_caller.close(abort=True)
            self.queue = AsyncCallsQueue(persistent=False)
            self._give_up(f"it was not written within {self.config.timeout_minutes} minutes", save.partial, step=save.step)

    def keep_in_memory(self, state: TrainState) -> None:
        """Copy the state to the nodes' memory, if `checkpoint.memory` is set."""
        if self.memory is not None:
            engine.gather_weights(self.model)
            self.memory.save(state)

    def close(self) -> None:
        """End training: wait for the second copy of the last checkpoint, and free the nodes' memory and that of saves."""
        if self.copies is not None:
            self.copies.finish(seconds=60 * self.config.timeout_minutes, beat=self.progress.beat)
            self._drop_superseded()
        if self.memory is not None:
            self.memory.remove()
        if self.staging is not None:
            self.staging.release()

    def finish(self) -> None:
        """Wait for the save in progress, if any."""
        while self.queue.get_num_unfinalized_calls():
            self.poll(self._any(*self.tell()))
            self.progress.beat()
            time.sleep(0.02)

    def _fresh_directory(self, state: TrainState) -> tuple[Path, list[str]]:
        """Return the folder of a new save, which the first process creates, and the problems found while creating it."""
        self._saves += 1
        partial = self.folder / f".partial-step_{state.step:08d}-{self._run}-{self._saves}"
        problems: list[str] = []
        if self.topology.is_main:
            try:
                (partial / TENSORS).mkdir(parents=True)
                save_experiment(self.experiment, partial / "experiment.json")
                (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
                if self.experiment.data.tokenizer_path.is_file():
                    shutil.copyfile(self.experiment.data.tokenizer_path, partial / "tokenizer.model")
            except OSError as error:
                problems.append(str(error))
        return partial, problems

    # ------------------------------------------------------------------------------------------------------------- fail

    def _failed(self, problems: Sequence[str], partial: Path, *, step: int) -> bool:
        """Return, on all processes, whether any process has problems. If so, abandon the save."""
        (failed,) = self._any(bool(problems))
        if failed:
            self._give_up("; ".join(problems), partial, step=step)
        return failed

    def _any(self, *flags: float) -> list[bool]:
        """Return, for each flag, whether it is set on any process."""
        found = torch.tensor(flags, dtype=torch.float32, device=self.topology.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [value > 0 for value in found.tolist()]

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Abandon the save if a process cannot write its files: megatron-core then raises on all processes."""
        try:
            yield
        except CheckpointException as error:
            save, self.under_way = self.under_way, None
            assert save is not None
            reasons = [str(reason[0] if isinstance(reason, tuple) else reason) for reason in error.failures.values()]
            self._give_up("; ".join(dict.fromkeys(reasons)), save.partial, step=save.step)

    def _give_up(self, reason: str, partial: Path, *, step: int) -> None:
        self.under_way = None
        self.failed_saves += 1
        if self.topology.is_main:
            newest = "there is no checkpoint yet" if self.saved_step is None else f"the newest checkpoint is of step {self.saved_step}"
            goes_on = ". Training continues" if step < self.experiment.train.steps else ""
            logger.error("the checkpoint of step %d is abandoned: %s; %s%s", step, reason + full_disk(self.folder), newest, goes_on)
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()

    # --------------------------------------------------------------------------------------------------------- complete

    def _complete(self, partial: Path, *, step: int) -> None:
        """Rename the folder of a save whose parts are all written, and remove checkpoints that `keep` and `keep_every` do not retain."""
        problems = first_writer.take_problems()
        if self.topology.is_main and not problems:
            try:
                self._name(partial, step=step)
            except (OSError, RuntimeError) as error:
                problems.append(str(error))
        if not self._failed(problems, partial, step=step):
            self.saved_step = step
        self.under_way = None

    def _name(self, partial: Path, *, step: int) -> None:
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
        save = self.under_way
        assert save is not None
        waited = f", for {self._waited:.1f} s of which training waited" if self._waited else ""
        logger.info("checkpoint %s written in %.1f s%s", final, time.monotonic() - save.began, waited)
        if self.copies is not None:
            self.copies.add(final)
        try:
            if save.best_step == step:
                point_to(self.folder / BEST, final)
            self._drop_superseded()
        except OSError as error:  # for example, a folder has the link's name: the checkpoint is complete all the same
            logger.error("checkpoint %s is written, but its folder cannot be tidied up: %s", final.name, error)

    def _drop_superseded(self) -> None:
        kept = self.copies.busy if self.copies is not None else set()
        for old in self._superseded(completed_checkpoints(self.folder.parent)):
            if old not in kept:
                old.rename(self.folder / f".removed-{uuid.uuid4().hex[:8]}")
        for removed in self.folder.glob(".removed-*"):
            shutil.rmtree(removed, ignore_errors=True)

    def _superseded(self, checkpoints: list[Path]) -> list[Path]:
        """Return the checkpoints (or copies of them) that may be removed. While steps are skipped, the newest checkpoint from before the
        skipped steps is kept."""
        kept = {(self.folder / BEST).resolve().name, *[path.name for path in checkpoints if step_of(path) <= self.sound_step][-1:]}
        found = superseded(checkpoints, keep=self.config.keep, keep_every=self.config.keep_every)
        return [path for path in found if path.name not in kept]

    # ------------------------------------------------------------------------------------------------------------- load

    def load_latest(self) -> TrainState | None:
        """Load the newest undamaged checkpoint or memory copy of the run; return None if it has none. Damaged checkpoints are set aside.

        Raises ValueError if the checkpoint is of another model, or if all are damaged and there is no copy elsewhere.
        """
        if self.memory is not None:
            checkpoint = newest_checkpoint(self.folder.parent)
            state = self.memory.load_latest(newer_than=-1 if checkpoint is None else step_of(checkpoint))
            if state is not None:
                if self.topology.is_main:
                    logger.info("resumed from the copy of step %d in %s", state.step, self.config.memory)
                return state
        try:
            newest = newest_whole_checkpoint(self.folder.parent, self.topology)
        except ValueError as error:
            if self.config.copy_to is None:
                raise
            newest = self._fetched(instead_of=str(error))
        else:
            newest = newest or self._fetched()
        return None if newest is None else self._load(newest)

    def _fetched(self, *, instead_of: str = "") -> Path | None:
        """Fetch the newest copy for a run without a usable checkpoint of its own; return None if there is no copy.

        Args:
            instead_of: what is wrong with the run's own checkpoints. They are set aside once the copy has been fetched. If there is no
                copy, this text is raised as ValueError.
        """
        if self.config.copy_to is None:
            return None
        problem = ""
        try:
            if self.copies is not None and (names := self.copies.complete()):
                why = instead_of or f"{self.folder} has no checkpoint"
                logger.warning("%s: fetching %s from %s", why, names[-1], self.config.copy_to)
                with self.progress.patient(60 * self.config.timeout_minutes):
                    self.copies.fetch(names[-1], self.folder)
            elif self.copies is not None:
                problem = instead_of
        except Exception as error:  # a store may raise any type
            problem = f"{instead_of or 'the run has no checkpoint'}, and none can be fetched from {self.config.copy_to}: {error}"
        agree(problem, world_size=self.topology.world_size, device=self.topology.device)
        return newest_checkpoint(self.folder.parent)

    def load(self, checkpoint: Path) -> TrainState:
        """Load one checkpoint. Raises ValueError if it is damaged or of another model."""
        verify(checkpoint, self.topology)
        return self._load(checkpoint)

    def _load(self, checkpoint: Path) -> TrainState:
        """Load weights and optimizer state from any layout, and generators only if size and layout of the run are the same."""
        check_same_model(self.experiment, checkpoint)
        same_size = read_manifest(checkpoint)["world_size"] == self.topology.world_size
        alike = same_size and same_layout(self.experiment, checkpoint)
        with shared_metadata(checkpoint, self.topology):
            loaded = dist_checkpointing.load(
                run_state(self.model, self.optimizer, self.topology, loading=True, generators=alike),
                str(checkpoint / TENSORS),
                sharded_strategy=load_strategy(),
                strict=StrictHandling.RAISE_UNEXPECTED,
            )
        for index, chunk in enumerate(wrapped_modules(self.model)):
            load_chunk(chunk.module, loaded[f"model{index}"])
        load_optimizer_state(self.optimizer, loaded["optimizer"])
        adam.complete_groups(self.optimizer)
        if self.experiment.train.precision == "fp8":
            fp8_weights.round_master_weights(self.optimizer)
        if alike:
            restore_generators(loaded["generators"])
        state = TrainState(**json.loads((checkpoint / "state.json").read_text()))
        self.saved_step = state.step
        if self.topology.is_main:
            logger.info("resumed from %s%s", checkpoint, "" if alike else " (written under another layout)")
        return state
