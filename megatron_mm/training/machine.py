"""What the machines of a run have: asked of this machine, or assumed of a cluster that this machine cannot see.

Checks before a run ask a `Machine` instead of CUDA and installed packages, so that a dry run on a machine without a GPU can check a
recipe that is meant for a cluster.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from megatron_mm.parallel import nodes
from megatron_mm.platform import device


class Machine:
    """This machine, with what is installed on it."""

    def has_gpus(self) -> bool:
        return torch.cuda.is_available()

    def has(self, package: str) -> bool:
        """Whether a package is installed; nothing is imported."""
        return importlib.util.find_spec(package) is not None

    def gpus_per_node(self) -> int | None:
        """GPUs, or processes of the run, on each node; None if it is not known."""
        return nodes.gpus_per_node()

    def serialises_streams(self) -> bool:
        """Whether the environment gives each GPU one work queue (`CUDA_DEVICE_MAX_CONNECTIONS=1`), so that the kernels of all streams start
        in the order of their launch. CUDA's default is 8 queues (CUDA C++ Programming Guide, environment variables)."""
        return self.has_gpus() and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"

    def packed_attention_missing(self) -> str:
        """Why Transformer Engine has no attention over packed documents; empty if it has."""
        return device.packed_attention_missing()

    def fp8_recipe_missing(self, recipe: str) -> str:
        """Why there are no FP8 products with scales of this kind; empty if there are."""
        return device.fp8_recipe_missing(recipe)

    def dispatch_missing(self, name: str) -> str:
        """Why tokens cannot be sent to experts in this way; empty if they can."""
        return device.dispatch_missing(name)

    def user_buffers_missing(self) -> str:
        """Why tensor-parallel exchanges cannot overlap with products; empty if they can."""
        return device.user_buffers_missing()


class AssumedCluster(Machine):
    """A cluster of which nothing is known. It is assumed to have GPUs and every package and kernel, so only what no machine could run is
    refused."""

    def has_gpus(self) -> bool:
        return True

    def has(self, package: str) -> bool:
        return True

    def gpus_per_node(self) -> int | None:
        return None

    def serialises_streams(self) -> bool:
        return False

    def packed_attention_missing(self) -> str:
        return ""

    def fp8_recipe_missing(self, recipe: str) -> str:
        return ""

    def dispatch_missing(self, name: str) -> str:
        return ""

    def user_buffers_missing(self) -> str:
        return ""


THIS_MACHINE = Machine()
ASSUMED_CLUSTER = AssumedCluster()
