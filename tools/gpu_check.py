"""`make gpu-check`: is what runs on this GPU what the tests hold on a CPU?

    python tools/gpu_check.py [--device cpu]

Compares Transformer Engine's layers with plain PyTorch's in bf16 and FP8, DALI's GPU decoder with the CPU's, and the fused
optimizer that megatron-core finds with torch's AdamW. Prints a table; exit code 1 where a check fails, 2 where there is no GPU.
`--device cpu` runs the checks that need no GPU, so that this program is known to work.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_mm.config import Experiment, MM1Config
from megatron_mm.data.decode import has_dali, make_decoder
from megatron_mm.data.demo import prepare_demo
from megatron_mm.data.index import open_split
from megatron_mm.data.pipeline import TrainingData, open_tokenizer
from megatron_mm.data.shards import read_range
from megatron_mm.doctor import diagnose, report
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.build import build_model
from megatron_mm.parallel.initial_weights import STATE_METADATA
from megatron_mm.platform import adam
from megatron_mm.recipes import get_recipe
from megatron_mm.training.checkpoint import Checkpointer, TrainState
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

megatron_optimizer: Any = importlib.import_module("megatron.core.optimizer")
distributed_optimizer: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")

STEPS = 5


@dataclass(frozen=True)
class Checked:
    """One line of the table."""

    what: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        """False for a NaN, too."""
        return self.found <= self.allowed


@dataclass(frozen=True)
class Skipped:
    """What could not be checked here, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Seen:
    """What a few steps of training did."""

    losses: list[float]
    layers: dict[str, torch.Tensor]
    """Output of every layer for the first micro-batch of the first step, on the CPU in fp32."""
    gradients: dict[str, torch.Tensor]
    """Of the first step, by the parameter's name in checkpoints."""


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
        optimizer=replace(base.optimizer, clip_grad_norm=0.0),  # gradients are looked at after the step
        train=replace(base.train, global_batch_size=4, precision=precision, layers=layers),  # type: ignore[arg-type]
    )


def train(settings: Experiment) -> Seen:
    """A few steps on demo data. Initial weights and data depend on names and seeds alone, so they are the same for all settings."""
    topology = topologies.initialize(settings.parallel, seed=settings.train.seed)
    try:
        model = build_model(settings, topology)
        step = TrainingStep(settings, topology, model, build_optimizer(settings, model), num_sources=len(settings.data.sources))
        data = TrainingData(settings, topology, open_tokenizer(settings))
        layers: dict[str, torch.Tensor] = {}
        hooks = [module.register_forward_hook(_keep(layers, name)) for name, module in _layers(model[0].module)]
        losses, gradients = [], {}
        for number in range(1, STEPS + 1):
            losses.append(step.run(next(data).micro_batches, step=number).losses.mean)
            if number == 1:
                gradients = _gradients(model[0].module)
                for hook in hooks:
                    hook.remove()
        data.close()
        return Seen(losses, layers, gradients)
    finally:
        topologies.shutdown()


