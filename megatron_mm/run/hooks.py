"""The standard hooks of a run: metrics, checkpoints, evaluation, stopping on a signal, garbage collection.

Hooks run after every step on every process, in the order of `standard_hooks`. A hook that communicates with other processes does so on all
of them in the same steps.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch

from megatron_mm.data.load.loader import StepBatch
from megatron_mm.evaluation.heldout import SPLIT as HELD_OUT
from megatron_mm.evaluation.heldout import HeldOut
from megatron_mm.families.registry import family_of
from megatron_mm.flops import StepWork, mfu, peak_tflops
from megatron_mm.reporting.monitor import Monitor
from megatron_mm.reporting.run_files import EXPERTS
from megatron_mm.run.fault_hooks import HoldsRunDirectory, LossSpikes, NonFiniteSteps, ReplicaChecksums
from megatron_mm.run.interrupts import Interrupts
from megatron_mm.run.lock import RunLock
from megatron_mm.run.profiling import profile_hooks
from megatron_mm.run.slow_processes import SlowProcesses
from megatron_mm.run.step_measures import Norms, balance, is_due, memory_gb
from megatron_mm.run.watchdog import is_lost_contact
from megatron_mm.training.checkpoint.room import missing_room
from megatron_mm.training.metrics import StepMetrics
from megatron_mm.training.routing import RoutingStats, draw_expert_load
from megatron_mm.training.tower_graph import graphed_tower
from megatron_mm.training.trainer import Hook, StepRecord, Trainer

logger = logging.getLogger(__name__)

STOPPED_FILE = "stopped_early.txt"
"""File in the run directory of a run that a signal ended with steps left: one line that names the last step. It is removed when the run
resumes."""


class Metrics(Hook):
    """Writes the metrics of every step to metrics.jsonl, the console, W&B and the other sinks of `Monitor`."""

    def __init__(self, trainer: Trainer, norms: Norms) -> None:
        super().__init__(trainer)
        experiment, topology = trainer.experiment, trainer.topology
        self.norms = norms
        self.sources = experiment.data.sources
        device_name = torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else "cpu"
        self.peak = experiment.monitor.peak_tflops or peak_tflops(device_name, experiment.train.precision)
        self.monitor = Monitor(
            experiment, trainer.run_dir, resume_step=trainer.state.step, world_size=topology.world_size, is_main=topology.is_main
        )
        self.bad_samples = torch.zeros(len(self.sources), dtype=torch.int64, device=topology.device)

    def after_step(self, record: StepRecord) -> None:
        trainer, plan, result = self.trainer, record.batch.plan, record.result
        work = StepWork(num_tokens=plan.num_tokens, sum_squared_lengths=plan.sum_squared_lengths, num_images=plan.num_images)
        model, policy = trainer.experiment.model, trainer.experiment.train.freeze_policy
        flops = family_of(model).step_flops(model, policy, work)
        tflops = flops / record.seconds / trainer.topology.world_size / 1e12
        looks = is_due(record.step, trainer.experiment.monitor.detail_interval) and trainer.topology.is_main
        self.monitor.log_step(
            StepMetrics(
                step=record.step,
                loss=result.losses.mean,
                losses=result.losses.by_source(self.sources),
                grad_norm=result.update.grad_norm,
                lr=result.lr,
                tokens=plan.num_tokens,
                images=plan.num_images,
                seconds=record.seconds,
                tokens_per_s=plan.num_tokens / record.seconds,
                tflops=tflops,
                mfu=mfu(tflops, self.peak),
                skipped=result.update.skipped,
                skipped_steps=trainer.state.skipped_steps,
                bad_samples=self._bad_samples(record),
                fill=plan.fill,
                tower_blanks=round(record.told[self][-1]),
                data_seconds=record.data_seconds,
                experts=result.routing.summary() if result.routing is not None else {},
                source_tokens=dict(zip(self.sources, result.losses.tokens, strict=True)),
                time=time.time(),
                total_tokens=trainer.state.tokens,
                total_images=trainer.state.images,
                memory_gb=memory_gb(trainer.topology.device),
                phases=record.phases,
                balance=balance(record.batch, data_size=trainer.topology.data_size) if looks else None,
                **self.norms.of_step,
            )
        )

    def tell(self, batch: StepBatch) -> tuple[float, ...]:
        graphed = graphed_tower(self.trainer.model)
        blanks = 0 if graphed is None else graphed.take_blanks()
        return (*(float(batch.bad.get(name, 0)) for name in self.sources), float(blanks))

    def _bad_samples(self, record: StepRecord) -> dict[str, int]:
        """Number of samples that have failed so far, by source, over all processes."""
        total = self.trainer.state.bad_samples
        for name, count in zip(self.sources, record.told[self][:-1], strict=True):
            total[name] = total.get(name, 0) + round(count)
        return {name: count for name, count in total.items() if count}

    def close(self, *, failed: bool) -> None:
        state, steps = self.trainer.state, self.trainer.experiment.train.steps
        how = ("failed", f"after step {state.step}{_reason(sys.exception())}") if failed else end_of(state.step, steps)
        self.monitor.close(exit_code=int(failed), events_of_end=[how])


def end_of(step: int, steps: int) -> tuple[str, str]:
    """Kind and text of the event of a run's end after a step. A run may already be beyond its `train.steps`, if they were reduced."""
    if step < steps:
        return "stop", f"stopped after step {step} of {steps}"
    return "end", f"all {steps} steps are done" if step == steps else f"step {step} is done, more than the {steps} of train.steps"


