"""Forward passes of generation through megatron-core's pipeline schedule: from sequences to the required values of the logits.

The sequences of a data-parallel rank are divided into as many parts as there are pipeline stages, so that all stages have work; each part
is a micro-batch with its own cache (`models.cache`). The values that the last stage reads from the logits are sent to all stages, so that
every process of a replica knows the next tokens. If experts are divided among data-parallel ranks, these ranks run every pass together
(`agree`).

Shape legend: r positions that are read, k most likely and q wanted tokens at each of them, v this process's part of the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch, documents_of_images
from megatron_mm.data.plan.plan import tile_owners
from megatron_mm.families.registry import family_of, pipeline_rows
from megatron_mm.models.cache import CacheStep, KeyValueCache
from megatron_mm.parallel.pipeline import PlannedMessages
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform.device import send


@dataclass(frozen=True)
class Prompt:
    """A prompt to continue."""

    ids: list[int]
    """Token ids, including those of image tokens."""
    image_starts: list[int]
    """Position in ids of the first token of each image."""
    pixels: torch.Tensor | None
    """[images, 3, H, W] uint8. Only the images that this process encodes are used (`Passes.shares`). May be None on later pipeline
    stages."""


class Part:
    """Sequences that share a micro-batch: their tokens and their cache."""

    def __init__(self, prompts: list[Prompt], *, capacity: int | None) -> None:
        """
        Args:
            capacity: tokens that the cache holds per sequence; None computes all tokens in every pass.
        """
        self.prompts = prompts
        self.tokens = [list(prompt.ids) for prompt in prompts]
        self.cache = None if capacity is None else KeyValueCache(images=[bool(p.image_starts) for p in prompts], capacity=capacity)

    def extend(self, new: Sequence[Sequence[int]]) -> None:
        """Append tokens to each sequence."""
        for tokens, more in zip(self.tokens, new, strict=True):
            tokens.extend(more)

    def shorten(self, counts: list[int]) -> None:
        """Remove the last tokens of each sequence."""
        self.tokens = [tokens[: len(tokens) - count] for tokens, count in zip(self.tokens, counts, strict=True)]
        if self.cache is not None:
            self.cache.forget(counts)

    def select(self, rows: list[int]) -> None:
        """Keep these sequences, in this order; one may be repeated."""
        self.prompts, self.tokens = [self.prompts[row] for row in rows], [list(self.tokens[row]) for row in rows]
        if self.cache is not None:
            self.cache.select(rows)


@dataclass(frozen=True)
class Wanted:
    """What a pass reads at the last positions of a part's sequences."""

    tails: list[int]
    """Number of last positions at which each sequence is read."""
    targets: list[list[int]] = field(default_factory=list)
    """Tokens whose log-probability is read, for each position that is read, in order; empty if none is needed."""


@dataclass(frozen=True)
class Read:
    """Values read from a part's logits, on the CPU."""

    ids: torch.Tensor
    """[r, k] int64: the most likely tokens."""
    log_probs: torch.Tensor
    """[r, k] float64: log-probabilities of `ids`."""
    targets: torch.Tensor
    """[r, q] float64: log-probabilities of `Wanted.targets`."""


@dataclass(frozen=True)
class _Work:
    batch: PackedBatch
    step: CacheStep | None
    rows: int
    places: torch.Tensor
    targets: torch.Tensor


