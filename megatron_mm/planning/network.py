"""Seconds that messages take: NVLink within a machine, InfiniBand between machines, and a latency for each message."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mm.planning.hardware import GIGA, MICRO, Dispatcher, Gpu
from megatron_mm.planning.kernels import Group, Message

NVLINK_RATE = 0.82
"""Fraction of NVLink's rate that collectives reach with large messages."""
NIC_RATE = 0.80
"""Fraction of the network card's rate that they reach."""
NVLINK_LATENCY = 12 * MICRO
NIC_LATENCY = 18 * MICRO
ROW_SECONDS = 4e-9
"""Seconds per row of DeepEP and HybridEP, in addition to its bytes: a few multiprocessors look up, copy and count rows one by one. Chosen
on the first half of the groups of benchmarks/anchors/held_out.csv, where models with narrow rows were otherwise predicted too fast."""
HOP_LATENCY = 3 * MICRO
"""Additional latency for each doubling of the machines in a group."""


@dataclass(frozen=True)
class Members:
    """A process group: its size, and the difference in rank between neighbours."""

    size: int
    stride: int

    def per_machine(self, domain: int) -> int:
        return max(1, min(self.size, domain // self.stride if self.stride else self.size))


@dataclass(frozen=True)
class Network:
    """Computes the seconds of messages in the groups of a layout, on machines with a kind of GPU."""

    gpu: Gpu
    groups: dict[Group, Members]
    dispatcher: Dispatcher = "alltoall"
    """How tokens are sent to experts, which replaces a plain all-to-all."""

    def seconds(self, message: Message) -> float:
        members = self.groups[message.group]
        if members.size == 1 or message.bytes <= 0:
            return 0.0
        if message.kind == "all_to_all":
            if self.dispatcher == "allgather":  # every token to every process
                return self._gather(message.bytes / message.copies * members.size, members)
            return self._all_to_all(message, members)
        if message.kind == "ring":
            return self._ring(message.bytes, members)
        once = self._gather(message.bytes, members)
        return 2 * once - self._latency(members) if message.kind == "all_reduce" else once

    def _latency(self, members: Members) -> float:
        machines = math.ceil(members.size / members.per_machine(self.gpu.nvlink_domain))
        return NVLINK_LATENCY if machines == 1 else NIC_LATENCY + HOP_LATENCY * math.log2(machines)

    def _gather(self, size: float, members: Members) -> float:
        """Seconds of an all-gather or a reduce-scatter: every machine receives the missing parts through its members' network cards."""
        near = members.per_machine(self.gpu.nvlink_domain)
        machines = members.size / near
        inside = size * (near - 1) / near / (self.gpu.nvlink_gb_s * GIGA * NVLINK_RATE) if near > 1 else 0.0
        between = size * (machines - 1) / machines / (near * self.gpu.nic_gb_s * GIGA * NIC_RATE) if machines > 1 else 0.0
        return max(inside, between) + self._latency(members)

    def _all_to_all(self, message: Message, members: Members) -> float:
        """Seconds of sending rows to their experts. DeepEP and HybridEP send a row once to each machine with one of its experts, and from
        there over NVLink to the experts' GPUs.

        Worked example: a row has 8 experts, and there are 8 GPUs on one machine. It is sent to 8 (1 - (7/8)^8) = 5.3 GPUs, 66% of 8 copies.
        """
        near = members.per_machine(self.gpu.nvlink_domain)
        machines = members.size / near
        inside, between = (near - 1) / members.size, (members.size - near) / members.size  # of all copies
        once = self.dispatcher in ("deepep", "hybridep")
        if once:
            copies = message.copies
            reached = _distinct(copies, min(machines, message.machines or machines))
            inside = (near - 1) / near * reached * _distinct(copies / reached, near) / copies
            between = reached * (machines - 1) / machines / copies
        inside *= message.bytes / (self.gpu.nvlink_gb_s * GIGA * NVLINK_RATE)
        between *= message.bytes / (self.gpu.nic_gb_s * GIGA * NIC_RATE)
        handled = ROW_SECONDS * message.rows if once else 0.0
        return max(inside, between) + handled + self._latency(members)

    def _ring(self, passed: float, members: Members) -> float:
        """Seconds of a ring: every process sends to its neighbour, size - 1 times. Neighbours on different machines are the slowest."""
        near = members.per_machine(self.gpu.nvlink_domain) == members.size
        rate = self.gpu.nvlink_gb_s * NVLINK_RATE if near else self.gpu.nic_gb_s * NIC_RATE
        return (members.size - 1) * (passed / (rate * GIGA) + (NVLINK_LATENCY if near else NIC_LATENCY))

    def send(self, size: float) -> float:
        """Seconds of one message to the next pipeline stage."""
        members = self.groups["pipeline"]
        if members.size == 1:
            return 0.0
        near = members.stride * 2 <= self.gpu.nvlink_domain
        rate = self.gpu.nvlink_gb_s * NVLINK_RATE if near else self.gpu.nic_gb_s * NIC_RATE
        return size / (rate * GIGA) + (NVLINK_LATENCY if near else NIC_LATENCY)


def _distinct(copies: float, places: float) -> float:
    """Expected number of distinct places to which copies go, drawn uniformly."""
    return places * (1 - (1 - 1 / places) ** copies)