def _reason(error: BaseException | None) -> str:
    if error is None:
        return ""
    return ": another process does not answer" if is_lost_contact(error) else f": {type(error).__name__}: {error}"


class Evaluation(Hook):
    """Computes held-out losses and generates captions every `eval.interval` steps and at the end."""

    def __init__(self, trainer: Trainer, monitor: Monitor, heldout: HeldOut) -> None:
        super().__init__(trainer)
        self.monitor = monitor
        self.config = trainer.experiment.eval
        self.heldout = heldout
        self.last_step = trainer.state.step

    def after_step(self, record: StepRecord) -> None:
        if self.config.interval and record.step % self.config.interval == 0:
            self._evaluate()

    def after_training(self) -> None:
        # After a signal there may be little time, and the checkpoint has priority: the resumed run evaluates.
        if self.config.interval and self.trainer.state.step > self.last_step and not self.trainer.should_stop:
            self._evaluate()

    def _evaluate(self) -> None:
        step = self.last_step = self.trainer.state.step
        self.trainer.gather_weights()  # generation reads some weights without calling their modules
        if self.config.batches:
            losses = self.heldout.losses(self.trainer.step)
            self.monitor.log_eval(step, losses)
            self._remember_best(losses.get(f"{HELD_OUT}/loss"))
        if self.config.samples:
            self.monitor.log_captions(step, self.heldout.captions(self.trainer.model))

    def _remember_best(self, loss: float | None) -> None:
        state = self.trainer.state
        if self.trainer.experiment.checkpoint.best and loss is not None and loss < (state.best_heldout or math.inf):
            state.best_heldout, state.best_step = loss, state.step


