"""What `test_te.py` compares: the same model on the `torch` and the `te` layer backend, the latter on the stand-in.

A program of its own, as megatron-core asks for Transformer Engine when it is imported. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import stand_in_te

stand_in_te.install()

import torch  # noqa: E402
from small import random_step, small_experiment  # noqa: E402

from megatron_mm.config import Experiment, MoEConfig  # noqa: E402
from megatron_mm.parallel import build, initial_weights  # noqa: E402
from megatron_mm.parallel import topology as topologies  # noqa: E402
from megatron_mm.training.checkpoint import Checkpointer, TrainState  # noqa: E402
from megatron_mm.training.optimizer import build_optimizer  # noqa: E402
from megatron_mm.training.step import TrainingStep  # noqa: E402


class Trainee:
    """A model on one backend and the means to train it."""

    def __init__(self, experiment: Experiment, backend: str, run_dir: Path) -> None:
        build.choose_backend = lambda experiment, *, on_gpu: backend  # type: ignore[assignment, return-value]
        self.experiment = experiment
        self.topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
        self.model = build.build_model(experiment, self.topology)
        optimizer = build_optimizer(experiment, self.model)
        self.step = TrainingStep(experiment, self.topology, self.model, optimizer, num_sources=2)
        self.checkpointer = Checkpointer(experiment, self.topology, run_dir, self.model, optimizer)

    def train(self, first: int, last: int) -> list[float]:
        """Losses of steps, each after an evaluation of its batch, which must say the same of the same weights."""
        losses = []
        for number in range(first, last + 1):
            batches = random_step(self.experiment, self.topology, step=number)
            evaluated = self.step.evaluate(batches).mean
            losses.append(self.step.run(batches, step=number).losses.mean)
            assert abs(evaluated - losses[-1]) < 1e-6, f"step {number}: evaluation says {evaluated}, training {losses[-1]}"
        return losses

    def save(self, step: int) -> None:
        self.checkpointer.save(TrainState(step=step))
        self.checkpointer.finish()

    def names(self) -> dict[str, list]:
        """Global names and shapes of what a checkpoint holds of the model."""
        state = self.model[0].module.sharded_state_dict(metadata=dict(initial_weights.STATE_METADATA))
        return {entry.key: list(getattr(entry, "global_shape", ())) for entry in state.values()}


def compare(experiment: Experiment) -> dict[str, Any]:
    """Four steps on each backend, and the last two of them again on the other backend, from the checkpoint of the first two."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("torch", "te"):
            trainee = Trainee(experiment, backend, Path(folder) / backend)
            losses = trainee.train(1, 2)
            trainee.save(2)
            found[backend] = {"names": trainee.names(), "losses": losses + trainee.train(3, 4)}
            topologies.shutdown()
        for backend, other in (("torch", "te"), ("te", "torch")):
            trainee = Trainee(experiment, backend, Path(folder) / other)
            assert trainee.checkpointer.load_latest() is not None
            found[backend][f"from {other}"] = trainee.train(3, 4)
            topologies.shutdown()
    return found


def main() -> None:
    torch.set_num_threads(1)
    dense = small_experiment(precision="fp32")
    decoder = replace(dense.model.decoder, moe=MoEConfig(num_experts=4, every_n_layers=2, top_k=2))  # type: ignore[attr-defined]
    sparse = replace(dense, model=replace(dense.model, decoder=decoder))
    found = {"fp32": compare(dense), "experts": compare(sparse)}
    build.choose_backend = lambda experiment, *, on_gpu: "te"  # type: ignore[assignment, return-value]
    for precision in ("bf16", "fp8"):
        with tempfile.TemporaryDirectory() as folder:
            trainee = Trainee(small_experiment(precision=precision), "te", Path(folder))
            found[precision] = {"te": trainee.train(1, 4)}
            topologies.shutdown()
    found["recipes"] = sorted({type(recipe).__name__ for recipe in stand_in_te.RECIPES})
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
