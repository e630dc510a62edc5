"""`make gpu-check`: does this GPU compute what the tests verify on a CPU?

    python tools/gpu_check.py [--device cpu]

Compares Transformer Engine's layers with plain PyTorch's in bf16 and FP8 for every family, DALI's GPU decoder with the CPU's, the fused
optimizer that megatron-core finds with torch's AdamW, towers and routers as CUDA graphs with those without, and deterministic runs with
their repeats and resumes, bit by bit. Each check is a process of its own; on a GPU they run at the same time. Each line of the table is
printed as soon as its result is known. The exit code is 1 if a check fails and 2 if there is no GPU. `--device cpu`
runs the checks that need no GPU, which tests this program itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the other files of tools and benchmarks, from wherever this is started

import torch

from benchmarks.parts import Part, Row, emit, run_parts, wait_for_turn
from megatron_mm.data.prepare.demo import prepare_demo
from megatron_mm.run.doctor import diagnose, report
from tools.gpu_check_layers import RECIPES, Checked, Skipped, check_layers
from tools.gpu_check_parts import (
    check_decoders,
    check_fp8_weights,
    check_optimizer,
    check_repeats,
    check_router_graph,
    check_tower_graph,
)

CHECKS: dict[str, Callable[[Path, torch.device], Iterator[Checked | Skipped]]] = {
    **{f"layers of {recipe}": partial(check_layers, recipe=recipe) for recipe in RECIPES},
    "decoders": check_decoders,
    "optimizer": check_optimizer,
    "FP8 weights": check_fp8_weights,
    "tower graph": check_tower_graph,
    "router graph": check_router_graph,
    **{f"repeats of {recipe}": partial(check_repeats, recipe=recipe) for recipe in RECIPES},
}


def run_one(name: str, data: Path, device: torch.device) -> None:
    """Run one check; this process exists for it alone."""
    wait_for_turn()
    torch.backends.cudnn.allow_tf32 = False  # else fp32 convolutions on a GPU keep 10 bits, and fp32 is the reference
    for line in CHECKS[name](data, device):
        emit({**asdict(line), "holds": line.holds if isinstance(line, Checked) else None})


def show(row: Row) -> None:
    """Print a line of the table as soon as it is known."""
    if "ended" in row:
        if row["ended"] != 0:
            print(f"{row['part']}: {row['why']}", *row.get("stderr", []), sep="\n  ", flush=True)
    elif row["holds"] is None:
        print(f"{row['what']:66} not checked: {row['why']}", flush=True)
    else:
        print(f"{row['what']:66} {row['found']:10.2e} {row['allowed']:10.2e}  {'ok' if row['holds'] else 'FAILED'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="what still runs then is killed (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=list(CHECKS), help="default: all")
    parser.add_argument("--at-once", type=int, help="checks that run at the same time (default: all on a GPU, 1 on a CPU)")
    parser.add_argument("--record", type=Path, help="file to append every result to, as a line of JSON")
    parser.add_argument("--one", nargs=2, metavar=("CHECK", "DATA"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: error: torch finds no GPU here: run it on a machine with one, or with --device cpu", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    if arguments.one:
        run_one(arguments.one[0], Path(arguments.one[1]), device)
        return
    began = time.monotonic()
    print(report(diagnose()), "\n", flush=True)
    print(f"{'check':66} {'found':>10} {'allowed':>10}", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare_demo(data, samples=400)
        parts = [Part(name, [__file__, "--device", arguments.device, "--one", name, str(data)]) for name in arguments.only or CHECKS]
        at_once = arguments.at_once or (len(parts) if device.type == "cuda" else 1)
        for row in run_parts(parts, at_once=at_once, deadline=began + 60 * arguments.minutes, record=arguments.record):
            show(row)
            rows.append(row)
    checked = [row for row in rows if row.get("holds") is not None]
    print(f"{len(checked)} checks in {time.monotonic() - began:.0f} s")
    sys.exit(int(any(row.get("ended", 0) != 0 for row in rows) or not all(row["holds"] for row in checked)))


if __name__ == "__main__":
    main()
