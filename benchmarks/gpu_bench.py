"""`make gpu-bench`: cost of training on one GPU by layer backend, precision and recompute, with a breakdown of time and memory.

    python benchmarks/gpu_bench.py [--all | --part mm1_1b ...] [--minutes 8] [--device cpu]

Without options, the cases and parts that answer a question run, the most informative ones first (`gpu_cases.py`). --all adds the others,
and --part runs all cases of a part. --list says how long each part takes. A part for which no time is left is named, and is no failure.

Each part is a process of its own and prints every row as soon as it is known. Rows are also appended to a file of JSON lines; at the end
all are written as tables under benchmarks/results/, with device, versions and date. `speed` is relative to the first row of the part (in
parts with several inputs, to the first row of the same input). MFU of an FP8 row is relative to the FP8 peak, though the image tower
computes in bf16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the other files of benchmarks, from wherever this is started

import torch

from benchmarks import gpu_dali, routed_experts
from benchmarks.gpu_cases import CPU_MODELS, FIRST_PIECES, MODELS, PIECES, TE, Case, Model
from benchmarks.gpu_pieces import time_attention, time_swiglu, time_tower, time_tower_graph, time_trained_graph
from benchmarks.gpu_steps import look_inside, time_cases
from benchmarks.parts import Part, Row, emit, run_parts, short_of_time, wait_for_turn
from megatron_mm.config import Experiment
from megatron_mm.data.load.decode import has_dali
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.recipes import get_recipe

RESULTS = Path(__file__).with_name("results")
GPU_BACKENDS, CPU_BACKENDS = [("te", "bf16"), ("torch", "bf16")], [("torch", "fp32")]
MINUTES, MINUTES_OF_ALL = 8.0, 20.0
CPU_PIECES = ("inside debug_mm1", "pieces of debug_mm1", "tower graph of debug_infimm", "decoding", "routed experts")


def models_on(device: str) -> dict[str, Model]:
    """Return the parts that train a model on a device."""
    return MODELS if device == "cuda" else CPU_MODELS


def parts_of(device: str, *, everything: bool = True) -> list[str]:
    """Return the parts that are measured on a device, in order: first those that run unless all are asked for."""
    models = models_on(device)
    first = [name for name, model in models.items() if model.first_cases]
    first += FIRST_PIECES if device == "cuda" else CPU_PIECES
    rest = [name for name in (*models, *(PIECES if device == "cuda" else ())) if name not in first]
    return [*first, *rest] if everything else first


def cases_of(model: Model, *, everything: bool) -> list[Case]:
    """Return the cases of a part that trains a model."""
    return model.cases if everything else model.first_cases


def estimate(part: str, *, everything: bool) -> float:
    """Return the seconds of a part on one H200, at most."""
    if part in PIECES:
        return PIECES[part].of(1)
    return MODELS[part].seconds.of(len(cases_of(MODELS[part], everything=everything)))


def run_one(part: str, *, device: str, steps: int, out: Path, everything: bool) -> None:
    """Measure one part; this process exists for it alone."""
    models = models_on(device)
    if part in models:
        rows = time_cases(models[part].experiment(), cases_of(models[part], everything=everything), steps=steps)
    elif part in ("decoding", "routed experts"):
        rows = (decoding if part == "decoding" else compared_experts)(torch.device(device))
    else:
        rows = rows_of(part, device=device, out=out)
    wait_for_turn()
    for row in rows:
        emit(row)


def rows_of(part: str, *, device: str, out: Path) -> Iterator[Row]:
    """Measure a part of a recipe's model."""
    on_gpu = device == "cuda"
    backends, repeats = (GPU_BACKENDS, 10) if on_gpu else (CPU_BACKENDS, 1)
    if part.startswith("inside "):
        recipe = part.removeprefix("inside ")
        case = TE if on_gpu else Case("torch", "fp32")
        return look_inside(get_recipe(recipe), case, trace=out / f"trace_{recipe}.json.gz" if on_gpu else None)
    if part.startswith("pieces of "):
        base = get_recipe(part.removeprefix("pieces of "))
        return itertools.chain(
            time_attention(base, backends, repeats=2 * repeats),
            time_tower(base, backends, images=[1, 4, 8, 14, 28] if on_gpu else [1, 2], repeats=repeats),
        )
    if part.startswith("tower graph of "):
        base = get_recipe(part.removeprefix("tower graph of "))
        images, at_once = ([1, 4, 8, 14, 28], [4, 8, 16]) if on_gpu else ([1, 3], [2])
        return graphed_towers(base, backends, images=images, at_once=at_once, repeats=repeats, device=torch.device(device))
    raise ValueError(f"no part is called {part}: use one of {parts_of(device)}")


def graphed_towers(
    base: Experiment, backends: list[tuple[str, str]], *, images: list[int], at_once: list[int], repeats: int, device: torch.device
) -> Iterator[Row]:
    """Time a tower as CUDA graphs, by numbers of images in a micro-batch and per replay: InfiMM's is frozen, the others train."""
    if not isinstance(base.model, InfiMMConfig):
        return time_trained_graph(
            base, backends, images=[count for count in images if count <= max(at_once)], at_once=at_once, repeats=repeats
        )
    return itertools.chain(
        time_swiglu(base.model.vision, backends[0], images=images[-1], device=device, repeats=2 * repeats),
        time_tower_graph(base, backends, images=images, at_once=at_once, repeats=repeats),
    )


