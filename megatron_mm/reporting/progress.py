"""The progress of a run, read from its files, for a terminal: `megatron-mm watch` on any machine that can access the run directory.

Reading starts at the last megabyte of each file, so watching a run of a million steps costs no more than watching a new one.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_mm.reporting.charts import short
from megatron_mm.reporting.run_files import CONFIG, EVALUATIONS, EVENTS, LOCK_FILE, METRICS, PHASES

_TAIL_BYTES = 1 << 20
_KEPT = 600
"""Maximum number of steps from which the loss line is drawn."""
_QUIET_SECONDS = 120.0
"""Seconds without a new step after which the display mentions it, if they are also longer than ten steps."""
_START_SECONDS = 600.0
"""Seconds that a run may take until its directory exists."""
_STARTS_AGAIN = "the run has been started again: waiting for its first step"
GONE = "gone"
"""What `watch` returns for a run whose processes have disappeared without an event that says so."""
_WIDTH_OF_A_FILE = 1000
"""Characters per line if the output is not a terminal."""
_ENDS = {
    "end": "the run is finished",
    "stop": "the run has stopped: start the same command again to resume",
    "failed": "the run has failed",
}
"""Kinds of events that end a run."""
_BLOCKS = "▁▂▃▄▅▆▇█"


class Follower:
    """Reads the objects that are appended to a .jsonl file, beginning near its end. A file that was truncated (by a resume) is read
    again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = -1
        self._half = b""

    def new(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether the file was truncated, so that earlier objects are void; the new objects)."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return False, []
        again = self._place > size
        with self.path.open("rb") as file:
            if self._place < 0 or again:
                self._place = max(0, size - _TAIL_BYTES)
                self._half = b""
                file.seek(self._place)
                if self._place:
                    file.readline()  # the rest of a line
            else:
                file.seek(self._place)
            data = self._half + file.read()
            self._place = file.tell()
        *whole, self._half = data.split(b"\n")
        return again, [found for line in whole if (found := _object(line)) is not None]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


