"""Profiles a few steps of some processes: `--profile.steps 10:13 --profile.ranks 0,7`.

For each such process, `RUN_DIR/profile` receives a Chrome trace (chrome://tracing, https://ui.perfetto.dev), on a GPU a memory snapshot
(https://pytorch.org/memory_viz), and a text, which the main process also logs: the time of the step by part, next to the planner's
prediction. In the trace every phase, micro-batch and layer is a range with its name.

Module hooks, named timers and torch's profiler are installed at the first of these steps and removed after the last. Profiled steps are
slower; their times are recorded like those of other steps.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.utils import get_model_config

from megatron_mm.data.load.loader import StepBatch
from megatron_mm.training.phases import PHASES
from megatron_mm.training.spread_encoder import wrapped_modules
from megatron_mm.training.trainer import Batches, Hook, StepRecord, Trainer

logger = logging.getLogger(__name__)

FOLDER = "profile"
_LAYER = re.compile(r"(.*\.)?layers\.\d+")
_WHOLE = re.compile(r"vision|connector|resampler|patches|projector|language\.embedding|language\.output_layer")
"""Modules, other than layers, that have a range of their own, by their full name."""
_ROWS = 12
_PLANNED: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "forward and backward",
        ("encoder", "forward", "backward"),
        ("products", "attention", "element-wise kernels", "messages of layers", "host"),
    ),
    ("waits for other stages, other", ("p2p", "other"), ("pipeline bubble", "jitter")),
    ("gradient reduction", ("reduce",), ("gradient reduction",)),
    ("optimizer", ("optimizer",), ("optimizer", "parameter gather")),
    ("data", ("data", "share"), ()),
)
"""The parts of a step that are compared: title, measured phases, and parts of the prediction."""


class Profile(Hook):
    """Profiles the steps that the experiment names, on a rank that it names. It is the last of all hooks, so that a step's range begins
    where the step begins."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.config = trainer.experiment.profile
        assert self.config.first is not None and self.config.last is not None
        self.first, self.last = self.config.first, self.config.last
        self.ranges = NamedRanges(trainer)
        self._profiler: Any = None
        self._phases: list[dict[str, float]] = []
        self._step_range: Any = None
        self._maybe_begin(trainer.state.step + 1)

    def _maybe_begin(self, step: int) -> None:
        if step != self.first:
            return
        on_gpu = self.trainer.topology.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        if self._records_memory:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=self.config.memory, acc_events=True)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's tracer would print lines of its own
        self._profiler.start()
        self.ranges.install()
        self._open(step)

    def _open(self, step: int) -> None:
        self._step_range = torch.profiler.record_function(f"step {step}")
        self._step_range.__enter__()

    def after_step(self, record: StepRecord) -> None:
        if self._profiler is not None:
            self._step_range.__exit__(None, None, None)
            self.ranges.next_step()
            self._phases.append({**record.phases, "seconds": record.seconds})
            if record.step >= self.last:
                self._finish(record.step)
            else:
                self._open(record.step + 1)
        else:
            self._maybe_begin(record.step + 1)

    def after_training(self) -> None:
        if self._profiler is not None:
            self._finish(self.trainer.state.step)

    def close(self, *, failed: bool) -> None:
        if self._profiler is not None:
            self.ranges.remove()
            self._profiler.stop()
            self._profiler = None

    def _finish(self, step: int) -> None:
        """Write the profile. A full disk loses the profile, not the run."""
        self.ranges.remove()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder, rank = self.trainer.run_dir / FOLDER, self.trainer.topology.rank
        name = f"rank_{rank}_steps_{self.first}_{step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
            if self._records_memory:
                torch.cuda.memory._dump_snapshot(str(folder / f"{name}_memory.pickle"))
            text = "\n".join(self._report(profiler, step))
            (folder / f"{name}.txt").write_text(text + "\n")
            logger.info("%s\nwritten to %s", text, folder)
        except OSError as error:
            logger.warning("the profile cannot be written (%s): training continues", error)
        finally:
            if self._records_memory:
                torch.cuda.memory._record_memory_history(enabled=None)

    @property
    def _records_memory(self) -> bool:
        return self.config.memory and self.trainer.topology.device.type == "cuda"

    def _report(self, profiler: Any, step: int) -> Iterator[str]:
        steps = len(self._phases)
        yield f"profile of steps {self.first} to {step} on rank {self.trainer.topology.rank}: means of {steps} steps, slowed by profiling"
        predicted = next((found for hook in self.trainer.hooks if (found := hook.predicted_seconds())), {})
        yield from where_it_went(self._phases, predicted)
        on_gpu = self.trainer.topology.device.type == "cuda"
        events = profiler.key_averages()
        named = [event for event in events if event.key in self.ranges.names]
        yield ""
        yield from _table("named ranges", named, whole="device_time_total" if on_gpu else "cpu_time_total", steps=steps)
        operators = [event for event in events if event.key not in self.ranges.names and not re.fullmatch(r"step \d+", event.key)]
        yield ""
        yield from _table("operators, by their own time", operators, whole=_own(on_gpu), steps=steps)