class Passes:
    """Runs the passes of one process; all processes of a model replica must pass the same sequences."""

    def __init__(
        self, experiment: Experiment, chunks: list[torch.nn.Module], topology: Topology, *, pad_id: int, cache: bool = True
    ) -> None:
        """
        Args:
            cache: compute only new tokens. Without it, or if the family does not support it (`Family.generates_with_cache`), every pass
                computes all tokens.
        """
        self.experiment = experiment
        self.chunks = chunks
        self.topology = topology
        self.pad_id = pad_id
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.cached = cache and family_of(experiment.model).generates_with_cache

    def parts(self, prompts: list[Prompt], *, new_tokens: int) -> list[Part]:
        """Divide prompts into parts of consecutive ones. A part's cache has room for its longest prompt and new_tokens more."""
        return [
            Part(share, capacity=max(len(p.ids) for p in share) + new_tokens if self.cached else None) for share in self._dealt(prompts)
        ]

    def _dealt(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        count = max(1, min(self.topology.pipeline_size, len(prompts)))
        bounds = [len(prompts) * number // count for number in range(count + 1)]
        return [prompts[begin:end] for begin, end in itertools.pairwise(bounds)]

    def shares(self, prompts: list[Prompt]) -> list[range]:
        """Ranges of each prompt's images that this process encodes, and therefore has to decode, if these prompts are passed together."""
        parts = self._dealt(prompts) if prompts else []
        return [
            share
            for part in parts
            for share in own_images([len(p.image_starts) for p in part], rank=self.topology.tensor_rank, size=self.topology.tensor_size)
        ]

    def agree(self, number: int) -> int:
        """Return the largest number among the processes that run passes together."""
        if self.experiment.parallel.expert == 1:
            return number
        shared = torch.tensor(number, device=self.topology.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    def run(self, parts: list[Part], wanted: list[Wanted], *, top: int = 1, with_log_probs: bool = True) -> list[Read]:
        """Run one pass over the new tokens of each part; return the wanted values of each.

        Args:
            top: number of most likely tokens read at each position.
            with_log_probs: compute log-probabilities; otherwise logits are returned in their place, which is enough for greedy search.
        """
        work = [self._work(part, wish) for part, wish in zip(parts, wanted, strict=True)]
        # The interleaved schedule needs a multiple of the stages. Repeating the last part writes the same values into its cache again.
        missing = -len(work) % self.topology.pipeline_size if self.topology.virtual_size > 1 else 0
        todo = work + work[-1:] * missing
        rows = [one.rows for one in todo]
        iterators = [iter(todo) for _ in self.chunks]

        def forward_step(works: Iterator[_Work], chunk: torch.nn.Module) -> tuple[Any, ...]:
            one = next(works)
            options = {} if one.step is None else {"cache": one.step}
            logits_1rv = chunk(one.batch, pipeline_rows=one.rows, with_loss=False, **options)
            return logits_1rv, lambda logits, non_loss_data=True: _read(
                logits[0].index_select(0, one.places), one.targets, top=top, with_log_probs=with_log_probs
            )

        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(todo),
            seq_length=max(rows),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=PlannedMessages(get_model_config(self.chunks[0]), rows=rows),
            pg_collection=self.groups,
        )
        for part, one in zip(parts, work, strict=True):
            if part.cache is not None and one.step is not None:
                part.cache.advance(one.step.counts)
        return self._tell(work, found, top=top)

    def _work(self, part: Part, wanted: Wanted) -> _Work:
        cache, device = part.cache, self.topology.device
        known = [0] * len(part.tokens) if cache is None else cache.lengths
        new = [tokens[length:] for tokens, length in zip(part.tokens, known, strict=True)]
        batch = self._pack(new, known, part.prompts if not any(known) else [])
        ends = torch.tensor([len(tokens) for tokens in new]).cumsum(0).tolist()
        read = [place for end, tail in zip(ends, wanted.tails, strict=True) for place in range(end - tail, end)]
        places, step = torch.tensor(read, dtype=torch.int64), None
        if cache is not None:
            parts = self.experiment.parallel.tensor if self.experiment.parallel.sequence_parallel else 1
            padded = read + [0] * (-len(read) % parts if read else parts)
            step = CacheStep.plan(cache, [len(tokens) for tokens in new], row=batch.num_tokens, read=padded, device=device)
            places = torch.arange(len(read))
        rows = batch.num_tokens if cache is not None and cache.filled else pipeline_rows(self.experiment, batch)
        width = max((len(asked) for asked in wanted.targets), default=0)
        asked = [[*targets, *[0] * (width - len(targets))] for targets in wanted.targets] or [[] for _ in read]
        targets = torch.tensor(asked, dtype=torch.int64).reshape(len(read), width)
        return _Work(batch.to(device), step, rows, send(places, device), send(targets, device))

    def _pack(self, new: list[list[int]], known: list[int], prompts: list[Prompt]) -> PackedBatch:
        """Pack the new tokens of all sequences into one row, padded as the layout and the precision require; add the prompts' images."""
        total = sum(map(len, new))
        row = max(1, -(-total // self.experiment.token_multiple)) * self.experiment.token_multiple
        lengths = [*map(len, new), *([row - total] if row > total else [])]
        ids = torch.tensor([token for tokens in new for token in tokens] + [self.pad_id] * (row - total))
        starts, offset = [], 0
        for prompt, tokens in zip(prompts, new, strict=False):
            starts += [offset + start for start in prompt.image_starts]
            offset += len(tokens)
        image_starts = torch.tensor(starts, dtype=torch.int64)
        owners = torch.from_numpy(tile_owners(len(starts), self.topology.tensor_size))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        positions = [torch.arange(length) + first for length, first in zip(lengths, [*known, 0], strict=False)]
        return PackedBatch(
            token_ids=ids,
            labels=ids,
            loss_mask=torch.zeros(row),
            is_token=torch.arange(row) < total,
            position_ids=torch.cat(positions),
            source_ids=torch.zeros_like(ids),
            cu_seqlens=cu_seqlens,
            max_seqlen=max(lengths),
            image_starts=image_starts,
            image_owners=owners,
            image_documents=documents_of_images(image_starts, cu_seqlens=cu_seqlens),
            pixels=self._pixels(prompts, owners) if self.topology.is_first_stage else None,
        )

    def _pixels(self, prompts: list[Prompt], owners: torch.Tensor) -> torch.Tensor | None:
        """Pixels of the images that this process encodes; None if there are no prompts."""
        if not prompts:
            return None
        pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
        assert len(pixels) == len(prompts), "the first pipeline stage needs the pixels of all prompts"
        return torch.cat(pixels)[owners == self.topology.tensor_rank]

    def _tell(self, work: list[_Work], found: list[torch.Tensor], *, top: int) -> list[Read]:
        """Send the values that the last stage has read to all stages, and return them for each part."""
        shapes = [(len(one.places), 2 * top + one.targets.shape[1]) for one in work]
        told = torch.empty(sum(rows * width for rows, width in shapes), dtype=torch.float64, device=self.topology.device)
        if self.topology.is_last_stage:
            told = torch.cat([table.flatten() for table in found[: len(work)]])
        if self.topology.pipeline_size > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(told, src=dist.get_global_rank(group, group.size() - 1), group=group)
        tables = [flat.view(shape) for flat, shape in zip(told.cpu().split([rows * width for rows, width in shapes]), shapes, strict=True)]
        return [Read(table[:, :top].long(), table[:, top : 2 * top], table[:, 2 * top :]) for table in tables]


def own_images(counts: Sequence[int], *, rank: int, size: int) -> list[range]:
    """Ranges of each sequence's images that one rank of a tensor-parallel group encodes.

    Worked example: sequences with 1, 3 and 1 images, two ranks: rank 0 encodes the first three images, which are image 0 of sequence 0 and
    images 0 and 1 of sequence 1.

    Args:
        counts: number of images of each sequence.
    """
    owners = tile_owners(sum(counts), size)
    first, end = (int(bound) for bound in np.searchsorted(owners, (rank, rank + 1)))
    begins = np.cumsum([0, *counts])[:-1].tolist()
    return [range(min(max(first - begin, 0), count), min(max(end - begin, 0), count)) for begin, count in zip(begins, counts, strict=True)]


def _read(logits_rv: torch.Tensor, targets_rq: torch.Tensor, *, top: int, with_log_probs: bool) -> torch.Tensor:
    """[r, k ids + k log-probabilities + q log-probabilities] float64, the same on every process of the tensor-parallel group.

    Args:
        with_log_probs: if false, the result is [r, k ids + k logits].
    """
    group = parallel_state.get_tensor_model_parallel_group()
    logits, first = logits_rv.double() if with_log_probs else logits_rv, group.rank() * logits_rv.shape[-1]
    best, ids = logits.max(dim=-1, keepdim=True) if top == 1 else logits.topk(min(top, logits.shape[-1]), dim=-1)
    columns = [best.double(), (ids + first).double()]
    if with_log_probs:
        own = targets_rq - first
        here = (own >= 0) & (own < logits.shape[-1])
        asked = logits.gather(1, own.clamp(0, logits.shape[-1] - 1)).masked_fill(~here, -torch.inf)
        columns += [logits.logsumexp(dim=-1, keepdim=True), asked]
    tables = _from_all(torch.cat(columns, dim=-1), group)
    k = best.shape[-1]
    values, order = torch.cat([one[:, :k] for one in tables], dim=-1).sort(dim=-1, descending=True, stable=True)
    named = torch.cat([one[:, k : 2 * k] for one in tables], dim=-1).gather(1, order)
    if not with_log_probs:
        return torch.cat([named[:, :top], values[:, :top]], dim=-1)
    everywhere = torch.stack(tables)
    norm_r1 = everywhere[..., 2 * k : 2 * k + 1].logsumexp(dim=0)
    wanted = everywhere[..., 2 * k + 1 :].max(dim=0).values
    return torch.cat([named[:, :top], values[:, :top] - norm_r1, wanted - norm_r1], dim=-1)


def _from_all(table: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Gather the tables of all processes of a group, in rank order."""
    if group.size() == 1:
        return [table]
    tables = [torch.empty_like(table) for _ in range(group.size())]
    dist.all_gather(tables, table, group=group)
    return tables