class ExpertLoad(Hook):
    """Draws a heat map of the experts' tokens, in `expert_load.png` and W&B, every `eval.interval` steps and at the end."""

    def __init__(self, trainer: Trainer, monitor: Monitor) -> None:
        super().__init__(trainer)
        self.monitor = monitor
        self.seen: list[RoutingStats] = []
        self.warns_from = 0

    def after_step(self, record: StepRecord) -> None:
        if record.result.routing is not None:
            self.seen.append(record.result.routing)
            self._warn_of_collapse(record.result.routing, step=record.step)
        interval = self.trainer.experiment.eval.interval
        if interval and record.step % interval == 0:
            self._draw()

    def after_training(self) -> None:
        self._draw()

    def _warn_of_collapse(self, routing: RoutingStats, *, step: int) -> None:
        """Warn about dropped choices of experts, at most every 100 steps. (metrics.jsonl counts all of them, as `dropped_tokens`.)"""
        bound = self.trainer.experiment.parallel.max_expert_load
        if bound is None or step < self.warns_from or not routing.dropped.sum() or not self.trainer.topology.is_main:
            return
        worst = int(routing.dropped.argmax())
        logger.warning(
            "step %d: %d of %d expert choices were dropped, %d of them in layer %d, where the experts of one process would have "
            "received more than %g equal shares (parallel.max_expert_load): the router may be collapsing, see the load-balance loss",
            step,
            routing.dropped.sum(),
            routing.chosen_per_expert.sum(),
            routing.dropped[worst],
            routing.layers[worst],
            bound,
        )
        self.warns_from = step + 100

    def _draw(self) -> None:
        if self.seen and self.trainer.topology.is_main:
            step = self.trainer.state.step
            tokens = np.sum([stats.tokens_per_expert for stats in self.seen], axis=0)
            title = f"expert load, steps {step - len(self.seen) + 1} to {step}"
            load = {"first_step": step - len(self.seen) + 1, "layers": list(self.seen[0].layers), "tokens": tokens.astype(int).tolist()}
            self.monitor.log_details(EXPERTS, step, load)
            out = self.trainer.run_dir / "expert_load.png"
            try:
                self.monitor.log_picture(step, "expert_load", draw_expert_load(tokens, self.seen[0].layers, out, title=title))
            except OSError as error:
                logger.warning("%s cannot be written (%s): training continues", out, error)
        self.seen = []


class Stopping(Hook):
    """Ends the run on SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) after the current step, with a checkpoint; all processes stop after the same
    step.

    Slurm sends USR1 some time before the time limit. Signals reach processes at different steps, so the processes agree on when to stop. A
    run that ends this way with steps left writes `STOPPED_FILE`, which tells `examples/launch.sh` to requeue the job.

    Slurm signals every process of a job. A signal in the middle of a save would kill the helper processes of the checkpoint writers, so
    this thread blocks these signals: the processes that it starts inherit the mask across exec, whereas they would lose a handler. A signal
    then either stays pending until `tell` checks for it, or is delivered to an older thread and runs the handler. A thread of its own
    (`Interrupts`) takes Ctrl-C.

    A launcher that is killed outright forwards no signal, and its processes would continue to train unnoticed. They therefore treat the end
    of their launcher as a signal.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.received: str | None = None
        self.agreed = False
        """Whether any process received a signal."""
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        """PID of the torchrun process that started this one; None without torchrun."""
        self.file = trainer.run_dir / STOPPED_FILE
        if trainer.topology.is_main:
            self.file.unlink(missing_ok=True)
        self.unblocked = set(self.SIGNALS) - signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGINT})
        resource_tracker.ensure_running()  # starting it unblocks SIGTERM in this thread: now, not in the first save
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        self.interrupts = Interrupts(lambda: self._note(signal.SIGINT), launcher=self.launcher)
        # Last, because other threads run the handler although this one blocks the signals.
        self.previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            self.interrupts.unknown_sender()
        else:
            self._note(number)

    def _note(self, number: int) -> None:
        self.received = signal.Signals(number).name

    def tell(self, batch: StepBatch) -> tuple[float, ...]:
        waiting = signal.sigtimedwait({signal.SIGTERM, signal.SIGUSR1}, 0)
        if waiting is not None:
            self._note(waiting.si_signo)
        if self.received is None and self.launcher is not None and os.getppid() != self.launcher:
            self.received = "the end of its launcher"
        return (float(self.received is not None),)

    def after_step(self, record: StepRecord) -> None:
        if any(record.told[self]):
            self.agreed = self.trainer.should_stop = True
            if self.trainer.topology.is_main:
                logger.warning(
                    "stopping after step %d on %s; start the same command again to resume", record.step, self.received or "a signal"
                )

    def close(self, *, failed: bool) -> None:
        """Write `STOPPED_FILE` if a signal ended the run with steps left, and restore the signal handlers. The checkpoint is complete by
        now."""
        step, steps = self.trainer.state.step, self.trainer.experiment.train.steps
        if self.trainer.should_stop and not failed and step < steps and self.trainer.topology.is_main:
            if self.agreed:
                self.file.write_text(f"stopped after step {step} of {steps} on {self.received or 'a signal'}\n")
            else:
                logger.warning("stopped at step %d of %d by %s", step, steps, type(self.trainer.stopped_by).__name__)
        self.interrupts.close()
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_IGN)  # discards a pending signal
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number} & self.unblocked)
            signal.signal(number, handler)


class Checkpoints(Hook):
    """Saves a checkpoint every `checkpoint.interval` steps, at the end, and, with `checkpoint.best`, when the held-out loss is the lowest
    so far. Warns once if there is no room for the next ones."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.looked_at: int | None = None
        """Step of the checkpoint after which the disk was looked at last."""
        self.warned = False

    def tell(self, batch: StepBatch) -> tuple[float, ...]:
        return self.trainer.checkpointer.tell()

    def after_step(self, record: StepRecord) -> None:
        config, checkpointer, state = self.trainer.experiment.checkpoint, self.trainer.checkpointer, self.trainer.state
        checkpointer.poll(record.told[self])
        self._look_at_disk(record.step)
        if record.step % config.interval == 0 or state.best_step == record.step:
            checkpointer.save(state)
        elif config.memory is not None and record.step % config.memory_interval == 0:
            checkpointer.keep_in_memory(state)

    def _look_at_disk(self, step: int) -> None:
        saved, experiment = self.trainer.checkpointer.saved_step, self.trainer.experiment
        if saved == self.looked_at or self.warned or not self.trainer.topology.is_main:
            return
        self.looked_at = saved
        saves_left = math.ceil((experiment.train.steps - step + 1) / experiment.checkpoint.interval)
        if warning := missing_room(self.trainer.run_dir, config=experiment.checkpoint, saves_left=saves_left):
            self.warned = True
            logger.warning(warning)

    def after_training(self) -> None:
        checkpointer, step = self.trainer.checkpointer, self.trainer.state.step
        checkpointer.save(self.trainer.state)
        checkpointer.finish()
        if checkpointer.saved_step != step:
            raise ValueError(  # the command line prints it as one line
                f"the last checkpoint, of step {step}, could not be written (the reason is in the log): free some space and start the same "
                f"command again, which repeats the steps since {checkpointer.saved_step or 0}"
            )
        checkpointer.close()


