"""Cost and quality of planning a global batch: time compared with the step's, data read, fill and balance of the batches.

    .venv/bin/python benchmarks/plan_time.py [--samples 1e6 1e7 1e8] [--folder DIR]

The batch is MM1's: 512 sequences of 4096 tokens, at most 16 images of 144 tokens, 45% interleaved, 45% pairs, 10% text, on 32 data-parallel
ranks. The indexes have synthetic lengths; they are written to --folder (11 GB for 1e8 samples) and memory-mapped, initially out of the page
cache. The planning time is compared with `STEP_SECONDS`, a step of MM1-30B on 512 H100s.

Baselines, in the same run: `row by row` draws the samples of a window from the whole source and reads the row of each (as this program did
before it shuffled in blocks); `first fit` packs windows in the samples' order (smallest index only). `possible` is the largest fill that
any packing could reach: captions reach a sequence's image limit before its token limit. Pages are the 4 KiB pages that planning touches
and that are not in memory yet (minor and major faults). Shuffle: variance of a batch's mean of an attribute that neighbouring samples
share, over that of independent draws (1 is perfect). Times are processor time (`mean cpu`, `worst cpu`) and wall time.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.plan import packing
from megatron_mm.data.plan.balance import Costs
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.mixture import permute, stream_keys
from megatron_mm.data.plan.plan import Plan
from megatron_mm.data.plan.stream import BLOCK, RUN, RUNS_PER_BLOCK, Samples, SampleStream
from megatron_mm.data.sources.index import SourceIndex
from megatron_mm.data.sources.rows import ITEM, SAMPLE, SIZES
from megatron_mm.data.sources.source import Kind

STEP_SECONDS = 1.66
SEQUENCES, LENGTH, IMAGES, RANKS = 512, 4096, 16, 32
_WRITTEN_AT_ONCE = 1 << 20
IMAGE = ImageInput(size=378, fill=(0, 0, 0), tokens=144)


def write_made_up_index(folder: Path, kind: Kind, *, samples: int) -> None:
    """Write an index with typical lengths: captions of 30 to 60 tokens, documents with 1 to 8 images, texts of 100 to 8000 tokens."""
    rng = np.random.default_rng(samples)
    names = ("samples.npy", "sizes.npy")
    maps = {
        name: np.lib.format.open_memmap(folder / name, "w+", dtype, (samples,)) for name, dtype in zip(names, (SAMPLE, SIZES), strict=True)
    }
    first_item = 0
    for first in range(0, samples, _WRITTEN_AT_ONCE):
        count = min(_WRITTEN_AT_ONCE, samples - first)
        images = {"pairs": np.ones(count, int), "interleaved": rng.integers(1, 9, count), "text": np.zeros(count, int)}[kind]
        long = rng.lognormal(6, 0.9, count).clip(100 if kind == "text" else 10, 8000).astype(int)
        rows = np.zeros(count, SAMPLE)
        rows["text_tokens"] = rng.integers(30, 61, count) if kind == "pairs" else long
        rows["num_images"], rows["num_items"] = images, images + 1
        rows["first_item"] = first_item + np.cumsum(images + 1) - (images + 1)
        items = np.zeros(int((images + 1).sum()), ITEM)
        items["is_image"] = 1
        items["is_image"][rows["first_item"] - first_item] = 0
        items["tokens"][rows["first_item"] - first_item] = rows["text_tokens"]
        maps["samples.npy"][first : first + count] = rows
        for column in ("text_tokens", "num_images"):
            maps["sizes.npy"][column][first : first + count] = rows[column]
        with (folder / "items.bin").open("ab") as file:
            file.write(items.tobytes())
        first_item += len(items)
    for array in maps.values():
        array.flush()


def open_made_up_index(folder: Path, kind: Kind) -> SourceIndex:
    """Open an index memory-mapped, after dropping it from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    samples, sizes = (np.asarray(np.load(folder / name, mmap_mode="r")) for name in ("samples.npy", "sizes.npy"))
    items = np.asarray(np.memmap(folder / "items.bin", ITEM, mode="r"))
    return SourceIndex(kind, kind, folder, ("0.tar",), "", {}, samples, items, size_rows=sizes)


