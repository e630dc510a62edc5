"""Checks, before a run starts, the options that only some machines, layouts or models support.

An option that cannot be used is an error. An option that would have no effect, or that gives up a guarantee of the run, causes a warning.
What machines have is asked of a `Machine` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from megatron_mm.config import Experiment
from megatron_mm.models.layers import Backend
from megatron_mm.parallel import topology as topologies
from megatron_mm.training.machine import THIS_MACHINE, Machine
from megatron_mm.training.options.graphs import graph_options
from megatron_mm.training.options.option import Option
from megatron_mm.training.options.other import other_options
from megatron_mm.training.options.parallel import parallel_options
from megatron_mm.training.options.precision import precision_options
from megatron_mm.training.options.recompute import recompute_options

logger = logging.getLogger(__name__)


def check_options(
    experiment: Experiment, *, backend: Backend, machine: Machine = THIS_MACHINE, world_size: int | None = None, warn: bool = True
) -> None:
    """Raise ValueError for an option that cannot run on this layer backend; warn of options without effect and of drawbacks.

    Args:
        machine: what is asked about GPUs and packages.
        world_size: number of processes of the run; None takes torchrun's.
    """
    options = list(asked_for(experiment, backend=backend, machine=machine, world_size=world_size))
    for option in options:
        if option.impossible:
            raise ValueError(f"{option.name} is {option.value}, but {option.impossible}")
    for option in options if warn else ():
        if option.useless:
            logger.warning("%s is %s and has no effect: %s", option.name, option.value, option.useless)
        elif option.costs:
            logger.warning("%s is %s: %s", option.name, option.value, option.costs)


def asked_for(
    experiment: Experiment, *, backend: Backend, machine: Machine = THIS_MACHINE, world_size: int | None = None
) -> Iterator[Option]:
    """Yield the options that differ from their defaults."""
    size = topologies.world_size() if world_size is None else world_size
    yield from parallel_options(experiment, backend=backend, machine=machine, world_size=size)
    yield from recompute_options(experiment, backend=backend, machine=machine)
    yield from precision_options(experiment, backend=backend, machine=machine)
    yield from graph_options(experiment, machine=machine)
    yield from other_options(experiment, backend=backend, machine=machine)