def _own(on_gpu: bool) -> str:
    return "self_device_time_total" if on_gpu else "self_cpu_time_total"


def where_it_went(phases: Sequence[dict[str, float]], predicted: dict[str, float]) -> Iterator[str]:
    """Lines of a table: time of a step by part, measured and predicted.

    Args:
        phases: seconds by phase of each step, with the whole step as `seconds`.
        predicted: seconds by part, from `planning.step.Prediction`; empty if the planner does not know the device.
    """
    whole = sum(step["seconds"] for step in phases) / len(phases)
    yield f"{'':32}{'measured':>12}{'of step':>8}{'predicted':>12}{'ratio':>8}"
    for title, measured_parts, predicted_parts in _PLANNED:
        measured = sum(step.get(part, 0.0) for step in phases for part in measured_parts) / len(phases)
        yield _row(title, measured, whole, sum(predicted.get(part, 0.0) for part in predicted_parts) if predicted else None)
    yield _row("step", whole, whole, sum(predicted.values()) if predicted else None)
    if not predicted:
        yield "no prediction: the planner has no model of this device"
    means = {name: sum(step.get(name, 0.0) for step in phases) / len(phases) for name in PHASES}
    yield "phases: " + "  ".join(f"{name} {1e3 * value:.1f} ms" for name, value in means.items())


def _row(title: str, measured: float, whole: float, predicted: float | None) -> str:
    left = f"{title:32}{1e3 * measured:9.1f} ms{100 * measured / whole:7.1f}%"
    if predicted is None:
        return left
    ratio = f"{measured / predicted:8.2f}" if predicted > 1e-5 else f"{'':>8}"
    return f"{left}{1e3 * predicted:9.1f} ms{ratio}"


def _table(title: str, events: Sequence[Any], *, whole: str, steps: int) -> Iterator[str]:
    most = sorted(events, key=lambda event: -getattr(event, whole))[:_ROWS]
    yield f"{title:56}{'ms a step':>12}{'calls a step':>14}"
    for event in most:
        yield f"{event.key[:55]:56}{getattr(event, whole) / 1e3 / steps:12.2f}{event.count / steps:14.1f}"


# ------------------------------------------------------------------------------------------------------------ named ranges


