"""The time of a step on this process by phase, measured without waiting for the device.

megatron-core starts and stops named timers around each forward pass, backward pass, message between stages and gradient reduction
(`config.timers`), and `StepClock` takes the place of these timers. On a CPU, phases are timed with the host's clock. On a GPU, the time is
measured between two events of the stream. They are read after the step's single message has arrived: the device has then passed them, so
nothing waits. The update is still running at that time, so on a GPU the `optimizer` time of a step is that of the previous step.

    data        wait for this process's own images and texts
    share       sending texts from the process that read them to the others of its model copy
    encoder     forward and backward of the image encoder, if it is spread over all pipeline ranks (`training.spread_encoder`)
    forward, backward   passes of all micro-batches, including messages inside the layers (tensor and expert parallelism)
    p2p         messages to other pipeline stages, and the wait for them. Where stages interleave on a GPU, this overlaps with the passes
                and the wait is in `other`
    reduce      reduction of gradients over data parallelism, unless hidden by the backward pass, and the step's single message
    optimizer   gradient norm, update, gather of parameters
    other       the rest of the step
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.utils import get_model_config

from megatron_mm.training.spread_encoder import spread_encoder

PHASES = ("data", "share", "encoder", "forward", "backward", "p2p", "reduce", "optimizer", "other")
PASSES = ("forward", "backward")
OWN_WORK = ("data", "encoder", *PASSES, "optimizer")
"""Phases in which a process does not wait for another one, tensor and expert parallelism aside."""


class StepClock:
    """Adds up the seconds of the phases of a step."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._timers: dict[str, _Timer] = {phase: self._timer() for phase in PHASES}
        self._nothing = _Nothing()
        self._waits: dict[str, _Timer] = {name: self._timer() for name in PASSES}

    def watch(self, model: Sequence[torch.nn.Module]) -> None:
        """Install this clock as the timers of these chunks' schedules."""
        for chunk in model:
            config = get_model_config(chunk)
            config.timers = self
            spread = spread_encoder([chunk])
            if spread is not None:
                spread.phase = self.phase
            finalize = config.finalize_model_grads_func
            if finalize is not None and not hasattr(finalize, "timed"):
                config.finalize_model_grads_func = self._timed_reduction(finalize)

    def _timed_reduction(self, finalize: Any) -> Any:
        beside = getattr(finalize, "keywords", {}).get("beside")

        def timed(*args: Any, **kwargs: Any) -> Any:
            if beside is not None:
                beside.backward()  # timed as phases of its own; when the reduction calls it again, it does nothing
            with self.phase("reduce"):
                return finalize(*args, **kwargs)

        timed.timed = True  # type: ignore[attr-defined]
        return timed

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        """Return the timer that megatron-core requests by name. Its timers inside the reduction of gradients are part of our `reduce`."""
        if name == "forward-compute":
            return self._timers["forward"]
        if name == "backward-compute":
            return self._timers["backward"]
        return self._timers["p2p"] if name.endswith(("-send", "-recv")) else self._nothing

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the enclosed code as part of a phase."""
        timer = self._timers[name]
        timer.start()
        try:
            yield
        finally:
            timer.stop()

    def begin_step(self) -> None:
        """Discard times measured outside of steps, such as evaluations."""
        for name, timer in self._timers.items():
            timer.clear(keep_pending=name == "optimizer")

    def end_step(self, *, seconds: float, data: float, share: float) -> dict[str, float]:
        """Return the seconds of each phase of the finished step. They sum to `seconds`, unless device phases overlap with host phases."""
        found = {name: timer.take() for name, timer in self._timers.items()}
        found["data"], found["share"] = data, share
        found["other"] = max(0.0, seconds - sum(found.values()))
        return found

    def wait_timer(self) -> PassWaits:
        """Return a timer of the waits inside passes (`platform.message_times`); it counts for the current pass."""
        return PassWaits(self._timers, self._waits)

    def take_waits(self) -> dict[str, float]:
        """Return the seconds during which `wait_timer` ran in the finished step, by pass."""
        return {name: timer.take() for name, timer in self._waits.items()}

    def name_ranges(self, new: Callable[[str], Any] | None) -> None:
        """From now on, also enter the context manager `new(phase)` during each phase, to mark it in a trace; None turns this off."""
        plain = {name: timer.timer if isinstance(timer, _Named) else timer for name, timer in self._timers.items()}
        self._timers = plain if new is None else {name: _Named(timer, partial(new, name)) for name, timer in plain.items()}

    def _timer(self) -> _Timer:
        return _EventTimer() if self._on_gpu else _Timer()


class _Timer:
    """Sums the seconds between starts and stops, on the host's clock."""

    def __init__(self) -> None:
        self._total, self._began = 0.0, 0.0
        self.is_running = False

    def start(self, barrier: bool = False) -> None:
        self.is_running = True
        self._began = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        self._total += time.perf_counter() - self._began
        self.is_running = False

    def clear(self, *, keep_pending: bool) -> None:
        self._total = 0.0

    def take(self) -> float:
        total, self._total = self._total, 0.0
        return total


class _EventTimer(_Timer):
    """Sums the seconds between events of the current stream; events are reused."""

    def __init__(self) -> None:
        super().__init__()
        self._free: list[Any] = []
        self._open: Any = None
        self._pairs: list[tuple[Any, Any]] = []

    def _recorded(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, barrier: bool = False) -> None:
        self.is_running = True
        self._open = self._recorded()

    def stop(self, barrier: bool = False) -> None:
        self._pairs.append((self._open, self._recorded()))
        self.is_running = False

    def clear(self, *, keep_pending: bool) -> None:
        if not keep_pending:
            self._free += [event for pair in self._pairs for event in pair]
            self._pairs = []

    def take(self) -> float:
        """Return the seconds of the event pairs that the device has passed; the others count in the next call."""
        total, pending = 0.0, []
        for begin, end in self._pairs:
            if end.query():
                total += begin.elapsed_time(end) / 1e3
                self._free += [begin, end]
            else:
                pending.append((begin, end))
        self._pairs = pending
        return total


class _Named(_Timer):
    """A timer that also opens a range of a trace while it runs."""

    def __init__(self, timer: _Timer, new: Callable[[], Any]) -> None:
        super().__init__()
        self.timer, self._new, self._range = timer, new, contextlib.nullcontext()

    def start(self, barrier: bool = False) -> None:
        self._range = self._new()
        self._range.__enter__()
        self.is_running = True
        self.timer.start()

    def stop(self, barrier: bool = False) -> None:
        self.timer.stop()
        self.is_running = False
        self._range.__exit__(None, None, None)

    def clear(self, *, keep_pending: bool) -> None:
        self.timer.clear(keep_pending=keep_pending)

    def take(self) -> float:
        return self.timer.take()


class PassWaits:
    """Runs the wait timer of the current pass; outside of passes it does nothing."""

    def __init__(self, passes: dict[str, _Timer], waits: dict[str, _Timer]) -> None:
        self._passes, self._waits = passes, waits
        self._running: _Timer | None = None

    def start(self) -> None:
        self._running = next((self._waits[name] for name in PASSES if self._passes[name].is_running), None)
        if self._running is not None:
            self._running.start()

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = None


class _Nothing:
    """A timer that measures nothing."""

    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass
