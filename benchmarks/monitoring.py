"""Cost of monitoring: steps with all measurements and all destinations, compared with steps without.

    .venv/bin/python benchmarks/monitoring.py --data data/demo

One process and one model alternate between a step as in a run (phases, metrics.jsonl, W&B offline, TensorBoard, a Prometheus port; every
second one also measures norms and balance) and a step without clock, hooks or monitor. Prints medians of the processor time of all threads,
which other work on the machine hardly changes, and of the wall time, and both ratios if one step in ten measures norms, as by default.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.hooks import Metrics
from megatron_mm.run.slow_processes import SlowProcesses
from megatron_mm.run.start import assemble, check
from megatron_mm.run.step_measures import Norms, is_due
from megatron_mm.training.trainer import Trainer

WARM_UP = 3


def now() -> np.ndarray:
    """Return [processor seconds of all threads, wall-clock seconds]."""
    return np.array([time.process_time(), time.perf_counter()])


def bare_step(trainer: Trainer) -> None:
    """Run a step without any monitoring."""
    batch = next(trainer.data)
    trainer.step.run(batch.micro_batches, step=trainer.state.step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data set of `megatron-mm prepare demo`")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--recipe", default="debug_mm1", help="default: %(default)s")
    arguments = parser.parse_args()
    recipe = get_recipe(arguments.recipe)
    experiment = replace(
        recipe,
        data=replace(recipe.data, path=arguments.data),
        eval=replace(recipe.eval, interval=0),
        train=replace(recipe.train, steps=10**6),
        checkpoint=replace(recipe.checkpoint, interval=10**6),
        monitor=replace(recipe.monitor, wandb="offline", tensorboard=True, prometheus=0, detail_interval=2),
    )
    logging.getLogger("wandb").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = assemble(check(experiment, Path(run_dir)), Path(run_dir))
        hooks = [hook for hook in trainer.hooks if isinstance(hook, Metrics | Norms | SlowProcesses)]
        trainer.hooks = hooks
        wandb = next(hook.monitor._wandb for hook in hooks if isinstance(hook, Metrics))
        while wandb.is_on and wandb._run is None:  # its thread imports the library, which belongs to the start and not to a step
            time.sleep(0.1)
        watched: dict[bool, list[np.ndarray]] = {False: [], True: []}
        bare: list[np.ndarray] = []
        for index in range(arguments.steps + WARM_UP):
            began = now()
            record = trainer._one_step()
            for hook in hooks:
                hook.after_step(record)
            middle = now()
            trainer.step.clock = None
            for chunk in trainer.model:
                chunk.config.timers = None
            before = now()
            bare_step(trainer)
            ended = now()
            trainer.step.clock = trainer.clock
            trainer.clock.watch(trainer.model)
            if index >= WARM_UP:
                watched[is_due(record.step, experiment.monitor.detail_interval)].append(middle - began)
                bare.append(ended - before)
        trainer.data.close()
        for hook in reversed(hooks):
            hook.close(failed=False)
        topologies.shutdown()
    without, plain, measuring = (np.median(seconds, axis=0) for seconds in (bare, watched[False], watched[True]))
    print(f"{'':34}{'processor':>12}{'wall':>12}   (medians)")
    for title, seconds in (("not watched", without), ("watched, norms not measured", plain), ("watched, norms measured", measuring)):
        print(f"{title:34}{1e3 * seconds[0]:9.1f} ms{1e3 * seconds[1]:9.1f} ms")
    ratio = (0.9 * plain + 0.1 * measuring) / without
    print(f"{'ratio, one step in ten measuring':34}{ratio[0]:12.3f}{ratio[1]:12.3f}   (aim: at most 1.01)")


if __name__ == "__main__":
    main()