def decoding(device: torch.device) -> Iterator[Row]:
    """Time DALI and Pillow: beside a stream of matrix products, and alone."""
    if not has_dali():
        yield {"case": "DALI", "skipped": "nvidia-dali-cuda130 is not installed"}
        return
    torch.set_num_threads(1)
    threads = min(16, os.cpu_count() or 1)
    if device.type == "cuda":
        yield from gpu_dali.beside_training(torch.device("cuda", 0), threads=threads)
        yield from gpu_dali.rates(torch.device("cuda", 0), threads=threads, rounds=3, seconds=0.4)
    else:
        yield from gpu_dali.rates(device, threads=threads, rounds=1, seconds=0.1, sets=1)


def compared_experts(device: torch.device) -> Iterator[Row]:
    """Compare Mono-InternVL's routed experts with experts that compute all tokens."""
    small = routed_experts.Options(tokens=64, hidden_size=64, ffn_hidden_size=128, repeats=1)
    options = routed_experts.Options(tokens=4096, repeats=20) if device.type == "cuda" else small
    for case in routed_experts.cases_on(device):
        yield from routed_experts.compare(options, case)


def show(row: Row) -> None:
    """Print a line for a result."""
    part, case = row["part"], row.get("case", "")
    if short_of_time(row):
        print(f"{part}: {row['why']} (--part '{part}' measures it alone)", flush=True)
        return
    if "ended" in row:
        if row["ended"] != 0:
            print(f"{part}: {row['why']}", *row.get("stderr", []), sep="\n    ", flush=True)
        return
    values = "  ".join(f"{name} {value}" for name, value in row.items() if name not in ("part", "case", "at") and value is not None)
    print(f"{part} | {case} | {values}", flush=True)


def tables(rows: list[Row]) -> list[str]:
    """Return the lines of a Markdown table for each part."""
    lines: list[str] = []
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part and "ended" not in row]
        columns = list(dict.fromkeys(name for row in own for name in row if name not in ("part", "at")))
        lines += [f"## {part}", ""]
        if own:
            lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(str(row.get(name, '')).replace('|', '/').replace('None', '') for name in columns)} |" for row in own]
        lines += [f"{row['why']}" for row in rows if row["part"] == part and row.get("ended", 0) != 0]
        lines.append("")
    return lines


def versions() -> str:
    """Return the versions of the packages that the figures depend on."""
    found = [f"torch {torch.__version__}"]
    for package in ("megatron-core", "transformer-engine", "transformer-engine-torch", "nvidia-dali-cuda130"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def failed(row: Row) -> bool:
    """Whether a row says that a case or a part failed, which lack of time is not."""
    return "failed" in row or (row.get("ended", 0) != 0 and not short_of_time(row))


def parsed() -> argparse.Namespace:
    """Return the options; the program ends here if there is nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="all cases of a part, may be repeated; --list names them")
    parser.add_argument("--all", action="store_true", help="all parts and cases; default: those that answer a question")
    parser.add_argument("--list", action="store_true", help="name the parts, with the seconds that each takes at most on one H200")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=5, help="measured steps (default: %(default)s)")
    minutes = f"what still runs then is ended (default: {MINUTES:g}; {MINUTES_OF_ALL:g} with --all or --part)"
    parser.add_argument("--minutes", type=float, help=minutes)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results (default: %(default)s)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.all |= given.part is not None
    if given.minutes is None:
        given.minutes = MINUTES_OF_ALL if given.all else MINUTES
    known = parts_of(given.device)
    if unknown := [name for name in given.part or () if name not in known]:
        parser.error(f"no part is called {unknown[0]!r}: use one of {known}")
    given.part = given.part or parts_of(given.device, everything=given.all)
    if given.list:
        on_gpu = given.device == "cuda"
        print(*(f"{name}: {estimate(name, everything=given.all):.0f} s" if on_gpu else name for name in given.part), sep="\n")
        sys.exit()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("gpu_bench: error: torch finds no GPU here: run it on a machine with one, or with --device cpu", file=sys.stderr)
        sys.exit(2)
    return given


def main() -> None:
    given = parsed()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.one:
        run_one(given.one, device=given.device, steps=given.steps, out=given.out, everything=given.all)
        return
    began, now = time.monotonic(), datetime.now(UTC)
    device = torch.cuda.get_device_name(0) if given.device == "cuda" else "CPU"
    stem = given.out / f"gpu_bench_{device.replace(' ', '_')}_{now:%Y%m%d_%H%M}"
    heading = f"{device}; {versions()}; {now:%Y-%m-%d}. `python benchmarks/gpu_bench.py`"
    print(heading, flush=True)
    if given.device == "cuda":
        seconds = sum(estimate(name, everything=given.all) for name in given.part)
        print(f"{len(given.part)} parts: at most {seconds:.0f} s on one H200, of {60 * given.minutes:.0f} s allowed", flush=True)
    common = ["--device", given.device, "--steps", str(given.steps), "--out", str(given.out), *["--all"] * given.all]
    parts = [Part(name, [__file__, *common, "--one", name]) for name in given.part]
    record = stem.with_suffix(".jsonl")
    record.write_text(json.dumps({"device": device, "versions": versions(), "date": f"{now:%Y-%m-%d}"}) + "\n")
    rows: list[Row] = []
    for row in run_parts(parts, at_once=1, deadline=began + 60 * given.minutes, record=record):
        show(row)
        rows.append(row)
    path = stem.with_suffix(".md")
    path.write_text("\n".join(["# Training on one device", "", heading, "", *tables(rows)]))
    print(f"written to {path} in {time.monotonic() - began:.0f} s")
    sys.exit(int(any(map(failed, rows))))


if __name__ == "__main__":
    main()
