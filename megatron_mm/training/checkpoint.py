"""Checkpoints: sharded, asynchronous, complete or absent.

    RUN_DIR/checkpoints/step_00000200/
        experiment.json     the resolved experiment
        state.json          step, plan cursor and counters
        tokenizer.model     what the token ids mean
        tensors/            megatron-core's distributed checkpoint: weights, optimizer state, random-number generators
        manifest.json       size and CRC-32 of every file in tensors/; written last

A save goes to a fresh directory beside these, `.partial-...`; only when every process has written its part and the parts are
checked is it renamed. So a directory named step_* is always whole, whatever was killed when. Reading checks sizes and
checksums first, and lets the two pickles that megatron-core writes name nothing but tensors' metadata.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import uuid
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_mm.config import CheckpointConfig, Experiment, ModelConfig
from megatron_mm.families.serialize import load_experiment, save_experiment, to_dict
from megatron_mm.parallel.initial_weights import STATE_METADATA
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.safe_pickle import check_pickles

logger = logging.getLogger(__name__)

TENSORS = "tensors"
_READ_BYTES = 1 << 24
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|generators\.")
"""How the names of a checkpoint's other tensors begin. A model with experts has an optimizer for them beside the other."""
_NAMED, _DIFFERENCES = 40, 4


@dataclass
class TrainState:
    """What a run is besides its tensors."""

    step: int = 0
    """Steps done."""
    plan: dict[str, Any] | None = None
    """The plan's cursor, as `PlanState.to_dict` gives it; None before the first step."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite."""
    tokens: int = 0
    """Tokens trained on, padding not counted."""
    images: int = 0
    """Images trained on."""
    bad_samples: dict[str, int] = field(default_factory=dict)
    """Samples that failed at run time, by source."""


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run directory.

    Raises ValueError where there is none.
    """
    if (path / "manifest.json").is_file():
        return path
    found = completed_checkpoints(path.parent if path.name == "checkpoints" else path)
    if not found:
        raise ValueError(
            f"{path} is neither a complete checkpoint nor a run directory with one: give RUN_DIR or RUN_DIR/checkpoints/step_..."
        )
    return found[-1]


def completed_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run_dir / "checkpoints").glob("step_*/manifest.json"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, as the first process sees it; called by all processes together."""
    complete = completed_checkpoints(run_dir)
    found = [str(complete[-1]) if complete else None]
    dist.broadcast_object_list(found, src=0)
    return None if found[0] is None else Path(found[0])


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
            self._sharded_state(loading=False),
            str(partial / TENSORS),
            sharded_strategy=FullyParallelSaveStrategyWrapper(
                get_default_save_sharded_strategy(), parallel_state.get_data_parallel_group(with_context_parallel=True)
            ),
            async_sharded_save=True,
            validate_access_integrity=True,
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
            files = _merge_checksums(partial / TENSORS)
            manifest = partial / "manifest.json"
            manifest.write_text(json.dumps({"step": step, "world_size": self.topology.world_size, "files": files}, indent=1) + "\n")
            _sync_to_disk(manifest)
            final = self.folder / f"step_{step:08d}"
            if final.exists():  # saved again after a resume from an older checkpoint
                final.rename(self.folder / f".removed-{uuid.uuid4().hex[:8]}")
            partial.rename(final)
            _sync_to_disk(self.folder)
            seconds = time.monotonic() - (self.started_at or time.monotonic())
            logger.info("checkpoint %s written in %.1f s", final, seconds)
            for old in completed_checkpoints(self.folder.parent)[: -self.config.keep]:
                old.rename(self.folder / f".removed-{uuid.uuid4().hex[:8]}")
            for removed in self.folder.glob(".removed-*"):
                shutil.rmtree(removed, ignore_errors=True)
        dist.barrier()

    # ------------------------------------------------------------------------------------------------------------- load

    def load_latest(self) -> TrainState | None:
        """Load the newest complete checkpoint of the run; None where it has none.

        Raises ValueError where the checkpoint is of another model, or damaged.
        """
        newest = newest_checkpoint(self.folder.parent)
        return None if newest is None else self.load(newest)

    def load(self, checkpoint: Path) -> TrainState:
        """Load weights, optimizer and generators from any layout; generators only from a run of the same size."""
        check_same_model(self.experiment, checkpoint)
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        verify(checkpoint, self.topology)
        same_layout = _same_layout(self.experiment, checkpoint) and manifest["world_size"] == self.topology.world_size
        loaded = dist_checkpointing.load(
            self._sharded_state(loading=True, generators=same_layout),
            str(checkpoint / TENSORS),
            sharded_strategy=load_strategy(checkpoint),
            strict=StrictHandling.RAISE_UNEXPECTED,
        )
        for index, chunk in enumerate(self.model):
            load_chunk(chunk.module, loaded[f"model{index}"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        if same_layout:
            _restore_generators(loaded["generators"])
        state = TrainState(**json.loads((checkpoint / "state.json").read_text()))
        self.saved_step = state.step
        if self.topology.is_main:
            logger.info("resumed from %s%s", checkpoint, "" if same_layout else " (written under another layout)")
        return state

    # ------------------------------------------------------------------------------------------------------------ state

    def _sharded_state(self, *, loading: bool, generators: bool = True) -> dict[str, Any]:
        metadata = dict(STATE_METADATA)
        chunks = {f"model{i}": chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(self.model)}
        state: dict[str, Any] = dict(chunks)
        # The optimizer looks its parameters up in all chunks at once; names are global, so merging loses nothing.
        merged = {f"{i}.{name}": entry for i, chunk in enumerate(chunks.values()) for name, entry in chunk.items()}
        state["optimizer"] = self.optimizer.sharded_state_dict(merged, is_loading=loading, metadata=metadata)
        if generators:
            state["generators"] = _generator_state(self.topology)
        return state


def verify(checkpoint: Path, topology: Topology) -> None:
    """Check sizes, checksums and pickles, on all processes together: each reads its share, so that reading twice costs little.

    Raises ValueError, on all of them, that names the damaged file.
    """
    problem = ""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        for index, (name, (size, checksum)) in enumerate(sorted(files.items())):
            path = checkpoint / TENSORS / name
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"checkpoint file {path} is missing or has not its {size} bytes: restore it or remove {checkpoint}")
            if index % topology.world_size == topology.rank and _crc32(path) != checksum:
                raise ValueError(f"checkpoint file {path} is damaged (its checksum differs): restore it or remove {checkpoint}")
        check_pickles(checkpoint / TENSORS)
    except ValueError as error:
        problem = str(error)
    problems: list[str] = [""] * topology.world_size
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found:
            raise ValueError(found)


def load_weights(experiment: Experiment, topology: Topology, model: list[DistributedDataParallel], checkpoint: Path) -> None:
    """Load the weights alone, from any layout into any layout.

    Raises ValueError where the checkpoint is of another model, lacks a tensor or has one too many, or is damaged.
    """
    check_same_model(experiment, checkpoint, with_optimizer=False)
    verify(checkpoint, topology)
    state = {f"model{i}": chunk.module.sharded_state_dict(metadata=dict(STATE_METADATA)) for i, chunk in enumerate(model)}
    _check_names(state, checkpoint, world_size=topology.world_size)
    loaded = dist_checkpointing.load(
        state,
        str(checkpoint / TENSORS),
        sharded_strategy=load_strategy(checkpoint),
        strict=StrictHandling.RAISE_UNEXPECTED,
    )
    for index, chunk in enumerate(model):
        load_chunk(chunk.module, loaded[f"model{index}"])


def _check_names(state: dict[str, Any], checkpoint: Path, *, world_size: int) -> None:
    """Raise ValueError that lists the weights which the checkpoint lacks, and those that the model does not have."""
    pieces = {chunk: dict(entries) for chunk, entries in state.items()}
    apply_factories(pieces)  # in place
    mine = {entry.key for entry in nested_values(pieces) if isinstance(entry, ShardedTensor)}
    names: list[set[str]] = [set()] * world_size
    dist.all_gather_object(names, mine)
    wanted = set().union(*names)
    stored = {name for name in dist_checkpointing.load_tensors_metadata(str(checkpoint / TENSORS)) if belongs_to_model(name)}
    for what, missed in (("lacks", wanted - stored), ("holds, beyond the model's,", stored - wanted)):
        if missed:
            named = ", ".join(sorted(missed)[:_NAMED]) + (", ..." if len(missed) > _NAMED else "")
            raise ValueError(f"checkpoint {checkpoint} {what} {len(missed)} tensors: {named}")


def load_chunk(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """Copy weights into a pipeline chunk; every weight must be there. What Transformer Engine would keep beside them is not saved."""
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    missing = [name for name in missing if "._extra_state" not in name]
    assert not missing and not unexpected, f"the checkpoint lacks {missing} and has {unexpected}"


def load_strategy(checkpoint: Path) -> FullyParallelLoadStrategyWrapper:
    """Reads each stored tensor once for all data-parallel processes that want it."""
    return FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(checkpoint / TENSORS)), parallel_state.get_data_parallel_group(with_context_parallel=True)
    )


