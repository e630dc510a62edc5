"""`make gpu-bench`: cost of training on one GPU by layer backend, precision and recompute, with a breakdown of time and memory.

    python benchmarks/gpu_bench.py [--part mm1_1b ...] [--minutes 8] [--device cpu]

Each part is a process of its own and prints every row as soon as it is known. Rows are also appended to a file of JSON lines; at the end
all are written as tables under benchmarks/results/, with device, versions and date. `speed` is relative to the first row of the part (in
parts with several inputs, to the first row of the same input). MFU of an FP8 row is relative to the FP8 peak, though the image tower
computes in bf16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the other files of benchmarks, from wherever this is started

import torch

from benchmarks.gpu_cases import CPU_MODELS, MODELS, TE, Case
from benchmarks.gpu_pieces import time_attention, time_swiglu, time_tower, time_tower_graph, time_trained_graph
from benchmarks.gpu_steps import look_inside, time_cases
from benchmarks.parts import Part, Row, emit, run_parts, wait_for_turn
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.recipes import get_recipe

RESULTS = Path(__file__).with_name("results")
GPU_BACKENDS, CPU_BACKENDS = [("te", "bf16"), ("torch", "bf16")], [("torch", "fp32")]
PIECES = ("inside mm1_1b", "pieces of mm1_1b", "tower graph of infimm_zephyr_7b_pt", "tower graph of mm1_1b")
CPU_PIECES = ("inside debug_mm1", "pieces of debug_mm1", "tower graph of debug_infimm")


def parts_of(device: str) -> list[str]:
    """Return the parts that are measured on a device, in order."""
    first, *others = MODELS if device == "cuda" else CPU_MODELS
    return [first, *(PIECES if device == "cuda" else CPU_PIECES), *others]


def run_one(part: str, *, device: str, steps: int, out: Path) -> None:
    """Measure one part; this process exists for it alone."""
    on_gpu = device == "cuda"
    models = MODELS if on_gpu else CPU_MODELS
    backends = GPU_BACKENDS if on_gpu else CPU_BACKENDS
    if part in models:
        experiment, cases = models[part]
        rows = time_cases(experiment(), cases, steps=steps)
    elif part.startswith("inside "):
        recipe = part.removeprefix("inside ")
        case = TE if on_gpu else Case("torch", "fp32")
        rows = look_inside(get_recipe(recipe), case, trace=out / f"trace_{recipe}.json.gz" if on_gpu else None)
    elif part.startswith("pieces of "):
        base = get_recipe(part.removeprefix("pieces of "))
        rows = itertools.chain(
            time_attention(base, backends, repeats=20 if on_gpu else 1),
            time_tower(base, backends, images=[1, 4, 8, 14, 28] if on_gpu else [1, 2], repeats=10 if on_gpu else 1),
        )
    elif part.startswith("tower graph of "):
        base = get_recipe(part.removeprefix("tower graph of "))
        images, at_once = ([1, 4, 8, 14, 28], [4, 8, 16]) if on_gpu else ([1, 3], [2])
        if not isinstance(base.model, InfiMMConfig):
            rows = time_trained_graph(base, backends, images=[1, 4, 8, 14], at_once=[4, 8, 16], repeats=10)
        else:
            rows = itertools.chain(
                time_swiglu(base.model.vision, backends[0], images=images[-1], device=torch.device(device), repeats=20 if on_gpu else 1),
                time_tower_graph(base, backends, images=images, at_once=at_once, repeats=10 if on_gpu else 1),
            )
    else:
        raise ValueError(f"no part is called {part}: use one of {parts_of(device)}")
    wait_for_turn()
    for row in rows:
        emit(row)


def show(row: Row) -> None:
    """Print a line for a result."""
    part, case = row["part"], row.get("case", "")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="default: all; --list names them")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=5, help="measured steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="what still runs then is killed (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results (default: %(default)s)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print(*parts_of(arguments.device), sep="\n")
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_bench: error: torch finds no GPU here: run it on a machine with one, or with --device cpu", file=sys.stderr)
        sys.exit(2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        run_one(arguments.one, device=arguments.device, steps=arguments.steps, out=arguments.out)
        return
    began, now = time.monotonic(), datetime.now(UTC)
    device = torch.cuda.get_device_name(0) if arguments.device == "cuda" else "CPU"
    stem = arguments.out / f"gpu_bench_{device.replace(' ', '_')}_{now:%Y%m%d_%H%M}"
    heading = f"{device}; {versions()}; {now:%Y-%m-%d}. `python benchmarks/gpu_bench.py`"
    print(heading, flush=True)
    common = ["--device", arguments.device, "--steps", str(arguments.steps), "--out", str(arguments.out)]
    parts = [Part(name, [__file__, *common, "--one", name]) for name in arguments.part or parts_of(arguments.device)]
    record = stem.with_suffix(".jsonl")
    record.write_text(json.dumps({"device": device, "versions": versions(), "date": f"{now:%Y-%m-%d}"}) + "\n")
    rows: list[Row] = []
    for row in run_parts(parts, at_once=1, deadline=began + 60 * arguments.minutes, record=record):
        show(row)
        rows.append(row)
    path = stem.with_suffix(".md")
    path.write_text("\n".join(["# Training on one device", "", heading, "", *tables(rows)]))
    print(f"written to {path} in {time.monotonic() - began:.0f} s")
    sys.exit(int(any(row.get("ended", 0) != 0 or "failed" in row for row in rows)))


if __name__ == "__main__":
    main()
