"""Starts a run in a run directory, or resumes the run that is there.

The steps, in order: check -> open the data -> initialise process groups -> model -> optimizer -> checkpoint -> hooks -> `Trainer.fit`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel

from megatron_mm.config import Experiment
from megatron_mm.config.checks import check_types
from megatron_mm.config.references import absolute, load_object
from megatron_mm.data.plan.plan import Plan
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.evaluation.heldout import HeldOut, tell_missing_sources, with_held_out_sources
from megatron_mm.families.registry import family_of
from megatron_mm.families.serialize import load_extensions, save_experiment, to_dict
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform.device import be_deterministic
from megatron_mm.platform.secrets import contains_secret
from megatron_mm.reporting.events import listen
from megatron_mm.reporting.monitor import Monitor
from megatron_mm.reporting.report_details import flat
from megatron_mm.run.changes import warn_of_changes
from megatron_mm.run.data import HELD_OUT, TRAINING, TrainingData, as_indexed, held_out_batches, image_input, make_plan, open_tokenizer
from megatron_mm.run.hooks import standard_hooks
from megatron_mm.run.lock import RunLock
from megatron_mm.run.machine_checks import check_machine
from megatron_mm.run.roll_back import RollBack, go_back, leave_out
from megatron_mm.run.start_times import LogStart, StartTimes
from megatron_mm.run.watchdog import Watchdog, is_lost_contact
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import (
    Checkpointer,
    TrainState,
    check_same_model,
    check_same_tokenizer,
    find_checkpoint,
    load_weights,
    newest_checkpoint,
    newest_described_checkpoint,
)
from megatron_mm.training.freezing import trainable_patterns
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.progress import Progress
from megatron_mm.training.router_graph import graph_routers
from megatron_mm.training.tower_graph import graph_tower
from megatron_mm.training.trainer import Hook, Trainer

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
MoreHooks = Callable[[Trainer, Monitor, Plan], Sequence[Hook]]
"""Makes hooks of a run from its trainer, its monitor and the plan of its training data."""


def start(
    experiment: Experiment,
    run_dir: Path,
    *,
    examine: Callable[[Checked], None] = lambda checked: None,
    more_hooks: MoreHooks = lambda trainer, monitor, plan: [],
) -> TrainState:
    """Train an experiment and return the run's state at the end.

    Args:
        examine: makes further checks before the run begins; raises ValueError.
        more_hooks: makes hooks in addition to the standard ones.

    Raises ValueError, before processes communicate, if layout, batch, data or an earlier run in run_dir does not fit.
    """
    times = StartTimes()
    listen()  # warnings from here on are events of the run
    checked = check(experiment, run_dir)
    experiment = checked.experiment
    examine(checked)
    times.lap("data opened and checked")
    is_main = int(os.environ.get("RANK", "0")) == 0
    lock = RunLock(run_dir) if is_main else None
    with lock or contextlib.nullcontext():
        if is_main:
            warn_of_changes(experiment, run_dir / CONFIG_FILE)
            save_experiment(experiment, run_dir / CONFIG_FILE)
        try:
            topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
            times.lap("process groups")
            progress = Progress()
            with Watchdog(run_dir, progress, topology, seconds=experiment.train.watchdog) as watchdog:
                try:
                    while True:
                        try:
                            with progress.patient(60 * experiment.checkpoint.timeout_minutes):
                                trainer = assemble(checked, run_dir, more_hooks=more_hooks, times=times, lock=lock, progress=progress)
                            return trainer.fit()
                        except RollBack as error:
                            roll_back = error.with_traceback(None)
                        trainer.checkpointer.close()
                        del trainer  # and with it the memory of the model
                        gc.collect()
                        go_back(run_dir, roll_back, train=experiment.train)
                        times = StartTimes(launched=False)
                except RuntimeError as error:
                    if is_lost_contact(error):
                        raise watchdog.lost_contact(error) from error
                    raise
        finally:
            topologies.shutdown()


@dataclass(frozen=True)
class Checked:
    """An experiment that passed all checks, and its opened data."""

    experiment: Experiment
    """The experiment, with the settings that its data was indexed with (`run.data.as_indexed`)."""
    tokenizer: Tokenizer
    plan: Plan
    """Plan of the training split."""
    extra_hooks: list[Callable[[Trainer], Hook]]
    """Functions that make the hooks that the experiment names."""


def assemble(
    checked: Checked,
    run_dir: Path,
    *,
    more_hooks: MoreHooks = lambda trainer, monitor, plan: [],
    times: StartTimes | None = None,
    lock: RunLock | None = None,
    progress: Progress | None = None,
) -> Trainer:
    """Join the other processes, build the model, load the run's newest checkpoint, if any, and attach the hooks.

    Raises ValueError if the checkpoint does not fit the experiment.
    """
    experiment, tokenizer, times = checked.experiment, checked.tokenizer, times or StartTimes()
    topology, progress = topologies.initialize(experiment.parallel, seed=experiment.train.seed), progress or Progress()
    progress.enter("start")
    if experiment.train.deterministic:
        be_deterministic()
    model = build_model(experiment, topology, optimizer=True)
    if experiment.init_from is not None and newest_checkpoint(run_dir) is None:
        _begin_with(find_checkpoint(experiment.init_from), experiment, topology, model)
    times.lap("model and weights")
    optimizer = build_optimizer(experiment, model)  # after the weights: it copies them
    times.lap("optimizer")
    checkpointer = Checkpointer(experiment, topology, run_dir, model, optimizer, progress=progress)
    state = leave_out(checkpointer.load_latest() or TrainState(), run_dir, topology=topology)
    note_samples(state, {source.name: len(source) for source in checked.plan.indexes}, warn=topology.is_main)
    times.lap("checkpoint")
    if experiment.kernels.tower_graph is not None:
        if graph_tower(experiment, model) and topology.is_main:  # with the final weights, before the loader's threads
            logger.info("the image tower runs as a CUDA graph of %d images", experiment.kernels.tower_graph)
        times.lap("graph of the image tower")
    if experiment.kernels.router_graph:
        number = graph_routers(experiment, model, topology)
        if topology.is_main:
            logger.info("%d routers of this process run as CUDA graphs", number)
        times.lap("graphs of routers")
    data = TrainingData(experiment, topology, tokenizer, plan=checked.plan, cursor=state.plan)
    heldout = HeldOut(experiment, topology, tokenizer, image=image_input(experiment), batches=held_out_batches)
    trainer = Trainer(
        experiment,
        run_dir,
        topology=topology,
        model=model,
        optimizer=optimizer,
        data=data,
        checkpointer=checkpointer,
        state=state,
        hooks=partial(
            standard_hooks,
            heldout=heldout,
            more=lambda trainer, monitor: more_hooks(trainer, monitor, checked.plan),
            extra=checked.extra_hooks,
            lock=lock,
        ),
        progress=progress,
    )
    times.lap("data and hooks")
    trainer.hooks.append(LogStart(trainer, times))
    return trainer


def note_samples(state: TrainState, found: dict[str, int], *, warn: bool) -> None:
    """Record how many samples each source has, and warn of sources that had another number when the run of this state was last started."""
    for name, count in found.items():
        before = state.num_samples.get(name, count)
        if warn and before != count:
            logger.warning(
                "source %s had %s samples and has %s now: its samples come in another order, so some may be repeated or left out",
                name,
                f"{before:,}",
                f"{count:,}",
            )
    state.num_samples = found


def _begin_with(checkpoint: Path, experiment: Experiment, topology: Topology, model: list[DistributedDataParallel]) -> None:
    """Load the weights of an earlier stage of training, and nothing else."""
    load_weights(experiment, topology, model, checkpoint)
    if topology.is_main:
        logger.info("initialised with the weights of %s", checkpoint)


def check(experiment: Experiment, run_dir: Path) -> Checked:
    """Open the data and check everything that can be checked without other processes.

    Raises ValueError that names the problem and the fix.
    """
    check_types(experiment)  # the command line has done so; other programs may not have
    check_no_secrets(experiment)
    if run_dir.resolve() == experiment.data.folder.resolve() and not (run_dir / CONFIG_FILE).exists():
        raise ValueError(f"the run directory {run_dir} is the data set of --data.path: choose another --run-dir for the run's files")
    experiment = with_absolute_references(experiment)
    hooks = find_hooks(experiment)
    check_shapes(experiment, topologies.world_size())
    check_machine(experiment)
    tokenizer = fitting_tokenizer(experiment)
    # Only the main process checks shards and checkpoints. The others meanwhile wait for it to join them; if a check fails, the launcher
    # ends them.
    is_main = int(os.environ.get("RANK", "0")) == 0
    plan = make_plan(experiment, split=TRAINING, check=is_main)
    experiment = as_indexed(experiment, plan.indexes)
    if is_main:
        _check_for_all(experiment, run_dir)
    return Checked(experiment, tokenizer, plan, hooks)


def fitting_tokenizer(experiment: Experiment) -> Tokenizer:
    """The run's tokenizer. Raises ValueError if it cannot be opened, or has more tokens than the model has rows for."""
    tokenizer, decoder = open_tokenizer(experiment), experiment.model.decoder
    if tokenizer.vocab_size > decoder.num_tokens:
        padding = f" with {decoder.padding_rows} padding rows" if decoder.padding_rows else ""
        raise ValueError(
            f"tokenizer {experiment.data.tokenizer_path} has {tokenizer.vocab_size} tokens, but model.decoder.vocab_size is "
            f"{decoder.vocab_size}{padding}: raise it (--model.decoder.vocab-size {decoder.rows_for(tokenizer.vocab_size)}), or use a "
            "smaller tokenizer"
        )
    return tokenizer