class RowByRow(SampleStream):
    """Baseline: any sample of the source may come next, and each sample's row is read separately."""

    def read(self, first: int, count: int) -> Samples:
        epoch, place = divmod(first, len(self.source))
        places = (place + np.arange(count)) % len(self.source)
        rows = permute(places, size=len(self.source), keys=np.full(count, stream_keys(self.seed, epoch)))
        assert isinstance(self.source, SourceIndex)
        found = self.source.sample_rows[rows]
        text_tokens, images = (found[name].astype(np.int64) for name in ("text_tokens", "num_images"))
        return Samples(rows, text_tokens, images, images)


def first_fit(sizes: np.ndarray, images: np.ndarray, limits: Limits, *, rng: np.random.Generator) -> np.ndarray:
    """Baseline: put each piece into the first sequence that has room."""
    room = np.full(len(sizes), limits.sequence_length)
    slots = np.full(len(sizes), limits.max_images)
    bins, used = np.empty(len(sizes), dtype=np.int64), 1
    for piece, (size, wanted) in enumerate(zip(sizes.tolist(), images.tolist(), strict=True)):
        fits = (room[: used + 1] >= size) & (slots[: used + 1] >= wanted)
        bins[piece] = chosen = int(fits.argmax())
        room[chosen] -= size
        slots[chosen] -= wanted
        used = max(used, min(chosen + 1, len(sizes) - 1))
    return np.unique(bins, return_inverse=True)[1]


@dataclass(frozen=True)
class Measured:
    """Measurements of planning several global batches; means and maxima leave out the first batch, which begins the first block."""

    mean_cpu: float
    """Mean processor seconds of a batch."""
    worst_cpu: float
    """Largest processor seconds of a batch."""
    mean: float
    """Mean wall seconds of a batch."""
    worst: float
    """Largest wall seconds of a batch."""
    first: float
    """Wall seconds of the first batch."""
    pages: float
    """Page faults of a batch."""
    fill: float
    """Share of the sequences that is not padding."""
    possible: float
    """`fill` if each source used only as many sequences as its tokens, or its images, need."""
    attention: float
    """Attention's cost over the data-parallel ranks, largest / mean."""
    images: float
    """Images of the k-th micro-batches of all ranks, largest / mean, over all k."""
    cost: float
    """Cost of the k-th micro-batches of all ranks, largest / mean, over all k."""
    memory: float
    """Anonymous memory of this process at the end, in MB."""


