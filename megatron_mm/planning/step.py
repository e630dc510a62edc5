"""Prediction of a training step: blocks on stages -> seconds of each pass -> simulated pipeline -> reductions and update, as far as they
are not hidden."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from megatron_mm.planning.costs import Costs, Seconds
from megatron_mm.planning.job import Job
from megatron_mm.planning.kernels import Block, Message
from megatron_mm.planning.memory import MemoryUse, memory_of_ranks
from megatron_mm.planning.pipeline import PipelineResult, PipelineTimes, least_saved, simulate

JITTER = 0.0035
"""Relative increase of the step time for each doubling of the number of machines, because all processes wait for the slowest."""
BUCKET_PARAMETERS = 40e6
"""Parameters whose gradients are reduced together; at least a million per data-parallel rank, as in megatron-core."""
SUM_SECONDS = 100e-6
"""Seconds for each doubling of the number of GPUs in which a step's few numbers are summed over all of them before the update."""


@dataclass(frozen=True)
class Prediction:
    """A predicted step."""

    seconds: float
    parts: dict[str, float]
    """Seconds of the step on the busiest rank, by kind of work; they add up to `seconds`."""
    memory: tuple[MemoryUse, ...]
    """Memory of each pipeline rank."""
    pipeline: PipelineResult
    stage_seconds: tuple[tuple[Seconds, Seconds], ...] = field(default=())
    """(forward, backward) of each stage, averaged over micro-batches."""

    @property
    def peak_bytes(self) -> float:
        return max(use.total for use in self.memory)

    @property
    def limit(self) -> str:
        """The kind of work that takes most of the time besides products."""
        others = {name: value for name, value in self.parts.items() if name != "products"}
        return max(others, key=lambda name: others[name])