def _layers(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((name, module) for name, module in chunk.named_modules() if isinstance(module, TransformerLayer))


def _keep(into: dict[str, torch.Tensor], name: str) -> Callable:
    def hook(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        into.setdefault(name, output[0].detach().float().cpu())

    return hook


def _gradients(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer neither clips nor changes the buffers that hold them."""
    state = chunk.sharded_state_dict(metadata=dict(STATE_METADATA))  # type: ignore[operator]
    return {entry.key: entry.data.main_grad.detach().float().cpu() for entry in state.values() if hasattr(entry.data, "main_grad")}


def distance(one: list[float], other: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def farthest(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of the tensor where this is largest; a NaN is farther than anything."""
    assert ones.keys() == others.keys() and ones, "not the same names"
    found = torch.stack([(one - others[name]).norm() / others[name].norm().clamp(min=1e-12) for name, one in ones.items()])
    return float("inf") if found.isnan().any() else float(found.max())


def together(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The same of all tensors as one long vector."""
    return farthest(*({"all": torch.cat([each[name].flatten() for name in others])} for each in (ones, others)))


def check_layers(data: Path, device: torch.device) -> Iterator[Checked | Skipped]:
    """bf16 and FP8 layers against fp32 PyTorch ones of the same weights, on the same batches: rounding alone may tell them apart.

    The yardstick of bf16 is what PyTorch's own bf16 layers are off by, three times of it. FP8 keeps 3 bits of mantissa (rounding to
    2^-4 of a value, and to 2^-3 in the gradients, which have 2 bits), which partly averages out in sums of hundreds.
    """
    exact = train(experiment(data, precision="fp32", layers="torch"))

    def against_exact(what: str, seen: Seen, *, loss: float, layer: float, gradients: float) -> Iterator[Checked]:
        yield Checked(f"{what}: worst layer's output", farthest(seen.layers, exact.layers), layer)
        yield Checked(f"{what}: gradient", together(seen.gradients, exact.gradients), gradients)
        yield Checked(f"{what}: loss of {STEPS} steps", distance(seen.losses, exact.losses), loss)

    again = train(experiment(data, precision="fp32", layers="torch"))
    yield from against_exact("torch fp32 again", again, loss=1e-5, layer=1e-5, gradients=1e-4)
    plain = train(experiment(data, precision="bf16", layers="torch"))
    yield from against_exact("torch bf16", plain, loss=2e-2, layer=5e-2, gradients=1e-1)
    if device.type != "cuda" or importlib.util.find_spec("transformer_engine") is None:
        yield Skipped("te bf16 and fp8 layers", "needs a GPU" if device.type != "cuda" else "Transformer Engine is not installed")
        return
    limits = {
        "loss": max(3 * distance(plain.losses, exact.losses), 5e-3),
        "layer": max(3 * farthest(plain.layers, exact.layers), 1e-2),
        "gradients": max(3 * together(plain.gradients, exact.gradients), 2e-2),
    }
    yield from against_exact("te bf16", train(experiment(data, precision="bf16", layers="te")), **limits)
    yield from against_exact("te fp8", train(experiment(data, precision="fp8", layers="te")), loss=5e-2, layer=2e-1, gradients=4e-1)


def check_decoders(data: Path, device: torch.device) -> Iterator[Checked | Skipped]:
    """DALI's decoder against Pillow, and on a GPU against its own CPU backend: levels of 255, on average and at the 99.9th percentile."""
    if not has_dali():
        yield Skipped("DALI", "is not installed")
        return
    (index,) = open_split(data, "heldout", sources=["pairs"])
    rows = index.items[index.items["is_image"] == 1][:64]
    blobs = [read_range(index.shard_path(0), int(row["offset"]), int(row["size"])) for row in rows]

    def decode(backend: Literal["dali", "pillow"], place: torch.device) -> torch.Tensor:
        decoder = make_decoder(backend, image_size=64, threads=2, fill=(0, 0, 0), device=place)
        decoded = decoder.decode(blobs)
        decoder.close()
        assert decoded.ok.all()
        assert backend == "pillow" or decoded.pixels.device.type == place.type, "DALI failed and Pillow decoded: see its warning"
        return decoded.pixels.cpu().float()

    pixels, cpu = decode("dali", device), torch.device("cpu")
    references = {"Pillow": decode("pillow", cpu)}
    if device.type == "cuda":
        references["DALI on the CPU"] = decode("dali", cpu)
    for name, reference in references.items():
        difference = (pixels - reference).abs().flatten().sort().values
        yield Checked(f"DALI on {device.type} against {name}: mean level", float(difference.mean()), 1.0)
        yield Checked(f"DALI on {device.type} against {name}: 99.9th percentile", float(difference[int(0.999 * len(difference))]), 16.0)


def check_optimizer(data: Path, device: torch.device) -> Iterator[Checked | Skipped]:
    """The Adam that megatron-core uses here against torch's AdamW and ours: weights and moments after 5 steps on the same gradients."""
    adam.install()

    def steps(kind: Callable) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(300, 50, generator=generator).to(device))
        optimizer = kind([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for _ in range(STEPS):
            weight.grad = torch.randn(weight.shape, generator=generator).to(device)
            optimizer.step()
        moments = {name: value.cpu() for name, value in optimizer.state[weight].items() if name.startswith("exp_avg")}
        return {"weight": weight.detach().cpu(), **moments}

    here = megatron_optimizer.Adam
    name = f"{here.__module__.split('.')[0]}.{here.__name__}"
    theirs = steps(here)
    for other in (torch.optim.AdamW, adam.FusedAdamW):
        yield Checked(f"{name} against {other.__name__}: weights, moments", farthest(theirs, steps(other)), 1e-5)
    straight = run_on(data, [here, here])
    for pair in ([here, adam.FusedAdamW], [adam.FusedAdamW, here]):
        what = " then ".join(kind.__name__ for kind in pair)
        yield Checked(f"{what}, through a checkpoint: loss", distance(run_on(data, pair), straight), 1e-5)


def run_on(data: Path, kinds: list[type]) -> list[float]:
    """Losses of a run in parts of 3 steps, each part with its own kind of Adam, from the checkpoint of the part before."""
    settings = experiment(data, precision="fp32", layers="torch")
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for part, kind in enumerate(kinds):
            topology = topologies.initialize(settings.parallel, seed=settings.train.seed)
            try:
                model = build_model(settings, topology)
                with using(kind):
                    optimizer = build_optimizer(settings, model)
                checkpointer = Checkpointer(settings, topology, Path(folder), model, optimizer)
                assert (checkpointer.load_latest() is None) == (part == 0)
                step = TrainingStep(settings, topology, model, optimizer, num_sources=len(settings.data.sources))
                batches = TrainingData(settings, topology, open_tokenizer(settings))
                for number in range(1, 3 * part + 4):
                    micro_batches = next(batches).micro_batches
                    if number > 3 * part:
                        losses.append(step.run(micro_batches, step=number).losses.mean)
                batches.close()
                checkpointer.save(TrainState(step=3 * part + 3))
                checkpointer.finish()
            finally:
                topologies.shutdown()
    return losses


@contextlib.contextmanager
def using(kind: type) -> Iterator[None]:
    """megatron-core builds this kind of Adam inside."""
    before = megatron_optimizer.Adam
    megatron_optimizer.Adam = distributed_optimizer.Adam = kind
    try:
        yield
    finally:
        megatron_optimizer.Adam = distributed_optimizer.Adam = before


CHECKS = (check_layers, check_decoders, check_optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: error: torch finds no GPU here: run it on a machine with one, or with --device cpu", file=sys.stderr)
        sys.exit(2)
    torch.backends.cudnn.allow_tf32 = False  # else fp32 convolutions on a GPU keep 10 bits, and fp32 is what all is measured by
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    print(report(diagnose()), "\n")
    began = time.monotonic()
    lines: list[Checked | Skipped] = []
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare_demo(data, samples=400)
        for check in CHECKS:
            try:
                lines.extend(check(data, device))
            except Exception as error:  # the other checks still tell something
                failures.append(f"{check.__name__}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    print(f"{'check':66} {'found':>10} {'allowed':>10}")
    for line in lines:
        if isinstance(line, Skipped):
            print(f"{line.what:66} not checked: {line.why}")
        else:
            print(f"{line.what:66} {line.found:10.2e} {line.allowed:10.2e}  {'ok' if line.holds else 'FAILED'}")
    checked = [line for line in lines if isinstance(line, Checked)]
    print(*failures, f"{len(checked)} checks in {time.monotonic() - began:.0f} s", sep="\n")
    sys.exit(int(bool(failures) or not all(line.holds for line in checked)))


if __name__ == "__main__":
    main()
