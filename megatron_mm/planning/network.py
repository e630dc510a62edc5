"""Seconds of messages: NVLink inside a machine, InfiniBand between machines, a latency for each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mm.planning.hardware import GIGA, MICRO, Gpu
from megatron_mm.planning.kernels import Group, Message

NVLINK_RATE = 0.82
"""Of NVLink's rate that collectives reach on large messages."""
NIC_RATE = 0.80
"""Of the network card's rate."""
NVLINK_LATENCY = 12 * MICRO
NIC_LATENCY = 18 * MICRO
HOP_LATENCY = 3 * MICRO
"""For each doubling of the machines in a group."""


@dataclass(frozen=True)
class Members:
    """A process group: how many, and how far apart in rank neighbours are."""

    size: int
    stride: int

    def per_machine(self, domain: int) -> int:
        return max(1, min(self.size, domain // self.stride if self.stride else self.size))


@dataclass(frozen=True)
class Network:
    """The groups of a layout on machines of a kind of GPU."""

    gpu: Gpu
    groups: dict[Group, Members]
    sends_once: bool = False
    """An all-to-all sends a row to another machine once, not once for each of its copies there."""

    def seconds(self, message: Message) -> float:
        members = self.groups[message.group]
        if members.size == 1 or message.bytes <= 0:
            return 0.0
        if message.kind == "all_to_all":
            return self._all_to_all(message.bytes, members, copies=message.copies)
        if message.kind == "ring":
            return self._ring(message.bytes, members)
        once = self._gather(message.bytes, members)
        return 2 * once - self._latency(members) if message.kind == "all_reduce" else once

    def _latency(self, members: Members) -> float:
        machines = math.ceil(members.size / members.per_machine(self.gpu.nvlink_domain))
        return NVLINK_LATENCY if machines == 1 else NIC_LATENCY + HOP_LATENCY * math.log2(machines)

    def _gather(self, size: float, members: Members) -> float:
        """An all-gather or a reduce-scatter: every machine takes in what it lacks through the cards of its members."""
        near = members.per_machine(self.gpu.nvlink_domain)
        machines = members.size / near
        inside = size * (near - 1) / near / (self.gpu.nvlink_gb_s * GIGA * NVLINK_RATE) if near > 1 else 0.0
        between = size * (machines - 1) / machines / (near * self.gpu.nic_gb_s * GIGA * NIC_RATE) if machines > 1 else 0.0
        return max(inside, between) + self._latency(members)

    def _all_to_all(self, sent: float, members: Members, *, copies: int) -> float:
        near = members.per_machine(self.gpu.nvlink_domain)
        inside = sent * (near - 1) / members.size / (self.gpu.nvlink_gb_s * GIGA * NVLINK_RATE)
        between = sent * (members.size - near) / members.size / (self.gpu.nic_gb_s * GIGA * NIC_RATE)
        machines = members.size / near
        if self.sends_once and machines > 1:
            between *= (1 - (1 - 1 / machines) ** copies) * machines / copies
        return max(inside, between) + self._latency(members)

    def _ring(self, passed: float, members: Members) -> float:
        """Every process passes on to its neighbour, size - 1 times; the slowest neighbours are those on two machines."""
        near = members.per_machine(self.gpu.nvlink_domain) == members.size
        rate = self.gpu.nvlink_gb_s * NVLINK_RATE if near else self.gpu.nic_gb_s * NIC_RATE
        return (members.size - 1) * (passed / (rate * GIGA) + (NVLINK_LATENCY if near else NIC_LATENCY))

    def send(self, size: float) -> float:
        """One message to the next pipeline stage."""
        members = self.groups["pipeline"]
        if members.size == 1:
            return 0.0
        near = members.stride * 2 <= self.gpu.nvlink_domain
        rate = self.gpu.nvlink_gb_s * NVLINK_RATE if near else self.gpu.nic_gb_s * NIC_RATE
        return size / (rate * GIGA) + (NVLINK_LATENCY if near else NIC_LATENCY)
