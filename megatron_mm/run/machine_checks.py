"""Checks an experiment against the kernels and packages of a machine, before a run starts and in a dry run."""

from __future__ import annotations

import logging
import os

from megatron_mm.config import Experiment
from megatron_mm.models.layers import Backend
from megatron_mm.platform import engines
from megatron_mm.training.kernels import choose_kernels
from megatron_mm.training.layer_backend import choose_backend, log_layers
from megatron_mm.training.machine import ASSUMED_CLUSTER, THIS_MACHINE
from megatron_mm.training.options import check_options

logger = logging.getLogger(__name__)


def check_machine(experiment: Experiment) -> None:
    """Check the experiment against this machine. Raises ValueError; one process logs the layers that the run uses, and warns of options
    without effect."""
    is_main = int(os.environ.get("RANK", "0")) == 0
    if is_main and engines.remark(version := engines.installed()):
        engines.check_parts(version)
    on_gpu = THIS_MACHINE.has_gpus()
    backend = choose_backend(experiment, on_gpu=on_gpu)
    kernels = choose_kernels(experiment, backend=backend)
    check_options(experiment, backend=backend, warn=is_main)
    if is_main:
        log_layers(experiment, backend=backend, kernels=kernels, on_gpu=on_gpu)
        _warn_of_versions(backend)


def check_anywhere(experiment: Experiment, *, world_size: int) -> str:
    """Check an experiment that may be meant for another machine. If this one has GPUs, it is checked as for a run here. If not, only what
    no machine could run is refused, and the return value says so; otherwise it is empty.

    Raises ValueError.

    Args:
        world_size: number of processes that the run is assumed to have.
    """
    machine = THIS_MACHINE if THIS_MACHINE.has_gpus() else ASSUMED_CLUSTER
    backend = choose_backend(experiment, on_gpu=True, machine=machine)
    choose_kernels(experiment, backend=backend, machine=machine)
    check_options(experiment, backend=backend, machine=machine, world_size=world_size)
    if machine is THIS_MACHINE:
        return ""
    return "this machine has no GPU: what the options need of GPUs, nodes and packages is checked when the run starts"


def _warn_of_versions(backend: Backend) -> None:
    """Warn of untested versions of the engines, alone or in combination."""
    core, transformer_engine = engines.installed(), engines.installed("transformer-engine")
    if remark := engines.remark(core):
        logger.warning(remark)
    if backend == "te" and core is not None and transformer_engine is not None and (wrong := engines.mismatch(core, transformer_engine)):
        logger.warning("Transformer Engine is %s", wrong)
