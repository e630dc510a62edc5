"""`make gpu-bench`: step time, throughput and memory of training on one GPU, by layer backend, precision and recompute.

    python benchmarks/gpu_bench.py [--model mm1_1b] [--device cpu]

Every row is a process of its own that trains, under the recipe's policy, on the same full sequences (for the MM1 models 4096 tokens with
14 images, for InfiMM 384 with 12, for Mono-InternVL 4096 with 8 tiles), which lie in memory, so that nothing but the model is measured.
The ratio is to the first row of the same model, plain PyTorch in bf16 without recompute. MFU of an FP8 row is of the FP8 peak, though the
image tower computes in bf16. Writes a table with device, versions and date under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.registry import family_of
from megatron_mm.flops import StepWork, mfu, peak_tflops
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import image_input
from megatron_mm.run.start import check_shapes
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    layers: str
    precision: str
    recompute: str

    def __str__(self) -> str:
        return f"{self.layers} {self.precision} recompute {self.recompute}"


CASES = [
    Case(layers, precision, recompute)
    for recompute in ("none", "full", "selective")
    for layers, precision in (("torch", "bf16"), ("te", "bf16"), ("te", "fp8"))
]
"""What tells most comes first, as time may run out."""
CPU_CASES = [Case("torch", "fp32", "none"), Case("torch", "fp32", "selective"), Case("torch", "fp32", "full")]
MODELS = ["mm1_1b", "mm1_7b", "infimm_zephyr_7b_pt", "mono_internvl_2b_s1_3"]
CPU_MODELS = ["debug_mm1", "debug_infimm", "debug_mono_internvl"]
LAYERS_OF_ONE_GPU = {"mm1_7b": 8, "mm1_3b": 16, "infimm_zephyr_7b_pt": 8, "mono_internvl_2b_s1_3": 12}
"""Decoder layers of the models that are too deep for one 80 GB GPU, or for the time that a table may take."""
MICRO_BATCHES = 4
"""Of a step."""


def experiment(model: str, case: Case) -> Experiment:
    """The recipe on one process, as deep as one GPU holds."""
    base = get_recipe(model)
    depth = LAYERS_OF_ONE_GPU.get(model, base.model.decoder.num_layers)
    return replace(
        base,
        model=replace(base.model, decoder=replace(base.model.decoder, num_layers=depth)),
        parallel=replace(base.parallel, tensor=1, pipeline=1, virtual=1, stage_layers=None, recompute=case.recompute),  # type: ignore[arg-type]
        train=replace(
            base.train,
            global_batch_size=MICRO_BATCHES * base.train.micro_batch_size,
            precision=case.precision,  # type: ignore[arg-type]
            layers=case.layers,  # type: ignore[arg-type]
        ),
    )


def full_batch(settings: Experiment) -> PackedBatch:
    """Sequences of one document each, with as many images as are allowed and fit, between equal stretches of text."""
    image, length, sequences = image_input(settings), settings.data.sequence_length, settings.train.micro_batch_size
    of_sequence = min(settings.data.max_images_per_sequence, length // (2 * image.tokens))
    begins = torch.arange(sequences).repeat_interleave(of_sequence) * length
    starts = begins + (torch.arange(of_sequence) * (length // of_sequence) + 1 + len(image.before)).repeat(sequences)
    total, images = sequences * length, len(starts)
    ids = torch.randint(5, settings.model.decoder.vocab_size, (total,), generator=torch.Generator().manual_seed(0))
    is_image = torch.zeros(total, dtype=torch.bool)
    is_image[(starts[:, None] + torch.arange(image.tokens)).flatten()] = True
    mask = (~is_image.roll(-1)).float()
    mask[length - 1 :: length] = 0
    return PackedBatch(
        token_ids=ids,
        labels=ids.roll(-1),
        loss_mask=mask,
        is_token=torch.ones(total, dtype=torch.bool),
        position_ids=torch.arange(length).repeat(sequences),
        source_ids=torch.zeros(total, dtype=torch.int64),
        cu_seqlens=(torch.arange(sequences + 1) * length).int(),
        max_seqlen=length,
        image_starts=starts,
        image_owners=torch.zeros(images, dtype=torch.int64),
        image_documents=torch.stack([begins, begins + length], dim=1),
        pixels=torch.randint(0, 256, (images, 3, image.size, image.size), dtype=torch.uint8),
    )


def measure(model: str, case: Case, *, steps: int) -> dict[str, float]:
    """Median seconds of a step and the peak of allocated memory; called in a process of its own."""
    settings = experiment(model, case)
    check_shapes(settings, 1)
    topology = topologies.initialize(settings.parallel, seed=1)
    on_gpu = topology.device.type == "cuda"
    chunks = build_model(settings, topology)
    step = TrainingStep(settings, topology, chunks, build_optimizer(settings, chunks), num_sources=1)
    batch = full_batch(settings).to(topology.device)
    seconds, losses = [], []
    for number in range(1, steps + 4):
        began = time.perf_counter()
        losses.append(step.run([batch] * MICRO_BATCHES, step=number).losses.mean)  # ends with a read-back
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[3:])
    tokens, length = MICRO_BATCHES * batch.num_tokens, settings.data.sequence_length
    work = StepWork(num_tokens=tokens, sum_squared_lengths=tokens * length, num_images=MICRO_BATCHES * batch.num_images)
    flops = family_of(settings.model).step_flops(settings.model, settings.train.freeze_policy, work)
    topologies.shutdown()
    return {
        "seconds": median,
        "tokens_per_s": tokens / median,
        "tflops": flops / median / 1e12,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        "loss": losses[-1],
    }


def row(case: Case, found: dict[str, Any] | str, baseline: float | None, peak: float | None) -> str:
    """A line of the table."""
    if isinstance(found, str):
        return f"| {case} | {found} | | | | | | |"
    ratio = "" if baseline is None else f"{baseline / found['seconds']:.2f}"
    used = mfu(found["tflops"], peak)
    return (
        f"| {case} | {1e3 * found['seconds']:.0f} | {ratio} | {found['tokens_per_s']:,.0f} | {found['tflops']:.3g} | "
        f"{'' if used is None else f'{100 * used:.1f}%'} | {found['gib']:.1f} | {found['loss']:.3f} |"
    )


def table(model: str, cases: list[Case], *, device: str, steps: int, deadline: float) -> list[str]:
    """Run every case in a process of its own; none begins after the deadline (`time.monotonic`)."""
    lines = [
        f"## {model}",
        "",
        f"{LAYERS_OF_ONE_GPU[model]} of its decoder layers, which one GPU holds.\n" if model in LAYERS_OF_ONE_GPU else "",
    ]
    lines += [
        "| layers, precision | ms a step | speed, ratio | tokens/s | TFLOP/s | MFU | peak GiB | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    baseline = None
    for case in cases:
        if time.monotonic() > deadline:
            print(f"{case} and what follows: no time left")
            break
        command = [sys.executable, __file__, "--one", model, case.layers, case.precision, case.recompute, "--steps", str(steps)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=180)
            found = (
                json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]
            )
        except subprocess.TimeoutExpired:
            found = "took longer than 180 s"
        if isinstance(found, str):
            found = found[:100].replace("|", "/")
        elif baseline is None:
            baseline = found["seconds"]
        lines.append(row(case, found, baseline, peak_tflops(device, case.precision)))  # type: ignore[arg-type]
        print(lines[-1], flush=True)
    return [*lines, ""]


def versions() -> str:
    """Of what the figures depend on."""
    found = [f"torch {torch.__version__}"]
    for package in ("megatron-core", "transformer-engine", "transformer-engine-torch", "nvidia-dali-cuda130"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"recipe (default: {', '.join(MODELS)}; small ones on a CPU)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=6, help="measured steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=18.0, help="no case begins later, over all models (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the table (default: %(default)s)")
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "LAYERS", "PRECISION", "RECOMPUTE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        model, *case = arguments.one
        print(json.dumps(measure(model, Case(*case), steps=arguments.steps)))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_bench: error: torch finds no GPU here: run it on a machine with one, or with --device cpu", file=sys.stderr)
        sys.exit(2)
    on_gpu = arguments.device == "cuda"
    device = torch.cuda.get_device_name(0) if on_gpu else "CPU"
    now = datetime.now(UTC)
    lines = ["# Training on one device", "", f"{device}; {versions()}; {now:%Y-%m-%d}. `python benchmarks/gpu_bench.py`", ""]
    print(lines[2])
    models, began = arguments.model or (MODELS if on_gpu else CPU_MODELS), time.monotonic()
    for number, model in enumerate(models, start=1):
        deadline = began + 60 * arguments.minutes * number / len(models)
        lines += table(model, CASES if on_gpu else CPU_CASES, device=device, steps=arguments.steps, deadline=deadline)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"gpu_bench_{device.replace(' ', '_')}_{now:%Y%m%d}.md"
    path.write_text("\n".join(lines))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
