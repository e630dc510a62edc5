"""Fit the planner's constants again on half of the published measurements, and report the error on the other half.

    python benchmarks/planning_constants.py [--rounds 2] [--of-each 3]

This is a coordinate search over the few constants that no data sheet states: each is moved a few percent either way as long as the mean
error of the rows used for fitting falls. Within each source, every second group of rows (a model on a GPU in a precision) is held out.
Prints the constants in use and the fitted ones, and the errors of both halves with both.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mm.planning import costs, network, step
from megatron_mm.planning.hardware import AMPERE, HOPPER, STACKS
from megatron_mm.planning.measurements import Measurement, read_measurements
from megatron_mm.planning.step import StepModel

ANCHORS = Path(__file__).parent / "anchors" / "throughput.csv"

Constants = dict[str, float]


def in_use() -> Constants:
    """Return the constants in use by name: an architecture's efficiency, a stack's property, or a module's constant."""
    return {
        "hopper.product": HOPPER.product,
        "hopper.product_fp8": HOPPER.product_fp8,
        "hopper.attention": HOPPER.attention,
        "ampere.product": AMPERE.product,
        "ampere.attention": AMPERE.attention,
        "hopper.memory": HOPPER.memory,
        "llm-foundry.moved": STACKS["llm-foundry"].moved,
        "megatron-2021.moved": STACKS["megatron-2021"].moved,
        "fsdp-compiled.moved": STACKS["fsdp-compiled"].moved,
        "nemo.hides_tensor_messages": STACKS["nemo"].hides_tensor_messages,
        "costs.PRODUCT_FILL": costs.PRODUCT_FILL,
        "costs.WAVE_SHARE": costs.WAVE_SHARE,
        "network.NIC_RATE": network.NIC_RATE,
        "step.JITTER": step.JITTER,
    }


@contextmanager
def modules_with(constants: Constants) -> Iterator[None]:
    """Set the modules' constants inside the context."""
    places: dict[str, Any] = {"costs": costs, "network": network, "step": step}
    before = []
    for name, value in constants.items():
        where, _, what = name.partition(".")
        if where in places:
            before.append((places[where], what, getattr(places[where], what)))
            setattr(places[where], what, value)
    try:
        yield
    finally:
        for place, what, value in before:
            setattr(place, what, value)


def with_constants(row: Measurement, constants: Constants) -> Measurement:
    """Return the row with its jobs on a GPU and a stack that have these constants."""
    jobs = []
    for job in row.jobs:
        architecture = "ampere" if job.gpu.multiprocessors == 108 else "hopper"
        scale = job.gpu.efficiency.product / (AMPERE if architecture == "ampere" else HOPPER).product  # a lower power limit
        chosen = {name.partition(".")[2]: value for name, value in constants.items() if name.startswith(f"{architecture}.")}
        chosen = {name: value * (1.0 if name == "memory" else scale) for name, value in chosen.items()}
        stack = next(name for name, software in STACKS.items() if software.name == job.software.name)
        software = {name.partition(".")[2]: value for name, value in constants.items() if name.startswith(f"{stack}.")}
        gpu = replace(job.gpu, efficiency=replace(job.gpu.efficiency, **chosen))
        jobs.append(replace(job, gpu=gpu, software=replace(job.software, **software)))
    return replace(row, jobs=tuple(jobs))


def errors(rows: list[Measurement], constants: Constants) -> list[float]:
    """Return |log(predicted / measured)| of each row."""
    found = []
    with modules_with(constants):
        for row in rows:
            assert row.step_seconds is not None
            found.append(abs(math.log(with_constants(row, constants).predict().seconds / row.step_seconds)))
    return found


def halves(of_each: int) -> tuple[list[Measurement], list[Measurement]]:
    """Return (rows to fit, rows held out), a few of each group; a row without a layout gets one, chosen with the constants in use."""
    rows = [row for row in read_measurements(ANCHORS) if isinstance(row, Measurement) and row.step_seconds]
    order: dict[str, list[str]] = {}
    parts: tuple[list[Measurement], list[Measurement]] = ([], [])
    count: dict[str, int] = {}
    for row in rows:
        groups = order.setdefault(row.source, [])
        if row.group not in groups:
            groups.append(row.group)
        if count.setdefault(row.group, 0) >= of_each:
            continue
        count[row.group] += 1
        parts[groups.index(row.group) % 2].append(_settled(row))
    return parts


def _settled(row: Measurement) -> Measurement:
    if len(row.jobs) == 1:
        return row
    wanted = row.predict().seconds
    return replace(row, jobs=tuple(job for job in row.jobs if StepModel(job).predict().seconds == wanted)[:1] or row.jobs[:1])


def search(rows: list[Measurement], start: Constants, *, rounds: int) -> Constants:
    """Fit the constants by coordinate search."""

    def score(constants: Constants) -> float:
        return statistics.mean(min(error, 0.3) for error in errors(rows, constants))

    best, least = dict(start), score(start)
    for number in range(rounds):
        move = 0.06 / 2**number
        for name in start:
            for factor in (1 - move, 1 + move):
                tried = {**best, name: best[name] * factor}
                value = score(tried)
                while value < least:
                    best, least = tried, value
                    tried = {**best, name: best[name] * factor}
                    value = score(tried)
        print(f"round {number + 1}: mean error of the rows chosen on {100 * least:.2f}%", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--of-each", type=int, default=3, help="rows of each group")
    given = parser.parse_args()
    chosen_on, held_out = halves(given.of_each)
    used = in_use()
    found = search(chosen_on, used, rounds=given.rounds)
    for name, value in used.items():
        print(f"{name:28s} in use {value:.4g}  chosen {found[name]:.4g}")
    quantile: Callable[[list[float]], float] = lambda values: sorted(values)[int(0.9 * (len(values) - 1))]  # noqa: E731
    for name, rows in (("chosen on", chosen_on), ("held out", held_out)):
        for label, constants in (("in use", used), ("chosen", found)):
            values = errors(rows, constants)
            half = f"{100 * statistics.median(values):.1f}% p90 {100 * quantile(values):.1f}%"
            print(f"{name:10s} {label:7s} median {half} of {len(values)} rows")


if __name__ == "__main__":
    main()
