"""`make gpu-check`: is what runs on this GPU what the tests hold on a CPU?

    python tools/gpu_check.py [--device cpu]

Compares Transformer Engine's layers with plain PyTorch's in bf16 and FP8, DALI's GPU decoder with the CPU's, and the fused
optimizer that megatron-core finds with torch's AdamW. Prints a table; exit code 1 where a check fails, 2 where there is no GPU.
`--device cpu` runs the checks that need no GPU, so that this program is known to work.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_mm.config import Experiment, MM1Config
from megatron_mm.data.decode import has_dali, make_decoder
from megatron_mm.data.demo import prepare_demo
from megatron_mm.data.index import open_split
from megatron_mm.data.pipeline import TrainingData
from megatron_mm.data.shards import read_range
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.doctor import diagnose, report
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.build import build_model
from megatron_mm.platform.adam import FusedAdamW
from megatron_mm.recipes import get_recipe
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

STEPS = 5


@dataclass(frozen=True)
class Checked:
    """One line of the table."""

    what: str
    found: float
    allowed: float
    """The check holds where found <= allowed."""


@dataclass(frozen=True)
class Curve:
    """What a few steps of training did."""

    losses: list[float]
    grad_norms: list[float]


def experiment(data: Path, *, precision: str, layers: str) -> Experiment:
    """debug_mm1 with heads of 64 and widths that FP8 products can take."""
    base = get_recipe("debug_mm1")
    assert isinstance(base.model, MM1Config)
    decoder = replace(base.model.decoder, hidden_size=256, head_dim=64, ffn_hidden_size=512, num_query_groups=2)
    vision = replace(base.model.vision, hidden_size=256, ffn_hidden_size=512)
    return replace(
        base,
        model=replace(base.model, decoder=decoder, vision=vision),
        data=replace(base.data, path=data, decoder="pillow"),
        train=replace(base.train, precision=precision, layers=layers),  # type: ignore[arg-type]
    )


def train(settings: Experiment) -> Curve:
    """A few steps on demo data."""
    topology = topologies.initialize(settings.parallel, seed=settings.train.seed)
    try:
        model = build_model(settings, topology)
        step = TrainingStep(settings, topology, model, build_optimizer(settings, model), num_sources=len(settings.data.sources))
        data = TrainingData(settings, topology, Tokenizer.open(settings.data.tokenizer_path))
        results = [step.run(next(data).micro_batches, step=number) for number in range(1, STEPS + 1)]
        data.close()
        return Curve([result.losses.mean for result in results], [result.update.grad_norm for result in results])
    finally:
        topologies.shutdown()


def distance(one: list[float], other: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def check_layers(data: Path, device: torch.device) -> Iterator[Checked]:
    """bf16 and FP8 layers against fp32 PyTorch ones: rounding alone may tell them apart.

    The yardstick of bf16 is what PyTorch's own bf16 layers are off by, three times of it; of FP8 a few percent, as its 3 bits of
    mantissa (2^-4) partly average out in sums of hundreds.
    """
    exact = train(experiment(data, precision="fp32", layers="torch"))
    plain = train(experiment(data, precision="bf16", layers="torch"))
    losses, norms = distance(plain.losses, exact.losses), distance(plain.grad_norms, exact.grad_norms)
    yield Checked("torch bf16 against torch fp32: loss", losses, 2e-2)
    yield Checked("torch bf16 against torch fp32: gradient norm", norms, 1e-1)
    if device.type != "cuda":
        return
    engine = train(experiment(data, precision="bf16", layers="te"))
    yield Checked("te bf16 against torch fp32: loss", distance(engine.losses, exact.losses), max(3 * losses, 5e-3))
    yield Checked("te bf16 against torch fp32: gradient norm", distance(engine.grad_norms, exact.grad_norms), max(3 * norms, 2e-2))
    eight = train(experiment(data, precision="fp8", layers="te"))
    yield Checked("te fp8 against torch fp32: loss", distance(eight.losses, exact.losses), 5e-2)
    yield Checked("te fp8 against torch fp32: gradient norm", distance(eight.grad_norms, exact.grad_norms), 3e-1)


def check_decoders(data: Path, device: torch.device) -> Iterator[Checked]:
    """DALI's decoder against Pillow, levels of 255 on average and at the 99.9th percentile."""
    if not has_dali():
        return
    (index,) = open_split(data, "heldout", sources=["pairs"])
    rows = index.items[index.items["is_image"] == 1][:64]
    blobs = [read_range(index.shard_path(0), int(row["offset"]), int(row["size"])) for row in rows]
    pixels = {}
    for backend in ("dali", "pillow"):
        decoder = make_decoder(backend, image_size=64, threads=2, fill=(0, 0, 0), device=device)  # type: ignore[arg-type]
        decoded = decoder.decode(blobs)
        assert decoded.ok.all()
        pixels[backend] = decoded.pixels.cpu().float()
        decoder.close()
    difference = (pixels["dali"] - pixels["pillow"]).abs().flatten()
    yield Checked(f"DALI on {device.type} against Pillow: mean level", float(difference.mean()), 1.0)
    yield Checked(
        f"DALI on {device.type} against Pillow: 99.9th percentile", float(difference.sort().values[int(0.999 * len(difference))]), 16.0
    )


def check_optimizer(data: Path, device: torch.device) -> Iterator[Checked]:
    """The Adam that megatron-core uses here against torch's AdamW, over 20 steps; and its state read by ours."""
    from megatron_mm.platform import adam

    adam.install()
    from megatron.core import optimizer as megatron_optimizer

    def steps(kind: Callable, state: dict | None = None) -> tuple[torch.Tensor, dict]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(300, 50, generator=generator).to(device))
        optimizer = kind([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        for _ in range(20):
            weight.grad = torch.randn(weight.shape, generator=generator).to(device)
            optimizer.step()
        return weight.detach(), optimizer.state_dict()

    name = f"{megatron_optimizer.Adam.__module__.split('.')[0]}.{megatron_optimizer.Adam.__name__}"
    theirs, state = steps(megatron_optimizer.Adam)
    reference, _ = steps(torch.optim.AdamW)
    yield Checked(f"{name} against torch.optim.AdamW, 20 steps", float((theirs - reference).abs().max()), 1e-5)
    again, _ = steps(megatron_optimizer.Adam, state)
    ours, _ = steps(FusedAdamW, state)
    yield Checked(f"FusedAdamW going on from {name}'s state", float((ours - again).abs().max()), 1e-5)


CHECKS = (check_layers, check_decoders, check_optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: error: torch finds no GPU here: run it on a machine with one, or with --device cpu", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    print(report(diagnose()), "\n")
    began = time.monotonic()
    lines: list[Checked] = []
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare_demo(data, samples=400)
        for check in CHECKS:
            try:
                lines.extend(check(data, device))
            except Exception as error:  # the other checks still tell something
                failures.append(f"{check.__name__}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    print(f"{'check':58} {'found':>10} {'allowed':>10}")
    for line in lines:
        print(f"{line.what:58} {line.found:10.2e} {line.allowed:10.2e}  {'ok' if line.found <= line.allowed else 'FAILED'}")
    print(*failures, f"{len(lines)} checks in {time.monotonic() - began:.0f} s", sep="\n")
    sys.exit(int(bool(failures) or any(not line.found <= line.allowed for line in lines)))


if __name__ == "__main__":
    main()