class NamedRanges:
    """Names the ranges of a trace while a step runs: phases and micro-batches through the step's clock, layers through hooks of their
    modules."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.names: set[str] = set()
        """Names of all ranges so far."""
        self._handles: list[Any] = []
        self._passes: Counter[str] = Counter()
        self._backward: tuple[str, Any] | None = None
        """The layer whose backward pass is under way, and its range."""
        self._data: Batches | None = None

    def install(self) -> None:
        """Start naming ranges."""
        self.trainer.clock.name_ranges(self._label)
        self._data, self.trainer.data = self.trainer.data, _NamedData(self.trainer.data, self._new)
        for chunk in wrapped_modules(self.trainer.model):
            for name, module in chunk.module.named_modules():
                if _LAYER.fullmatch(name) or _WHOLE.fullmatch(name):
                    self._follow(module, self._title(name, module), backward=_LAYER.fullmatch(name) is not None)

    def remove(self) -> None:
        """Stop naming ranges, and leave the trainer as it was."""
        self.trainer.clock.name_ranges(None)
        if self._data is not None:
            self.trainer.data, self._data = self._data, None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def next_step(self) -> None:
        self._passes.clear()

    def _new(self, name: str) -> Any:
        self.names.add(name)
        return torch.profiler.record_function(name)

    def _label(self, phase: str) -> Any:
        """The range of a phase that begins; forward and backward passes carry the number of their micro-batch."""
        if phase not in ("forward", "backward"):
            return self._new(phase)
        number = self._passes[phase]
        self._passes[phase] += 1
        return self._new(f"{phase} {self._micro_batch(number, backward=phase == 'backward')}")

    def _micro_batch(self, number: int, *, backward: bool) -> str:
        """Micro-batch, and chunk, of the schedule's n-th pass, in megatron-core's order (`parallel.pipeline`)."""
        parallel = self.trainer.experiment.parallel
        if parallel.virtual == 1:
            return f"micro-batch {number}"
        count = self.trainer.experiment.num_micro_batches(self.trainer.topology.data_size)
        group = get_model_config(self.trainer.model[0]).microbatch_group_size_per_vp_stage
        table = get_schedule_table(count, parallel.virtual, group)
        micro_batch, chunk = table[number % len(table)]
        return f"micro-batch {micro_batch} chunk {parallel.virtual - 1 - chunk if backward else chunk}"

    def _title(self, name: str, module: torch.nn.Module) -> str:
        """Title of a module: decoder layers by their number in the whole model, counted from 0; others by their name."""
        number = getattr(module, "layer_number", None)
        return f"layer {number - 1}" if name.startswith("language.") and isinstance(number, int) else name

    def _follow(self, module: torch.nn.Module, title: str, *, backward: bool) -> None:
        opened: list[Any] = []

        def before(_: Any, args: Any, kwargs: Any) -> None:
            opened.append(self._new(f"{title} forward"))
            opened[-1].__enter__()
            if backward and (entering := _differentiable((*args, *kwargs.values()))) is not None:
                entering.register_hook(lambda _: self._end_backward(title))

        def after(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            opened.pop().__exit__(None, None, None)
            leaving = _differentiable(output if isinstance(output, tuple) else (output,))
            if backward and leaving is not None:
                leaving.register_hook(lambda _: self._begin_backward(title))

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _begin_backward(self, title: str) -> None:
        """Called when the gradient of a layer's output is ready. It is also the gradient of the next layer's input, so that layer's
        backward pass ends here."""
        self._end_backward(None)
        self._backward = title, self._new(f"{title} backward")
        self._backward[1].__enter__()

    def _end_backward(self, title: str | None) -> None:
        """End the open backward range if it is that of the layer `title`; None ends any."""
        if self._backward is not None and title in (None, self._backward[0]):
            self._backward[1].__exit__(None, None, None)
            self._backward = None


def _differentiable(values: Sequence[Any]) -> torch.Tensor | None:
    """The first tensor that requires a gradient; None if there is none."""
    return next((value for value in values if isinstance(value, torch.Tensor) and value.requires_grad), None)


class _NamedData:
    """Batches, with the wait for each as a named range."""

    def __init__(self, data: Batches, new: Callable[[str], Any]) -> None:
        self._data, self._new = data, new

    def __next__(self) -> StepBatch:
        with self._new("data"):
            return next(self._data)

    @property
    def cursor(self) -> dict[str, Any]:
        return self._data.cursor

    def close(self) -> None:
        self._data.close()


def profile_hooks(trainer: Trainer) -> list[Hook]:
    """The profiling hook, if this process is profiled; otherwise none. Warns if the run does not reach the first step to profile, or has
    trained it before it was resumed."""
    config = trainer.experiment.profile
    if config.first is None or trainer.topology.rank not in config.ranks:
        return []
    done, steps = trainer.state.step, trainer.experiment.train.steps
    if config.first <= done or config.first > steps:
        logger.warning(
            "profile.steps is %s, but this run trains from step %d to step %d: nothing is profiled. Give --profile.steps a first step "
            "between these",
            *(config.steps, done + 1, steps),
        )
        return []
    return [Profile(trainer)]