class GarbageCollection(Hook):
    """Collects garbage on all processes at the same steps: a process that pauses alone makes all others wait."""

    INTERVAL = 100

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        gc.collect()
        gc.disable()

    def after_step(self, record: StepRecord) -> None:
        if record.step % self.INTERVAL == 0:
            gc.collect()

    def close(self, *, failed: bool) -> None:
        gc.enable()


def standard_hooks(
    trainer: Trainer,
    *,
    heldout: HeldOut,
    more: Callable[[Trainer, Monitor], Sequence[Hook]] = lambda trainer, monitor: [],
    extra: Sequence[Callable[[Trainer], Hook]] = (),
    lock: RunLock | None = None,
) -> list[Hook]:
    """The hooks of every run, in the order in which they see a step: a stop is known before a checkpoint is due.

    Args:
        more: makes the hooks that a command adds.
        extra: make the hooks that the experiment names. Like those of `more`, they see a step after its metrics are written and before its
            checkpoint is, so the checkpoint contains what they change.
        lock: lock on the run directory, on the first process.
    """
    norms = Norms(trainer)
    metrics = Metrics(trainer, norms)
    return [
        norms,
        HoldsRunDirectory(trainer, lock),
        metrics,
        SlowProcesses(trainer, metrics.monitor),
        *more(trainer, metrics.monitor),
        *(make(trainer) for make in extra),
        Stopping(trainer),
        NonFiniteSteps(trainer),
        LossSpikes(trainer),
        *([ReplicaChecksums(trainer)] if trainer.experiment.train.checksum_interval else []),
        Evaluation(trainer, metrics.monitor, heldout),
        ExpertLoad(trainer, metrics.monitor),
        Checkpoints(trainer),
        GarbageCollection(trainer),
        *profile_hooks(trainer),
    ]
