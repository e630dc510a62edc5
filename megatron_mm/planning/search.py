"""Searches for the layout with the shortest step among all layouts that fit and that the code can run, most promising ones first.

A lower bound of the step time is cheap to compute: the work of the busiest rank, plus the work that must precede its first and follow its
last micro-batch. So is a lower bound of the memory: what each rank holds at its first backward pass. Layouts are looked at in the order of
their time's bounds, and those that may fit are simulated, until the next bound is not better than the worst layout in the list of the best.
The remaining layouts cannot be better, so the result is that of an exhaustive search with the same simulator.

Blocks and their seconds do not depend on how layers are divided over stages, so layouts that differ in nothing else share them (`_Plans`).
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.families.registry import family_of
from megatron_mm.planning.costs import Seconds
from megatron_mm.planning.hardware import OURS, Gpu, Software
from megatron_mm.planning.job import Job
from megatron_mm.planning.kernels import Block
from megatron_mm.planning.memory import USABLE, fits
from megatron_mm.planning.recipe_job import Planned, plan_recipe, with_stages
from megatron_mm.planning.step import Prediction, StepModel
from megatron_mm.planning.workload import Workload, Workloads

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE = (("none", None), ("none", "full"), ("full", None))
"""Recomputation of (decoder, image tower). Recomputing only fused attention saves nothing."""
VIRTUAL = (1, 2, 3, 4, 6, 8)
MOST_STAGES = 32
MOST_SHARED = 64
"""Number of groups of layouts whose blocks are kept; 64 groups take about 1 GB at most."""
ROUNDING = 1 + 1e-9
"""Factor by which a bound may exceed the value that it bounds, because sums are rounded."""


@dataclass(frozen=True)
class Candidate:
    """A layout to be simulated."""

    base: Experiment
    """The experiment without virtual stages, its layers divided evenly."""
    virtual: int
    split: tuple[int, ...] | None
    """Number of layers of each stage; None without a pipeline."""
    bound: float
    """Lower bound of the step time, in seconds."""

    @property
    def experiment(self) -> Experiment:
        return replace(self.base, parallel=replace(self.base.parallel, virtual=self.virtual, stage_layers=self.split))


@dataclass(frozen=True)
class Found:
    """A simulated layout."""

    planned: Planned
    prediction: Prediction

    @property
    def seconds(self) -> float:
        return self.prediction.seconds


@dataclass(frozen=True)
class SearchResult:
    """The best layouts, and numbers of layouts."""

    best: list[Found]
    considered: int
    simulated: int
    too_large: int
    """Number of layouts, simulated or not, that could be better but do not fit."""


def search(
    experiment: Experiment,
    gpu: Gpu,
    gpus: int,
    *,
    keep: int = 10,
    exhaustive: bool = False,
    loads: Workloads | None = None,
    software: Software = OURS,
    usable: float = USABLE,
    spread: bool = True,
) -> SearchResult:
    """Find the layouts of an experiment with the shortest steps.

    Args:
        keep: number of best layouts to return.
        exhaustive: simulate all layouts, to check the bounds.
        loads: workloads; by default they are drawn.
        software: software stack.
        usable: fraction of the GPU's memory that a layout may use.
        spread: also consider layouts in which all pipeline ranks encode images.

    Raises ValueError if no layout fits.
    """
    loads = loads or Workloads(experiment)
    plans = _Plans(gpu, gpus, loads, software)
    candidates = sorted(_candidates(experiment, plans, spread=spread), key=lambda candidate: candidate.bound)
    best: list[Found] = []
    simulated = too_large = 0
    for candidate in candidates:
        if not exhaustive and len(best) == keep and candidate.bound >= best[-1].seconds:
            break
        planned, model = plans.of(candidate)
        if not exhaustive and not fits(model.least_bytes() / ROUNDING, gpu, usable=usable):
            too_large += 1
            continue
        prediction = model.predict()
        simulated += 1
        if not fits(prediction.peak_bytes, gpu, usable=usable):
            too_large += 1
            continue
        best = sorted([*best, Found(planned, prediction)], key=lambda found: found.seconds)[:keep]
    if not best:
        raise ValueError(
            f"no layout of {experiment.recipe} fits {gpus} {gpu.name} ({len(candidates)} were tried): use more GPUs, a smaller "
            "train.global_batch_size or shorter sequences"
        )
    return SearchResult(best, len(candidates), simulated, too_large)


class _Plans:
    """Plans layouts. Layouts with the same degrees and micro-batches share blocks and their seconds, of which the latest are kept."""

    def __init__(self, gpu: Gpu, gpus: int, loads: Workloads, software: Software) -> None:
        self.gpu, self.gpus, self.loads, self.software = gpu, gpus, loads, software
        self._shared: OrderedDict[Any, tuple[dict[Any, Any], dict[tuple[int, bool], tuple[Block, Seconds]]]] = OrderedDict()

    def base(self, experiment: Experiment) -> tuple[Planned, StepModel]:
        """Plan an experiment without virtual stages and with evenly divided layers. Raises ValueError if that is impossible."""
        parallel, train = experiment.parallel, experiment.train
        key = (parallel.tensor, parallel.pipeline, parallel.expert, parallel.expert_tensor, train.micro_batch_size)
        made, known = self._shared.setdefault(key, ({}, {}))
        self._shared.move_to_end(key)
        if len(self._shared) > MOST_SHARED:
            self._shared.popitem(last=False)
        work = self.work(experiment)
        choice = ("plan", parallel.recompute, parallel.recompute_encoder, parallel.spread_encoder)
        if choice not in made:
            made[choice] = plan_recipe(experiment, self.gpu, self.gpus, work=work, software=self.software, made=made)
        return made[choice], StepModel(made[choice].job, known=known)

    def of(self, candidate: Candidate) -> tuple[Planned, StepModel]:
        """Plan a candidate."""
        planned, model = self.base(candidate.base)
        planned = with_stages(planned, candidate.experiment)
        return planned, StepModel(planned.job, known=model.known)

    def work(self, experiment: Experiment) -> Workload:
        """Return the work of one data-parallel rank. Raises ValueError if the batch cannot be divided evenly."""
        data_size, size = experiment.parallel.data_parallel_size(self.gpus), experiment.train.micro_batch_size
        return self.loads.of(data_size=data_size, micro_batch_size=size, token_multiple=experiment.token_multiple)


def _candidates(experiment: Experiment, plans: _Plans, *, spread: bool) -> Iterator[Candidate]:
    """Yield every layout that model, batch and number of GPUs allow."""
    gpu, gpus = plans.gpu, plans.gpus
    decoder = experiment.model.decoder
    base = replace(experiment.parallel, virtual=1, stage_layers=None, spread_encoder=False)
    experts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if decoder.moe and decoder.moe.num_experts % n == 0] or [1]
    degrees = itertools.product(
        (1, 2, 4, 8),
        (1, 2, 4, 8, 16),
        experts,
        (1, 2, 4, 8) if decoder.moe else (1,),
        MICRO_BATCHES,
        RECOMPUTE,
        (False, True)[: 1 + spread],
    )
    for tensor, pipeline, expert, expert_tensor, size, (recompute, encoder), all_encode in degrees:
        if all_encode and (pipeline == 1 or not family_of(experiment.model).spreads_encoder):
            continue
        if tensor % expert_tensor or gpus % (tensor * pipeline) or tensor > gpu.nvlink_domain or pipeline > decoder.num_layers:
            continue
        try:
            parallel = replace(
                base,
                tensor=tensor,
                pipeline=pipeline,
                expert=expert,
                expert_tensor=expert_tensor,
                recompute=recompute,  # type: ignore[arg-type]
                recompute_encoder=encoder,  # type: ignore[arg-type]
                spread_encoder=all_encode,
            )
            one = replace(experiment, parallel=parallel, train=replace(experiment.train, micro_batch_size=size))
            plans.work(one)
            family_of(one.model).check_layout(one.model, parallel, gpus)
            if _weights_alone(one, gpus) > gpu.memory_gb * 1e9:
                continue
            parts = _Parts.of(*plans.base(one))
        except ValueError:
            continue
        if not fits(parts.least_bytes / pipeline, gpu):
            continue
        for virtual in VIRTUAL if pipeline > 1 else (1,):
            if pipeline * virtual > MOST_STAGES or (virtual > 1 and (parts.count % pipeline or pipeline * virtual > decoder.num_layers)):
                continue
            for split in parts.splits(pipeline, virtual):
                yield Candidate(one, virtual, split if pipeline > 1 else None, parts.bound(split, pipeline, virtual))


def _weights_alone(experiment: Experiment, gpus: int) -> float:
    """Bytes of the decoder's weights on an average rank. A layout whose weights exceed the memory cannot fit."""
    decoder, parallel = experiment.model.decoder, experiment.parallel
    mlp = 3 * decoder.hidden_size * decoder.ffn_hidden_size
    attention = decoder.hidden_size * decoder.head_dim * 2 * (decoder.num_attention_heads + decoder.num_query_groups)
    sparse = len(decoder.sparse_layers)
    dense = (decoder.num_layers * attention + (decoder.num_layers - sparse) * mlp) / parallel.tensor
    experts = sparse * decoder.moe.num_experts * mlp / parallel.expert / parallel.expert_tensor if decoder.moe else 0.0
    return 2 * (dense + experts) / parallel.pipeline