class StepModel:
    """Predicts a job's step."""

    def __init__(self, job: Job, *, known: dict[tuple[int, bool], tuple[Block, Seconds]] | None = None) -> None:
        """
        Args:
            known: seconds of blocks that jobs with the same GPU, software, and tensor- and expert-parallel degrees share, by (id of the
                block, backward). The block is kept beside them, so that its id stays its own. New seconds are added.
        """
        self.job = job
        self.costs = Costs(job.gpu, job.software, job.layout.network(job.gpu, dispatcher=job.software.dispatcher))
        self.known = {} if known is None else known

    def predict(self, *, keep_events: bool = False) -> Prediction:
        job, layout = self.job, self.job.layout
        forward = [[self._stage(kind[stage], backward=False) for stage in range(layout.stages)] for kind in job.kinds]
        backward = [[self._stage(kind[stage], backward=True) for stage in range(layout.stages)] for kind in job.kinds]
        saved = self._saved()
        gathers = [self._gather_seconds(stage) for stage in range(layout.stages)]
        times = self._pipeline_times(forward, backward, saved, gathers)
        result, extra = self._simulate(times, keep_events=keep_events)
        reduced, tails = self._reduction(result)
        optimizer = self._optimizer()
        between = self._between_steps()
        exposed_gather = self._exposed_gather(gathers)
        beside, exchanged = self._beside()
        end = max(reduced) + extra + beside.total + exchanged
        machines = math.ceil(layout.gpus / job.gpu.nvlink_domain)
        shared = self.costs.network.seconds(Message("all_reduce", 4 * job.replicated_parameters, "tensor"))
        end += shared
        total = end + optimizer + exposed_gather + between
        jitter = total * JITTER * math.log2(machines) if machines > 1 else 0.0
        parts = self._parts(forward, backward, end, max(tails) + shared + exchanged, optimizer, exposed_gather, jitter, between, beside)
        memory = memory_of_ranks(job, result.saved_bytes)
        stages = tuple(self._mean_of(forward, backward, stage) for stage in range(layout.stages))
        return Prediction(total + jitter, parts, memory, result, stages)

    def least_bytes(self) -> float:
        """Lower bound of `Prediction.peak_bytes`, without simulating: what the fullest rank holds at its first backward pass."""
        layout, saved = self.job.layout, self._saved()
        table = [[saved[kind][stage] for kind in self.job.micro_batches] for stage in range(layout.stages)]
        held = least_saved(table, ranks=layout.pipeline, chunks=layout.virtual)
        return max(use.total for use in memory_of_ranks(self.job, held))

    # -- passes

    def _saved(self) -> list[list[float]]:
        """Bytes that a stage keeps for a kind of micro-batch, [kind][stage]."""
        return [[sum(block.saved for block in stage) for stage in kind] for kind in self.job.kinds]

    def beside_seconds(self) -> tuple[float, float]:
        """Seconds of the work that all ranks do before and after the pipeline, and of its messages."""
        passes, exchanged = self._beside()
        return passes.busy, exchanged

    def _stage(self, blocks: Sequence[Block], *, backward: bool) -> Seconds:
        total = Seconds()
        alike: dict[int, list[Block]] = {}
        for block in blocks:
            alike.setdefault(id(block), []).append(block)
        for same in alike.values():
            total = total + self.seconds(same[0], backward=backward).times(len(same))
        if self.job.layout.pipeline > 1:  # messages from the previous stage and to the next
            total = total + Seconds(launch=2 * self.job.software.message_seconds * self.job.gpu.host)
        return total

    def _beside(self) -> tuple[Seconds, float]:
        """Work of each process before and after the pipeline, and seconds of its messages: features to the first stage, one rank after
        another, their gradients back, and the reduction and gather of the encoder's weights. Nothing hides these messages."""
        beside, network = self.job.beside, self.costs.network
        if not beside.times:
            return Seconds(), 0.0
        passes = self._stage(beside.blocks, backward=False) + self._stage(beside.blocks, backward=True)
        exchanged = 2 * (self.job.layout.pipeline - 1) * network.send(beside.message_bytes)
        exchanged += network.seconds(Message("reduce_scatter", self.job.software.gradient_bytes * beside.parameters, "data"))
        exchanged += network.seconds(Message("all_gather", 2 * beside.parameters, "data"))
        return passes.times(beside.times), exchanged

    def seconds(self, block: Block, *, backward: bool) -> Seconds:
        """Seconds of one block, including the messages of sharded weights."""
        key = (id(block), backward)
        if key not in self.known:
            self.known[key] = block, self._block(block, backward=backward)
        return self.known[key][1]

    def _block(self, block: Block, *, backward: bool) -> Seconds:
        """Seconds of one block. Sharded weights are gathered before it, and their gradients are scattered after it."""
        seconds = self.costs.block(block, backward=backward)
        if self.job.layout.sharding not in ("full", "gradients") or not (block.forward or block.backward):
            return seconds
        held = block.parameters + block.frozen_parameters
        messages = 0.0
        if self.job.layout.sharding == "full" or not backward:
            messages += self.costs.network.seconds(Message("all_gather", 2 * held, "data"))
        if backward:
            messages += self.costs.network.seconds(Message("reduce_scatter", self.job.software.gradient_bytes * block.parameters, "data"))
        hidden = min(messages, seconds.busy)
        return seconds + Seconds(messages=messages - hidden + self.job.software.interference * hidden)

    def _mean_of(self, forward: list[list[Seconds]], backward: list[list[Seconds]], stage: int) -> tuple[Seconds, Seconds]:
        kinds = self.job.micro_batches
        means = []
        for table in (forward, backward):
            total = Seconds()
            for kind in kinds:
                total = total + table[kind][stage]
            means.append(total.times(1 / len(kinds)))
        return means[0], means[1]

    def _pipeline_times(
        self, forward: list[list[Seconds]], backward: list[list[Seconds]], saved: list[list[float]], gathers: list[float]
    ) -> PipelineTimes:
        layout, kinds = self.job.layout, self.job.micro_batches
        send = self.costs.network.send(self.job.hidden_bytes)
        overlaps = layout.virtual > 1
        ready = [0.0] * layout.stages
        if self._gathers_early():
            for rank in range(layout.pipeline):
                done = 0.0
                for chunk in range(layout.virtual):
                    stage = chunk * layout.pipeline + rank
                    done += gathers[stage]
                    first = forward[kinds[0]][stage].total
                    ready[stage] = max(0.0, done - max(0.0, first * (1 - self.job.software.interference)))
                    if chunk == 0:
                        ready[stage] = max(ready[stage], min(gathers[stage], self._bucket_seconds(stage, gathers[stage])))
        return PipelineTimes(
            forward=[[forward[kind][stage].total for kind in kinds] for stage in range(layout.stages)],
            backward=[[backward[kind][stage].total for kind in kinds] for stage in range(layout.stages)],
            send=send,
            send_overlaps=overlaps,
            first_ready=ready,
            saved=[[saved[kind][stage] for kind in kinds] for stage in range(layout.stages)],
        )

    def _simulate(self, times: PipelineTimes, *, keep_events: bool) -> tuple[PipelineResult, float]:
        """Return the simulated pipeline and seconds to be added to it. If there are many equal micro-batches, only some are simulated, and
        the seconds of the others are extrapolated."""
        layout, count = self.job.layout, len(self.job.micro_batches)
        ranks = layout.pipeline
        few = 3 * ranks if layout.virtual == 1 else 4 * ranks
        if len(self.job.kinds) > 1 or keep_events or count <= few + ranks:
            return simulate(times, ranks=ranks, chunks=layout.virtual, keep_events=keep_events), 0.0
        few += count % ranks
        cut = [simulate(_first(times, number), ranks=ranks, chunks=layout.virtual) for number in (few, few + ranks)]
        slope = (cut[1].seconds - cut[0].seconds) / ranks
        return cut[0], slope * (count - few)

    # -- data parallelism

    @cached_property
    def _held(self) -> list[tuple[float, float]]:
        """Trainable parameters of each stage: (reduced over the data-parallel group, reduced over the experts' data-parallel group)."""
        blocks = self.job.kinds[0]
        return [(sum(b.parameters for b in stage), sum(b.expert_parameters for b in stage)) for stage in blocks]

    def _reduce_seconds(self, stage: int) -> float:
        layout, software = self.job.layout, self.job.software
        if layout.sharding in ("full", "gradients"):
            return 0.0
        kind: Literal["all_reduce", "reduce_scatter"] = "all_reduce" if layout.sharding == "none" else "reduce_scatter"
        dense, experts = self._held[stage]
        network = self.costs.network
        return network.seconds(Message(kind, software.gradient_bytes * dense, "data")) + network.seconds(
            Message(kind, software.gradient_bytes * experts, "expert_data")
        )

    def _gather_seconds(self, stage: int) -> float:
        if self.job.layout.sharding != "optimizer":
            return 0.0
        dense, experts = self._held[stage]
        network, width = self.costs.network, 2.0
        if self.job.software.fp8_weights and dense + experts:  # one byte per weight of an FP8 product
            in_fp8 = sum(block.fp8_parameters for block in self.job.kinds[0][stage] if block.parameters + block.expert_parameters)
            width = 2 - in_fp8 / (dense + experts)
        return network.seconds(Message("all_gather", width * dense, "data")) + network.seconds(
            Message("all_gather", width * experts, "expert_data")
        )

    def _gathers_early(self) -> bool:
        layout = self.job.layout
        return self.job.overlap_parameter_gather and self.job.software.hides_data_messages and (layout.pipeline == 1 or layout.virtual > 1)

    def _exposed_gather(self, gathers: list[float]) -> float:
        layout = self.job.layout
        if self._gathers_early():
            return 0.0
        return max(sum(gathers[chunk * layout.pipeline + rank] for chunk in range(layout.virtual)) for rank in range(layout.pipeline))

    def _bucket_seconds(self, stage: int, whole: float) -> float:
        parameters = sum(self._held[stage])
        bucket = max(BUCKET_PARAMETERS, 1e6 * self.job.layout.data)
        return whole * min(1.0, bucket / parameters) if parameters else 0.0

    def _reduction(self, result: PipelineResult) -> tuple[list[float], list[float]]:
        """Return (time at which each rank's gradients are reduced, delay after its last backward pass)."""
        layout = self.job.layout
        ends, tails = [], []
        for rank in range(layout.pipeline):
            last = result.rank_end[rank]
            channel = 0.0
            for chunk in reversed(range(layout.virtual)):
                stage = chunk * layout.pipeline + rank
                seconds = self._reduce_seconds(stage)
                if self.job.software.hides_data_messages:
                    channel = max(channel, result.stage_last_begin[stage]) + seconds
                    channel = max(channel, result.stage_last_backward[stage] + self._bucket_seconds(stage, seconds))
                    last += self.job.software.interference * min(
                        seconds, result.stage_last_backward[stage] - result.stage_last_begin[stage]
                    )
                else:
                    channel = max(channel, last) + seconds
            ends.append(max(last, channel))
            tails.append(max(last, channel) - result.rank_end[rank])
        return ends, tails

    def _optimizer(self) -> float:
        """Seconds of the update of the parameters that a process owns."""
        layout = self.job.layout
        sharded = layout.sharding != "none"
        copies, expert_copies = (layout.data * layout.context, layout.expert_data) if sharded else (1, 1)
        most = 0.0
        for rank in range(layout.pipeline):
            held = [self._held[chunk * layout.pipeline + rank] for chunk in range(layout.virtual)]
            most = max(most, sum(dense / copies + experts / expert_copies for dense, experts in held))
        return self.costs.optimizer(most) + SUM_SECONDS * math.log2(max(2, layout.gpus))

    def _between_steps(self) -> float:
        """Seconds of the host between steps, on the rank with the most parameter tensors."""
        layout, software = self.job.layout, self.job.software
        stages = self.job.kinds[0]
        tensors = [
            sum(block.tensors for chunk in range(layout.virtual) for block in stages[chunk * layout.pipeline + rank])
            for rank in range(layout.pipeline)
        ]
        return (software.step_seconds + max(tensors) * software.tensor_seconds) * self.job.gpu.host

    # -- report

    def _parts(
        self,
        forward: list[list[Seconds]],
        backward: list[list[Seconds]],
        end: float,
        tail: float,
        optimizer: float,
        gather: float,
        jitter: float,
        between: float,
        beside: Seconds,
    ) -> dict[str, float]:
        layout = self.job.layout
        count = len(self.job.micro_batches)
        busiest, best, host = Seconds(), -1.0, 0.0
        for rank in range(layout.pipeline):
            passes = [part for chunk in range(layout.virtual) for part in self._mean_of(forward, backward, chunk * layout.pipeline + rank)]
            seconds = count * sum(part.total for part in passes)
            if seconds > best:
                busiest, best, host = sum(passes, Seconds()).times(count), seconds, count * sum(part.host for part in passes)
        best += beside.total
        host += beside.host
        busiest = busiest + beside
        return {
            "products": busiest.product,
            "attention": busiest.attention,
            "element-wise kernels": busiest.moved,
            "messages of layers": busiest.messages,
            "host": host + between,
            "pipeline bubble": max(0.0, end - tail - best),
            "gradient reduction": tail,
            "optimizer": optimizer,
            "parameter gather": gather,
            "jitter": jitter,
        }


def _first(times: PipelineTimes, number: int) -> PipelineTimes:
    """Keep only the first micro-batches."""
    cut: Callable[[Sequence[Sequence[float]]], list[Sequence[float]]] = lambda table: [row[:number] for row in table]  # noqa: E731
    return PipelineTimes(
        forward=cut(times.forward),
        backward=cut(times.backward),
        send=times.send,
        send_overlaps=times.send_overlaps,
        first_ready=times.first_ready,
        saved=cut(times.saved),
    )