def _check_for_all(experiment: Experiment, run_dir: Path) -> None:
    """Checks that the main process makes for all others."""
    if experiment.eval.interval and (experiment.data.folder / HELD_OUT).is_dir():
        make_plan(with_held_out_sources(experiment), split=HELD_OUT)  # fails now, not after the first thousand steps
        tell_missing_sources(experiment.data)
    newest = newest_described_checkpoint(run_dir)
    if newest is not None:
        check_same_model(experiment, newest)
        check_same_tokenizer(experiment, newest, resumes=True)
    if experiment.init_from is not None and newest is None:
        check_beginning(experiment, experiment.init_from)


def check_beginning(experiment: Experiment, init_from: Path, *, tokenizer: bool = True) -> None:
    """Raise ValueError if there is no checkpoint with whose weights (and `tokenizer`) this run can start."""
    beginning = find_checkpoint(init_from)
    check_same_model(experiment, beginning, with_optimizer=False)
    if tokenizer:
        check_same_tokenizer(experiment, beginning)


def check_no_secrets(experiment: Experiment) -> None:
    """Raise ValueError if an option contains a secret, because options are written to the run's files and to every checkpoint. The error
    names the field, and not its value."""
    for name, value in flat(to_dict(experiment)):
        if contains_secret(value):
            raise ValueError(
                f"{name} seems to contain a password or a key, which would be written to the run's files: set it in the environment, "
                "or in the store's own configuration"
            )