@dataclass(frozen=True)
class _Parts:
    """Seconds of the device for a micro-batch, averaged over micro-batches, by part of the model as (forward, backward)."""

    first: tuple[float, float]
    """Blocks of the first stage besides layers."""
    layer: tuple[float, float]
    """One layer."""
    last: tuple[float, float]
    """The output block of the last stage."""
    beside: float
    """Seconds of the work that all ranks do before and after the pipeline."""
    count: int
    """Number of micro-batches."""
    num_layers: int
    least_bytes: float
    """Bytes that all pipeline ranks together need at some moment, however layers are divided among them."""

    @classmethod
    def of(cls, planned: Planned, model: StepModel) -> _Parts:
        first = layer = last = (Seconds(), Seconds())
        order = planned.job.micro_batches
        for kind, stages in enumerate(planned.job.kinds):
            share = order.count(kind) / len(order)
            blocks = list(itertools.chain(*stages))
            times = Counter(map(id, blocks))
            for block in {id(block): block for block in blocks}.values():
                cost = tuple(model.seconds(block, backward=back).times(share * times[id(block)]) for back in (False, True))
                if block.name in ("layer", "sparse layer", "gated block"):
                    layer = (layer[0] + cost[0], layer[1] + cost[1])
                elif block.name == "output":
                    last = (last[0] + cost[0], last[1] + cost[1])
                else:
                    first = (first[0] + cost[0], first[1] + cost[1])
        layers = planned.experiment.model.decoder.num_layers
        return cls(
            first=(first[0].busy, first[1].busy),
            layer=(layer[0].busy / layers, layer[1].busy / layers),
            last=(last[0].busy, last[1].busy),
            beside=sum(model.beside_seconds()),
            count=len(order),
            num_layers=layers,
            least_bytes=_least_bytes(planned.job),
        )

    def splits(self, pipeline: int, virtual: int) -> Iterator[tuple[int, ...]]:
        """Yield ways to divide layers among stages that are close to equal work on all ranks."""
        if pipeline == 1:
            yield (self.num_layers,)
            return
        layer, first, last = sum(self.layer), sum(self.first), sum(self.last)
        share = (first + last + self.num_layers * layer) / pipeline
        least = 0 if virtual == 1 else virtual - 1
        wanted_first, wanted_last = (max(least, (share - extra) / layer) for extra in (first, last))
        seen = set()
        for head, tail in itertools.product(_around(wanted_first, least), _around(wanted_last, least)):
            middle = self.num_layers - head - tail
            if middle < virtual * (pipeline - 2) or (pipeline == 2 and middle):
                if pipeline != 2:
                    continue
                tail = self.num_layers - head
            split = self._spread(head, tail, pipeline, virtual)
            if split and split not in seen:
                seen.add(split)
                yield split

    def _spread(self, head: int, tail: int, pipeline: int, virtual: int) -> tuple[int, ...]:
        """Number of layers of each stage if the first rank has `head` layers and the last `tail`; () if that is impossible."""
        middle = self.num_layers - head - tail
        ranks = [head, *_even(middle, pipeline - 2), tail] if pipeline > 2 else [head, tail]
        if min(ranks) < 0:
            return ()
        layer = sum(self.layer)
        stages = [0] * (pipeline * virtual)
        for rank, count in enumerate(ranks):
            extras = [0.0] * virtual
            extras[0] += sum(self.first) / layer if rank == 0 else 0.0
            extras[-1] += sum(self.last) / layer if rank == pipeline - 1 else 0.0
            for chunk, number in enumerate(_level(count, extras)):
                stages[chunk * pipeline + rank] = number
        return tuple(stages)

    def bound(self, split: tuple[int, ...], pipeline: int, virtual: int) -> float:
        """Lower bound of the step time: the busiest rank's work, and the work on earlier ranks before its first and after its last
        micro-batch."""
        before = worst = 0.0
        layer, last_stage = sum(self.layer), pipeline * virtual - 1
        for rank in range(pipeline):
            stages = [chunk * pipeline + rank for chunk in range(virtual)]
            busy = sum(split[stage] for stage in stages) * layer
            busy += sum(self.first) * (rank == 0) + sum(self.last) * (last_stage in stages)
            worst = max(worst, before + busy * self.count)
            before += split[rank] * layer + (sum(self.first) if rank == 0 else 0.0)
        return 0.98 * (worst + self.beside)