@dataclass
class Progress:
    """State of a run, read from its files."""

    run_dir: Path
    steps: int | None = None
    """`train.steps` of its newest start."""
    recipe: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of the newest steps."""
    held_out: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    held_since: float | None = None
    """When the process that holds the run directory started, in seconds since 1970; None if there is none."""

    def __post_init__(self) -> None:
        self._files = {name: Follower(self.run_dir / name) for name in (METRICS, EVALUATIONS, PHASES, EVENTS)}

    def update(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Read what is new; returns new (steps, events)."""
        self._read_config()
        again, steps = self._files[METRICS].new()
        if steps:
            first = steps[0]["step"]
            self.lines = [] if again else [line for line in self.lines if line["step"] < first]
            self.lines = [*self.lines, *steps][-_KEPT:]
        for name, attribute in ((EVALUATIONS, "held_out"), (PHASES, "phases")):
            _, found = self._files[name].new()
            if found:
                setattr(self, attribute, found[-1])
        _, events = self._files[EVENTS].new()
        self.events = [*self.events, *events][-200:]
        return steps, events

    def _read_config(self) -> None:
        try:
            config = json.loads((self.run_dir / CONFIG).read_text())
        except (OSError, json.JSONDecodeError):
            return
        if isinstance(config, dict) and isinstance(config.get("train"), dict):
            self.steps, self.recipe = config["train"].get("steps"), str(config.get("recipe", ""))

    @property
    def ended(self) -> str | None:
        """The kind of event that ended the run; None while it is running. Without events: "end" after the last step."""
        if self._newest_turn is not None:
            kind = str(self._newest_turn["kind"])
            return kind if kind in _ENDS and not self.starts_again else None
        return "end" if self.lines and self.steps is not None and self.lines[-1]["step"] >= self.steps else None

    @property
    def starts_again(self) -> bool:
        """Whether the run has ended, but its next start has begun since and has not yet written an event."""
        turn = self._newest_turn
        return turn is not None and turn["kind"] in _ENDS and (self.held_since or 0.0) > _mean([turn], "time")

    @property
    def _newest_turn(self) -> dict[str, Any] | None:
        """The newest event that started, resumed or ended the run."""
        return next((event for event in reversed(self.events) if event.get("kind") in (*_ENDS, "start", "resume")), None)

    def quiet(self, now: float) -> float | None:
        """Seconds since the newest step, if they are many for a run that continues; None if they are few, or no step has a time."""
        since = _mean(self.lines[-1:], "time")
        quiet = now - since if math.isfinite(since) else 0.0
        pace = _mean(self.lines[-20:], "seconds")
        return (
            quiet
            if self.ended is None and not self.starts_again and quiet > max(_QUIET_SECONDS, 10 * pace if math.isfinite(pace) else 0.0)
            else None
        )

    def display(self, *, width: int, now: float, gone: float | None = None) -> Iterator[str]:
        """Lines for a terminal; `gone` is when the run's processes gave their last sign of life, if they are gone."""
        yield f"{self.run_dir.resolve().name}  {self.recipe}"
        if not self.lines:
            yield "no step yet"
        else:
            yield from self._of_steps(width, now, gone)
        for event in self.events[-5:]:
            stamp = (
                time.strftime("%H:%M:%S", time.localtime(_mean([event], "time"))) if math.isfinite(_mean([event], "time")) else "--:--:--"
            )
            yield _printable(f"  {stamp} step {event['step']:,} {event.get('kind')}: {event.get('text')}")[:width]
        if self.ended is not None:
            yield _ENDS[self.ended]
        elif gone is not None:
            yield _gone(gone, now)
        elif self.starts_again:
            yield _STARTS_AGAIN

    def _of_steps(self, width: int, now: float, gone: float | None) -> Iterator[str]:
        last, recent = self.lines[-1], self.lines[-20:]
        pace, quiet = _mean(recent, "seconds"), self.quiet(now)
        yield progress_bar(last["step"], self.steps, pace=pace if quiet is None and gone is None else math.nan, width=width, now=now)
        held = self.held_out.get("heldout/loss")
        held_out = f"   held out {held:.4f} at step {self.held_out['step']:,}" if isinstance(held, int | float) else ""
        curve = sparkline([line.get("loss") for line in self.lines], width=min(40, max(8, width - 50)))
        yield f"loss     {_loss(last)}   {curve}{held_out}"[:width]
        used = f"   MFU {100 * _mean(recent, 'mfu'):.1f}%" if math.isfinite(_mean(recent, "mfu")) else ""
        yield f"speed    {short(_mean(recent, 'tokens_per_s'))} tokens/s   {pace:.3g} s a step{used}   (mean of {len(recent)} steps)"
        totals = [f"{short(last[f'total_{name}'])} {name}" for name in ("tokens", "images") if last.get(f"total_{name}")]
        lost = f"skipped {last.get('skipped_steps', 0)}   bad {_total(last.get('bad_samples'))}"
        yield f"seen     {'   '.join(totals) or 'not known'}   {lost}"
        yield f"norms    gradient {_number(last.get('grad_norm'), '.3f')}   learning rate {_number(last.get('lr'), '.2e')}"
        if isinstance(last.get("phases"), dict) and last["phases"]:
            whole = sum(last["phases"].values()) or 1.0
            shares = [f"{name} {100 * value / whole:.0f}%" for name, value in last["phases"].items() if value / whole >= 0.005]
            yield f"time     {'   '.join(shares)}"[:width]
        mine, most = (_mean([line], "memory_gb") for line in (last, self.phases))
        if self.phases.get("memory_rank") == 0:  # measured some steps ago
            mine = max(mine, most)
        memory = [f"{mine:.3g} GB on rank 0"] if mine > 0 else []
        if not most <= mine and math.isfinite(most):
            memory.append(f"most, {most:.3g} GB, on rank {self.phases.get('memory_rank')}")
        if memory:
            yield f"memory   {'   '.join(memory)}"
        slow = self.phases.get("slow")
        if isinstance(slow, dict):
            yield f"slow     rank {slow['rank']} in {slow['phase']}, by {slow['seconds']:.3g} s a step"
        if last.get("time"):
            late = "  no update: evaluating, saving, waiting, or dead" if quiet is not None and gone is None else ""
            yield f"newest   {duration(max(0.0, now - last['time']))} ago{late}"  # the clocks of two machines may differ


def progress_bar(step: int, steps: int | None, *, pace: float, width: int, now: float) -> str:
    """`[####----] 50 of 100 steps, 50%, 3 min left, until 12:34`; `pace` in seconds a step,
    NaN if nobody knows when the run will end."""
    if not steps:
        return f"step {step:,}"
    if step > steps:
        return f"step {step:,}, after the {steps:,} steps of train.steps"
    part = min(1.0, step / steps)
    cells = max(10, min(30, width - 60))
    left = pace * (steps - step)
    end = f", {duration(left)} left, until {time.strftime('%a %H:%M', time.localtime(now + left))}" if 0 < left < 1e8 else ""
    return f"[{'#' * int(part * cells):-<{cells}}] {step:,} of {steps:,} steps, {100 * part:.1f}%{end}"


def sparkline(values: list[Any], *, width: int) -> str:
    """A line of block characters, each the mean of equally many neighbouring values; blank if none of them is finite."""
    count = min(width, len(values))
    means = []
    for number in range(count):
        part = values[number * len(values) // count : (number + 1) * len(values) // count]
        finite = [value for value in part if isinstance(value, int | float) and math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    known = [value for value in means if math.isfinite(value)]
    if not known:
        return ""
    least, span = min(known), (max(known) - min(known)) or 1.0
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - least) / span * top)] if math.isfinite(value) else " " for value in means)


