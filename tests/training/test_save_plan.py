"""The save plan is agreed on once: later saves of a run send no messages about it, and are correct."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.parallel import topology as topologies
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import Checkpointer, TrainState, integrity
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

GATHERS = ("all_gather_object", "gather_object", "all_gather", "gather")


MESSAGES = (*GATHERS, "all_reduce", "broadcast", "broadcast_object_list", "barrier")


def steps_while_writing(checkpointer: Checkpointer) -> tuple[int, int]:
    """Save, with writing slowed by a second on the last process.

    Return the number of polls until the checkpoint is complete, and the number of messages that all polls but the last sent.
    """
    write, last = integrity.write_checksums, dist.get_rank() == dist.get_world_size() - 1

    def slow(partial: Path, *, rank: int) -> None:
        time.sleep(last)
        write(partial, rank=rank)

    integrity.write_checksums = slow
    checkpointer.save(TrainState(step=1))
    integrity.write_checksums = write
    sent = []
    originals = {name: getattr(dist, name) for name in MESSAGES}

    def counting(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent[-1] += 1
            return original(*args, **kwargs)

        return call

    while checkpointer.saved_step is None and len(sent) < 1000:
        told = torch.tensor(checkpointer.tell())
        dist.all_reduce(told)  # the step's one message
        sent.append(0)
        for name, original in originals.items():
            setattr(dist, name, counting(original))
        checkpointer.poll(told.tolist())
        for name, original in originals.items():
            setattr(dist, name, original)
        time.sleep(0.02)
    assert checkpointer.saved_step == 1
    return len(sent), sum(sent[:-1])


def save_and_load(folder: Path, parallel: dict[str, Any]) -> tuple[list[int], bool, tuple[int, int]]:
    """Save four times, with a step before each.

    Return the number of gathers in each save, True if the last checkpoint loads exactly, and the results of `steps_while_writing`.
    """
    experiment = small_experiment(parallel=parallel, global_batch_size=8)
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build_model(experiment, topology)
    optimizer = build_optimizer(experiment, model)
    step = TrainingStep(experiment, topology, model, optimizer, num_sources=2)
    checkpointer = Checkpointer(experiment, topology, folder, model, optimizer)
    gathers = 0

    def counting(collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal gathers
            gathers += 1
            return collective(*args, **kwargs)

        return call

    originals = {name: getattr(dist, name) for name in GATHERS}
    of_saves = []
    for number in range(1, 5):
        step.run(random_step(experiment, topology, step=number), step=number)
        for name, original in originals.items():
            setattr(dist, name, counting(original))
        gathers = 0
        checkpointer.save(TrainState(step=number))
        of_saves.append(gathers)
        for name, original in originals.items():
            setattr(dist, name, original)
        checkpointer.finish()
    expected = [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]
    result = step.run(random_step(experiment, topology, step=5), step=5)
    checkpointer.load(folder / "checkpoints" / "step_00000004")
    found = [parameter.detach() for chunk in model for parameter in chunk.parameters()]
    same = all(map(torch.equal, expected, found))
    again = step.run(random_step(experiment, topology, step=5), step=5)
    exact = same and again.losses == result.losses and again.update == result.update
    polled = Checkpointer(experiment, topology, folder / "polled", model, optimizer)
    return of_saves, exact, steps_while_writing(polled)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {}),
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"pipeline": 2, "spread_encoder": True}, marks=pytest.mark.slow),
        pytest.param(2, {"distributed_optimizer": False}, marks=pytest.mark.slow),
    ],
)
def test_later_saves_agree_on_nothing(tmp_path: Path, world_size: int, parallel: dict[str, Any]) -> None:
    found = run_processes(save_and_load, world_size, tmp_path, parallel)
    for gathers, exact, (polls, sent) in found:
        assert gathers[0] > 0, "the first save finds out who writes what"
        assert gathers[2:] == [0, 0]
        assert exact
        assert polls > 5 and sent == 0, "whether files are still being written is told in the step's one message"
    assert len({polls for _, _, (polls, _) in found}) == 1, "all processes know at the same step that it is complete"