def _least_bytes(job: Job) -> float:
    """State of all ranks, and their activations when the first micro-batch comes back: rank r then holds `pipeline` - r micro-batches."""
    layout, software = job.layout, job.software
    blocks = list(itertools.chain(*job.kinds[-1]))
    dense, experts = sum(block.parameters for block in blocks), sum(block.expert_parameters for block in blocks)
    state = 2 * (dense + experts + sum(block.frozen_parameters for block in blocks)) + software.gradient_bytes * (dense + experts)
    if layout.sharding != "none":
        state += software.optimizer_bytes * (dense / layout.data + experts / layout.expert_data)
    held = (min(layout.pipeline, len(job.micro_batches)) + 1) / 2
    return state + held * sum(block.saved for block in blocks)


def _around(wanted: float, least: int) -> list[int]:
    return sorted({max(least, int(wanted)), max(least, int(wanted) + 1)})


def _even(count: int, ranks: int) -> list[int]:
    base, left = divmod(count, ranks)
    return [base + (rank < left) for rank in range(ranks)]


def _level(count: int, extras: list[float]) -> list[int]:
    """Distribute layers over chunks, each to the chunk that has the fewest so far. `extras` is other work, counted in layers."""
    dealt = [0] * len(extras)
    for _ in range(count):
        least = min(range(len(extras)), key=lambda chunk: extras[chunk] + dealt[chunk])
        dealt[least] += 1
    return dealt


def options(parallel: ParallelConfig, *, micro_batch_size: int) -> str:
    """Write a layout as options of `train`."""
    words = [f"--parallel.{name} {getattr(parallel, name)}" for name in ("tensor", "pipeline", "virtual", "recompute")]
    words += [f"--parallel.recompute-encoder {parallel.recompute_encoder}"] if parallel.recompute_encoder is not None else []
    words += [f"--parallel.expert {parallel.expert}"] if parallel.expert > 1 else []
    words += [f"--parallel.expert-tensor {parallel.expert_tensor}"] if parallel.expert_tensor > 1 else []
    words += ["--parallel.spread-encoder True"] if parallel.spread_encoder else []
    if parallel.stage_layers is not None:
        words.append(f"--parallel.stage-layers {' '.join(map(str, parallel.stage_layers))}")
    return " ".join([*words, f"--train.micro-batch-size {micro_batch_size}"])
