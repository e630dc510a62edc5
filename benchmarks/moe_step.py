"""Compare a step of a sparse model with its dense backbone's, and break down the sparse layers' time.

    .venv/bin/python benchmarks/moe_step.py --data data/demo

`debug_mm1_moe` and `debug_mm1` train in turn on the same batches in one process. Phases are timed around the calls of a sparse layer in the
forward pass; the backward pass is not split. Prints the ratio of the steps and a table of the phases.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import TrainingData, open_tokenizer
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

PHASES = {"route": "router", "preprocess": "dispatch", "dispatch": "dispatch", "routed_experts_compute": "experts", "combine": "combine"}
"""Methods of a sparse layer, and the phase that each belongs to."""


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add the time spent in each phase to `seconds`."""
    originals: dict[str, Callable[..., Any]] = {name: getattr(MoELayer, name) for name in PHASES}

    def wrap(name: str) -> Callable[..., Any]:
        def call(self: MoELayer, *arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = originals[name](self, *arguments, **options)
            seconds[PHASES[name]] += time.perf_counter() - began
            return result

        return call

    for name in PHASES:
        setattr(MoELayer, name, wrap(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(MoELayer, name, original)


class Model:
    """A model with its optimizer and its step times."""

    def __init__(self, experiment: Experiment, topology: topologies.Topology) -> None:
        chunks = build_model(experiment, topology)
        optimizer = build_optimizer(experiment, chunks)
        self.step = TrainingStep(experiment, topology, chunks, optimizer, num_sources=len(experiment.data.sources))
        self.seconds: list[float] = []

    def run(self, batches: list[Any], *, number: int) -> None:
        began = time.perf_counter()
        self.step.run(batches, step=number)
        self.seconds.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set of `megatron-mm prepare demo`")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each (default: %(default)s)")
    arguments = parser.parse_args()
    sparse, dense = (get_recipe(name) for name in ("debug_mm1_moe", "debug_mm1"))
    sparse, dense = (replace(e, data=replace(e.data, path=arguments.data)) for e in (sparse, dense))
    topology = topologies.initialize(sparse.parallel, seed=1)
    models = {"sparse": Model(sparse, topology), "dense": Model(dense, topology)}
    data = TrainingData(sparse, topology, open_tokenizer(sparse))
    phases: dict[str, float] = defaultdict(float)
    for number in range(1, arguments.steps + 3):
        batches = next(data).micro_batches
        if number == 3:
            phases.clear()
        with timed(phases):
            models["sparse"].run(batches, number=number)
        models["dense"].run(batches, number=number)
    data.close()
    topologies.shutdown()
    medians = {name: statistics.median(model.seconds[2:]) for name, model in models.items()}
    ratios = [a / b for a, b in zip(models["sparse"].seconds[2:], models["dense"].seconds[2:], strict=True)]
    print(f"sparse step   {1e3 * medians['sparse']:8.1f} ms (median of {arguments.steps})")
    print(f"dense step    {1e3 * medians['dense']:8.1f} ms")
    print(f"ratio         {statistics.median(ratios):8.2f} (median of the pairs)")
    print("\nforward pass of the sparse layers, ms a step:")
    for name in ("router", "dispatch", "experts", "combine"):
        share = phases[name] / sum(phases.values())
        print(f"  {name:10}  {1e3 * phases[name] / arguments.steps:8.1f}  {100 * share:5.1f}%")


if __name__ == "__main__":
    main()
