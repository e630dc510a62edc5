"""Generation in the training layout: greedy search, beam search, and likelihoods of given answers.

Prompts may have any lengths. Generation uses the parallel layout of training and a key/value cache (`evaluation.passes`, `models.cache`);
the tokens are the same as from passes over whole sequences. All processes of a model replica must pass the same prompts; data-parallel
ranks may pass different ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from megatron_mm.config import Experiment
from megatron_mm.evaluation.passes import Part, Passes, Prompt, Read, Wanted
from megatron_mm.parallel.topology import Topology

__all__ = ["Generator", "Prompt", "generate"]


class Generator:
    """Continues prompts with one model."""

    def __init__(
        self, experiment: Experiment, chunks: list[torch.nn.Module], topology: Topology, *, pad_id: int, cache: bool = True
    ) -> None:
        """
        Args:
            cache: as in `Passes`.
        """
        self.chunks = chunks
        self.passes = Passes(experiment, chunks, topology, pad_id=pad_id, cache=cache)

    @torch.no_grad()
    def greedy(self, prompts: list[Prompt], *, max_new_tokens: int, end_ids: Sequence[int]) -> list[list[int]]:
        """Append the most likely token until it is one of end_ids or there are max_new_tokens. Return the new ids without the end id."""
        with self._evaluation_mode():
            parts = self.passes.parts(prompts, new_tokens=max_new_tokens)
            answers: list[list[int]] = [[] for _ in prompts]
            rows = _numbered(parts)
            done = [False] * len(prompts)
            for number in range(max_new_tokens):
                reads = self.passes.run(parts, [Wanted([1] * len(part.tokens)) for part in parts], with_log_probs=False)
                for part, part_rows, read in zip(parts, rows, reads, strict=True):
                    tokens = read.ids[:, 0].tolist()
                    part.extend([[token] for token in tokens])
                    for row, token in zip(part_rows, tokens, strict=True):
                        done[row] = done[row] or token in end_ids
                        if not done[row]:
                            answers[row].append(token)
                if number + 1 == max_new_tokens or not self.passes.agree(int(not all(done))):
                    break
                rows = [_without_finished(part, part_rows, done) for part, part_rows in zip(parts, rows, strict=True)]
            return answers

    @torch.no_grad()
    def beam(
        self, prompts: list[Prompt], *, num_beams: int, max_new_tokens: int, end_ids: Sequence[int], length_penalty: float = 1.0
    ) -> list[list[int]]:
        """Return the continuation with the best sum of log-probabilities / (tokens ** length_penalty) that a beam search finds.

        A beam ends with one of end_ids, which counts as a token. The search for a prompt ends when it has num_beams finished beams and none
        of them scores less than the best open beam.
        """
        with self._evaluation_mode():
            parts = self.passes.parts(prompts, new_tokens=max_new_tokens)
            rows = _numbered(parts)
            searches = [_Beams(num_beams, end_ids, length_penalty=length_penalty, max_new_tokens=max_new_tokens) for _ in prompts]
            for _ in range(max_new_tokens):
                reads = self.passes.run(parts, [Wanted([1] * len(part.tokens)) for part in parts], top=(1 + len(end_ids)) * num_beams)
                for part, own, read in zip(parts, rows, reads, strict=True):
                    _grow(part, [searches[row] for row in own], read)
                if not self.passes.agree(int(any(not search.done for search in searches))):
                    break
            return [search.best() for search in searches]

    @torch.no_grad()
    def log_likelihoods(self, prompts: list[Prompt], choices: list[list[list[int]]]) -> list[list[float]]:
        """Sum the log-probabilities of each choice's tokens after its prompt. A prompt is computed once for all of its choices.

        Args:
            choices: for each prompt, the token ids of each of its choices; none is empty.
        """
        with self._evaluation_mode():
            longest = max((len(choice) for of_prompt in choices for choice in of_prompt), default=0)
            parts = self.passes.parts(prompts, new_tokens=longest)
            rows = _numbered(parts)
            firsts = [[[choice[0] for choice in choices[row]] for row in own] for own in rows]
            wanted = [Wanted([1] * len(own), targets) for own, targets in zip(rows, firsts, strict=True)]
            reads = self.passes.run(parts, wanted)
            sums = {
                row: read.targets[i, : len(choices[row])].tolist()
                for own, read in zip(rows, reads, strict=True)
                for i, row in enumerate(own)
            }
            for number in range(self.passes.agree(max(map(len, choices), default=0))):
                following = [[(choices[row][number : number + 1] or [[0]])[0] for row in own] for own in rows]
                if not self.passes.agree(int(any(len(choice) > 1 for part in following for choice in part))):
                    continue
                for row, value in self._following(parts, rows, following):
                    if number < len(choices[row]):
                        sums[row][number] += value
            return [sums[row] for row in range(len(prompts))]

    def _following(self, parts: list[Part], rows: list[list[int]], choices: list[list[list[int]]]) -> Iterator[tuple[int, float]]:
        """Yield each prompt's number and the log-probability of its choice without the first token. An exhausted iterator has restored the
        parts."""
        for part, own in zip(parts, choices, strict=True):
            part.extend([choice[:-1] for choice in own])
        counts = [[len(choice) - 1 for choice in own] for own in choices]
        wanted = [Wanted(tails, [[t] for choice in own for t in choice[1:]]) for tails, own in zip(counts, choices, strict=True)]
        reads = self.passes.run(parts, wanted)
        for part, numbers, tails, read in zip(parts, rows, counts, reads, strict=True):
            part.shorten(tails)
            values = read.targets.flatten().split(tails)
            yield from ((row, float(value.sum())) for row, value in zip(numbers, values, strict=True))

    @contextlib.contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        training = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk, mode in zip(self.chunks, training, strict=True):
                chunk.train(mode)


def generate(
    experiment: Experiment,
    chunks: list[torch.nn.Module],
    topology: Topology,
    prompts: list[Prompt],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    cache: bool = True,
) -> list[list[int]]:
    """Run `Generator.greedy` on a few prompts that all processes have."""
    return Generator(experiment, chunks, topology, pad_id=pad_id, cache=cache).greedy(
        prompts, max_new_tokens=max_new_tokens, end_ids=[eos_id]
    )


def _numbered(parts: list[Part]) -> list[list[int]]:
    """Number the prompts consecutively; return the numbers of each part."""
    numbers = iter(range(sum(len(part.prompts) for part in parts)))
    return [[next(numbers) for _ in part.prompts] for part in parts]


def _without_finished(part: Part, rows: list[int], done: list[bool]) -> list[int]:
    """Drop finished sequences if they are at least half of a part; return the remaining rows. At least one remains."""
    kept = [place for place, row in enumerate(rows) if not done[row]] or [0]
    if 2 * len(kept) > len(rows):
        return rows
    part.select(kept)
    return [rows[place] for place in kept]


class _Beams:
    """The beam search of one prompt."""

    def __init__(self, num_beams: int, end_ids: Sequence[int], *, length_penalty: float, max_new_tokens: int) -> None:
        self.num_beams, self.end_ids = num_beams, end_ids
        self.length_penalty, self.max_new_tokens = length_penalty, max_new_tokens
        self.open: list[tuple[float, list[int]]] = [(0.0, [])]
        self.finished: list[tuple[float, list[int]]] = []
        self.done = False

    def advance(self, ids: list[list[int]], log_probs: list[list[float]]) -> list[int]:
        """Extend each open beam with its most likely tokens; return the previous beam of each new open beam."""
        found = [
            (score + more, beam, token)
            for beam, (score, _) in enumerate(self.open)
            for token, more in zip(ids[beam], log_probs[beam], strict=True)
        ]
        found.sort(key=lambda one: -one[0])
        going: list[tuple[float, list[int]]] = []
        origins = []
        for place, (score, beam, token) in enumerate(found):
            tokens = self.open[beam][1]
            if token in self.end_ids:
                if place < self.num_beams:
                    self._finish(score, tokens, length=len(tokens) + 1)
            elif len(going) < self.num_beams:
                going.append((score, [*tokens, token]))
                origins.append(beam)
        if not self.done:
            length = len(going[0][1])
            best_open = going[0][0] / length**self.length_penalty
            full = len(self.finished) == self.num_beams
            self.done = length >= self.max_new_tokens or (full and min(score for score, _ in self.finished) >= best_open)
        self.open = going
        return origins

    def _finish(self, score: float, tokens: list[int], *, length: int) -> None:
        if self.done:
            return
        self.finished.append((score / length**self.length_penalty, tokens))
        self.finished = sorted(self.finished, key=lambda one: -one[0])[: self.num_beams]

    def best(self) -> list[int]:
        candidates = [*self.finished, *((score / len(tokens) ** self.length_penalty, tokens) for score, tokens in self.open if tokens)]
        return max(candidates, key=lambda one: one[0])[1]


def _grow(part: Part, searches: list[_Beams], read: Read) -> None:
    """Append one token to all beams of a part. The part's sequences are the prompts' open beams, in order."""
    ids, log_probs, first, rows, tokens = read.ids.tolist(), read.log_probs.tolist(), 0, [], []
    for search in searches:
        last = first + len(search.open)
        rows += [first + origin for origin in search.advance(ids[first:last], log_probs[first:last])]
        tokens += [[beam[-1]] for _, beam in search.open]
        first = last
    part.select(rows)
    part.extend(tokens)