def belongs_to_model(name: str) -> bool:
    """Whether a checkpoint's tensor is the model's, and not the optimizer's or a generator's."""
    return _NOT_WEIGHTS.match(name) is None


def check_same_model(experiment: Experiment, checkpoint: Path, *, with_optimizer: bool = True) -> None:
    """Raise ValueError that names the differences where a checkpoint holds another model than the experiment's, or
    (with_optimizer) another kind of optimizer state."""
    saved = load_experiment(checkpoint / "experiment.json")
    if differences := model_differences(experiment.model, saved.model):
        told = [f"model.{name} is {theirs!r} there and {ours!r} here" for name, ours, theirs in differences[:_DIFFERENCES]]
        more = f", and {len(differences) - len(told)} more settings differ" if len(differences) > len(told) else ""
        advice = "use another --run-dir, or" if with_optimizer else "use"
        raise ValueError(
            f"checkpoint {checkpoint} holds another model ({saved.recipe}): {', '.join(told)}{more}: "
            f"{advice} the recipe and model settings of the checkpoint"
        )
    if with_optimizer and experiment.train.policy != saved.train.policy:
        raise ValueError(
            f"checkpoint {checkpoint} was trained with train.policy {saved.train.policy!r}, not {experiment.train.policy!r}: "
            f"for another stage start a new run with --run-dir NEW --init-from {checkpoint}"
        )
    if with_optimizer and json.loads((checkpoint / "manifest.json").read_text()).get("weights_only", False):
        raise ValueError(
            f"checkpoint {checkpoint} holds weights alone, no run to go on with: use another --run-dir and --init-from {checkpoint}"
        )
    if with_optimizer and experiment.parallel.distributed_optimizer != saved.parallel.distributed_optimizer:
        raise ValueError(
            f"checkpoint {checkpoint} has parallel.distributed_optimizer {saved.parallel.distributed_optimizer}: use the same here"
        )