def duration(seconds: float) -> str:
    """A time in words: 75 s is `75 s`, 7500 s is `2 h 5 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"


def _mean(lines: list[dict[str, Any]], name: str) -> float:
    values = [value for line in lines if isinstance(value := line.get(name), int | float) and math.isfinite(value)]
    return sum(values) / len(values) if values else math.nan


def _loss(line: dict[str, Any]) -> str:
    """The loss as text. A step without supervised tokens has none, which is not an error."""
    if line.get("loss") is None and line.get("source_tokens") and not any(line["source_tokens"].values()):
        return "none (no supervised tokens)"
    return _number(line.get("loss"), ".4f")


def _printable(text: str) -> str:
    """Text without characters that a terminal would interpret: names in it come from data."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "not finite"


def _total(counts: Any) -> str:
    return f"{sum(counts.values()):,}" if isinstance(counts, dict) else "0"


def _gone(since: float, now: float) -> str:
    when = time.strftime("%a %H:%M:%S", time.localtime(since))
    return f"the run's processes have been gone since {when}, {duration(now - since)} ago: start the same command again to resume"


def watch(
    run_dir: Path,
    *,
    interval: float,
    once: bool = False,
    out: TextIO | None = None,
    gone_since: Callable[[Path], float | None] = lambda run_dir: None,
    held_since: Callable[[Path], float | None] = lambda run_dir: None,
) -> str | None:
    """Show a run until it ends; returns the kind of event that ended it, or `GONE`. A run that has written nothing yet is waited for.

    On a terminal, the display is redrawn in place. Elsewhere, a line is written for each new event and, every `interval` seconds, for the
    newest step, or for how long there has been none. Raises ValueError if run_dir is not a run directory.

    Args:
        gone_since: tells when the run's processes gave their last sign of life, if they are gone.
        held_since: tells when the process that holds the run directory started, if there is one.
    """
    out = sys.stdout if out is None else out
    _wait_for_start(run_dir, interval=interval, once=once, out=out, gone_since=gone_since)
    progress, drawn, mentioned = Progress(run_dir), 0, 0.0
    while True:
        gone, progress.held_since = (
            gone_since(run_dir),
            held_since(run_dir),
        )  # before the files are read: what the run wrote last is then shown
        steps, events = progress.update()
        now = time.time()
        if gone is not None:
            gone = max(gone, _mean(progress.lines[-1:], "time"))  # a step may have ended after the last beat of the lock
        if out.isatty() or once:
            width = shutil.get_terminal_size().columns if out.isatty() else _WIDTH_OF_A_FILE
            lines = list(progress.display(width=width, now=now, gone=gone))
            if drawn:
                out.write(f"\x1b[{drawn}A\x1b[J")
            out.write("\n".join(lines) + "\n")
            drawn = len(lines)
        else:
            for event in events:
                out.write(_printable(f"step {event['step']} {event.get('kind')}: {event.get('text')}") + "\n")
            quiet = progress.quiet(now) or 0.0
            if steps or quiet > 2 * mentioned:
                out.write(_one_line(progress, now, gone) + "\n")
                mentioned = quiet
            if gone is not None and progress.ended is None:
                out.write(_gone(gone, now) + "\n")
            if progress.starts_again and events:
                out.write(_STARTS_AGAIN + "\n")
        out.flush()
        ended = progress.ended or (GONE if gone is not None else None)
        if once or ended is not None:
            return ended
        time.sleep(interval)


def _wait_for_start(run_dir: Path, *, interval: float, once: bool, out: TextIO, gone_since: Callable[[Path], float | None]) -> None:
    """Wait until a run has written its first files, or has ended before. Raises ValueError if run_dir holds other files, or does not
    exist and does not appear."""
    said, began = False, time.monotonic()
    while not any((run_dir / name).is_file() for name in (CONFIG, METRICS)):
        missing = not run_dir.exists()
        others = [] if missing else sorted(path.name for path in run_dir.iterdir()) if run_dir.is_dir() else [run_dir.name]
        if any(name != EVENTS and LOCK_FILE not in name for name in others):
            raise ValueError(f"{run_dir} is not a run directory: it has neither {METRICS} nor {CONFIG}, but {', '.join(others[:3])}")
        if missing and (once or not run_dir.absolute().parent.is_dir() or time.monotonic() - began > _START_SECONDS):
            raise ValueError(f"run directory {run_dir} does not exist: specify the --run-dir of the run")
        if not said:
            out.write(f"{run_dir} {'does not exist' if missing else 'is empty'} yet: waiting for a run to start (Ctrl-C to end)\n")
            out.flush()
            said = True
        if once or gone_since(run_dir) is not None:
            return
        time.sleep(interval)


def _one_line(progress: Progress, now: float, gone: float | None) -> str:
    last, recent, quiet = progress.lines[-1], progress.lines[-20:], progress.quiet(now)
    pace = _mean(recent, "seconds") if quiet is None and gone is None else math.nan
    bar = progress_bar(last["step"], progress.steps, pace=pace, width=0, now=now).partition("] ")
    late = f"  newest step {duration(quiet)} ago" if quiet is not None else ""
    return f"{bar[2] or bar[0]}  loss {_loss(last)}  {short(_mean(recent, 'tokens_per_s'))} tokens/s{late}"