def find_hooks(experiment: Experiment) -> list[Callable[[Trainer], Hook]]:
    """What makes the hooks that the experiment names. Raises ValueError if one of them is not there or not a hook."""
    return [_hook(name) for name in experiment.extra_hooks]


def _hook(name: str) -> Callable[[Trainer], Hook]:
    """The class or function that makes a hook of `extra_hooks` from the trainer. Raises ValueError if it is neither."""
    found: Callable[[Trainer], Hook] = load_object(name)
    if not callable(found) or (isinstance(found, type) and not issubclass(found, Hook)):
        raise ValueError(f"extra_hooks names {name}, which is not a hook: derive the class from megatron_mm.training.trainer.Hook")
    return found


def with_absolute_references(experiment: Experiment) -> Experiment:
    """The experiment with full paths of the files that it names, so that it can be resumed from any working directory."""
    return replace(
        experiment,
        extensions=tuple(map(absolute, experiment.extensions)),
        extra_hooks=tuple(map(absolute, experiment.extra_hooks)),
        data=replace(experiment.data, preprocessors=tuple(map(absolute, experiment.data.preprocessors))),
    )


def check_shapes(experiment: Experiment, world_size: int) -> None:
    """Check everything that needs neither data nor an earlier run: extensions, layout, freeze policy, and the batch on `world_size`
    processes. Raises ValueError."""
    load_extensions(experiment.extensions, where="the experiment")
    family_of(experiment.model).check_layout(experiment.model, experiment.parallel, world_size)
    trainable_patterns(experiment)
    micro_batches = experiment.num_micro_batches(experiment.parallel.data_parallel_size(world_size))
    parallel, profile = experiment.parallel, experiment.profile
    if profile.steps is not None and not all(0 <= rank < world_size for rank in profile.ranks):
        raise ValueError(
            f"profile.ranks is {list(profile.ranks)}, but there are {world_size} processes: use ranks from 0 to {world_size - 1}"
        )
    if parallel.virtual > 1 and micro_batches % parallel.pipeline:
        raise ValueError(
            f"the interleaved schedule needs micro-batches in multiples of parallel.pipeline {parallel.pipeline}, but a step has "
            f"{micro_batches} on each process: change train.global_batch_size or train.micro_batch_size"
        )
    if experiment.train.fewest_micro_batches and parallel.pipeline > 1:
        raise ValueError(
            f"train.fewest_micro_batches is True, but parallel.pipeline is {parallel.pipeline}: with fewer micro-batches, pipeline stages "
            "idle longer; use only one of the two"
        )
    if experiment.train.precision == "fp8":
        check_fp8(experiment)


def check_fp8(experiment: Experiment) -> None:
    """Raise ValueError if a width on a process is not a multiple of what FP8 products need: they pad nothing. (`Experiment.token_multiple`
    pads the tokens.)"""
    decoder, parallel = experiment.model.decoder, experiment.parallel
    parts = {
        "model.decoder.hidden_size": (decoder.hidden_size, 1),
        "model.decoder.ffn_hidden_size": (decoder.ffn_hidden_size, parallel.tensor),
        "model.decoder.num_attention_heads x head_dim": (decoder.num_attention_heads * decoder.head_dim, parallel.tensor),
        "(model.decoder.num_attention_heads + 2 num_query_groups) x head_dim": (
            (decoder.num_attention_heads + 2 * decoder.num_query_groups) * decoder.head_dim,
            parallel.tensor,
        ),
        **family_of(experiment.model).fp8_sizes(experiment.model, parallel),
    }
    for name, (size, degree) in parts.items():
        if size % (experiment.fp8_multiple * degree):
            raise ValueError(
                f"train.precision fp8 needs multiples of {experiment.fp8_multiple} on each process, but {name} is {size} and is split into "
                f"{degree}: change it or use --train.precision bf16"
            )