def check_same_tokenizer(experiment: Experiment, checkpoint: Path) -> None:
    """Raise ValueError where the token ids of a checkpoint mean something else than those of the experiment's data."""
    ours, theirs = experiment.data.tokenizer_path, checkpoint / "tokenizer.model"
    if theirs.is_file() and ours.read_bytes() != theirs.read_bytes():
        raise ValueError(
            f"{checkpoint} was trained with another tokenizer than {ours}: use --data.tokenizer {theirs} and index the data with it"
        )


def model_differences(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, Any, Any]]:
    """The fields in which two models differ, with both values; of models of two families that alone."""
    if ours.family != theirs.family:
        return [("family", ours.family, theirs.family)]
    return _differences(to_dict(ours), to_dict(theirs))


def _same_layout(experiment: Experiment, checkpoint: Path) -> bool:
    saved = load_experiment(checkpoint / "experiment.json").parallel
    ours = experiment.parallel
    return (saved.tensor, saved.pipeline, saved.virtual, saved.expert) == (ours.tensor, ours.pipeline, ours.virtual, ours.expert)


def _differences(ours: Any, theirs: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted(set(ours) | set(theirs))
        return [found for name in names for found in _differences(ours.get(name), theirs.get(name), f"{prefix}{name}.")]
    return [] if ours == theirs else [(prefix.rstrip("."), ours, theirs)]


def _generator_state(topology: Topology) -> dict[str, ShardedTensor]:
    """The generators of every process, each a row of a [world_size, bytes] tensor."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states.update({f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()})
    return {
        name: ShardedTensor.from_rank_offsets(
            f"generators.{name}", state.cpu().clone()[None], (0, topology.rank, topology.world_size), replica_id=0
        )
        for name, state in states.items()
    }


def _restore_generators(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"][0].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0].cpu())
    tracker = {name.removeprefix("tracker."): state[0].cpu() for name, state in states.items() if name.startswith("tracker.")}
    get_cuda_rng_tracker().set_states(tracker)


# --------------------------------------------------------------------------------------------------------------- checksums


def _with_checksums(request: AsyncRequest, partial: Path, *, rank: int) -> AsyncRequest:
    """The same request, whose process also writes the checksums of the files it wrote, off the training process."""
    write = request.async_fn

    def write_and_sum(*args: Any, **kwargs: Any) -> None:
        if write is not None:
            write(*args, **kwargs)
        _write_checksums(partial, rank=rank)

    return request._replace(async_fn=write_and_sum, finalize_fns=list(request.finalize_fns))


def _write_checksums(partial: Path, *, rank: int) -> None:
    sums = {}
    for path in sorted((partial / TENSORS).glob(f"__{rank}_*.distcp")):
        sums[path.name] = [path.stat().st_size, _crc32(path)]
        _sync_to_disk(path)
    (partial / f"checksums.{rank}.json").write_text(json.dumps(sums))


def _merge_checksums(tensors: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file; raises RuntimeError where a process wrote files and no checksums (it died)."""
    sums: dict[str, list[int]] = {}
    for path in sorted(tensors.parent.glob("checksums.*.json")):
        sums.update(json.loads(path.read_text()))
        path.unlink()
    for path in sorted(tensors.iterdir()):
        if path.name not in sums:
            if path.suffix == ".distcp":
                raise RuntimeError(f"checkpoint file {path} has no checksum: the process that wrote it died")
            sums[path.name] = [path.stat().st_size, _crc32(path)]
            _sync_to_disk(path)
    return sums


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