def measure(folders: dict[Kind, Path], *, batches: int, stream: type[SampleStream] = SampleStream) -> Measured:
    """Plan `batches` global batches, after a first one."""
    costs = Costs(token=181_734, square=2, image=3_105_045)
    plan = Plan(
        [open_made_up_index(folder, kind) for kind, folder in folders.items()],
        weights=[0.45, 0.45, 0.10],
        limits=Limits(LENGTH, IMAGES),
        image=IMAGE,
        packing_window=4096,
        seed=0,
        global_batch_size=SEQUENCES,
        micro_batch_size=1,
        costs=costs,
    )
    plan._streams = [stream(source, IMAGE, seed=number) for number, source in enumerate(plan.indexes)]
    state, seconds, cpu, faults = plan.initial_state(), [], [], []
    tokens, images = np.zeros(3), np.zeros(3)
    level = np.zeros((3, 2))
    for _ in range(batches + 1):
        began, began_cpu, before = time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF)
        batch = plan.batch(state)
        ranks = batch.batching.micro_batches(batch.works, RANKS)
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
        faults.append(after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt)
        for sequence in batch.sequences:
            tokens[sequence.source] += sequence.num_tokens
            images[sequence.source] += sequence.num_images
        # Micro-batches are one sequence each here: [ranks, rounds].
        squares, pictures, lengths = (
            np.array([[getattr(batch.works[group[0]], name) for group in rank] for rank in ranks])
            for name in ("squares", "images", "tokens")
        )
        total = squares.sum(axis=1)
        cost = costs.token * lengths + costs.square * squares + costs.image * pictures
        level += [[total.max(), total.mean()], *([found.max(axis=0).sum(), found.mean(axis=0).sum()] for found in (pictures, cost))]
        state = batch.next_state
    filled = tokens.sum() / LENGTH
    needed = np.maximum(tokens / LENGTH, images / IMAGES).sum()
    memory = sum(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")) / 1024
    return Measured(
        statistics.mean(cpu[1:]), max(cpu[1:]), statistics.mean(seconds[1:]), max(seconds[1:]), seconds[0], statistics.mean(faults[1:]),
        filled / ((batches + 1) * SEQUENCES), filled / needed, *(level[:, 0] / level[:, 1]), memory,
    )  # fmt: skip


def shuffle_quality(folder: Path, *, draws: int = 3686, batches: int = 200) -> tuple[float, float]:
    """Return the variance of a batch's mean of an attribute that neighbouring samples share, over that of independent draws.

    Two numbers are returned: the measured one, and the bound that is documented.

    Args:
        draws: samples of a global batch (pairs of MM1's mixture).
    """
    stream = SampleStream(open_made_up_index(folder, "pairs"), IMAGE, seed=0)
    attribute = np.random.default_rng(0).standard_normal(-(-len(stream.source) // RUN))
    # Each batch is drawn from a block of its own: batches of one block share its runs.
    firsts = [number * (BLOCK + draws) for number in range(batches)]
    means = [attribute[stream.read(first, draws).rows // RUN].mean() for first in firsts]
    return float(np.mean(np.square(means))) * draws, 1 + (draws - 1) / min(RUNS_PER_BLOCK, len(attribute))


def report(samples: float, folders: dict[Kind, Path], *, batches: int, with_first_fit: bool) -> None:
    """Measure indexes of one size and print the results."""
    found = {"blocks": measure(folders, batches=batches), "row by row": measure(folders, batches=batches, stream=RowByRow)}
    if with_first_fit:
        packing.fill_sequences, original = first_fit, packing.fill_sequences
        found["first fit"] = measure(folders, batches=max(4, batches // 8))
        packing.fill_sequences = original
    for name, one in found.items():
        times = "".join(f"{1e3 * seconds:10.1f}" for seconds in (one.mean_cpu, one.worst_cpu, one.mean, one.worst, one.first))
        level = "".join(f"{part:10.3f}" for part in (one.attention, one.images, one.cost))
        print(
            f"{samples:12,.0f} {name:14}{times}{one.pages:10.0f}{one.memory:10.0f}{one.fill:10.2%}{one.possible:10.2%}{level}", flush=True
        )
    ours, before = found["blocks"], found["row by row"]
    measured, documented = shuffle_quality(folders["pairs"])
    print(
        f"{'':12} blocks / row by row: cpu {ours.mean_cpu / before.mean_cpu:.2f}, pages {ours.pages / max(1, before.pages):.3f}; "
        f"{100 * ours.mean / STEP_SECONDS:.1f}% of a {STEP_SECONDS} s step\n"
        f"{'':12} variance of a batch's mean over a perfect shuffle's, rho 1: {measured:.1f} (as documented, at most: {documented:.1f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40, help="global batches (default: %(default)s)")
    parser.add_argument("--samples", type=float, nargs="+", default=[1e6, 1e7, 1e8], help="of all sources (default: 1e6 1e7 1e8)")
    parser.add_argument("--folder", type=Path, help="where indexes are made; default: the system's place for temporary files")
    arguments = parser.parse_args()
    heads = ("mean cpu", "worst cpu", "mean ms", "worst ms", "first ms", "pages", "MB", "full", "possible", "attention", "images", "cost")
    shares: tuple[tuple[Kind, float], ...] = (("interleaved", 0.2), ("pairs", 0.7), ("text", 0.1))
    print(f"{'samples':>12} {'plan':14}" + "".join(f"{head:>10}" for head in heads))
    for samples in arguments.samples:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
            folders = {kind: Path(root) / kind for kind, _ in shares}
            for kind, share in shares:
                folders[kind].mkdir()
                write_made_up_index(folders[kind], kind, samples=int(share * samples))
            report(samples, folders, batches=arguments.batches, with_first_fit=samples == min(arguments.samples))


if __name__ == "__main__":
    main()
