"""`make gpu-check`: does this GPU compute what the tests verify on a CPU?

    python tools/gpu_check.py [--device cpu]

Compares Transformer Engine's layers with plain PyTorch's in bf16 and FP8 for every family, DALI's GPU decoder with the CPU's, and the
fused optimizer that megatron-core finds with torch's AdamW. Each check is a process of its own; on a GPU they run at the same time. Each
line of the table is printed as soon as its result is known. The exit code is 1 if a check fails and 2 if there is no GPU. `--device cpu`
runs the checks that need no GPU, which tests this program itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # for benchmarks.parts, from wherever this is started

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from benchmarks.parts import Part, Row, emit, run_parts, wait_for_turn
from megatron_mm.config import Experiment, ModelConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.load.decode import has_dali, make_decoder
from megatron_mm.data.prepare.demo import prepare_demo
from megatron_mm.data.sources.index import open_split
from megatron_mm.data.sources.shards import read_range
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import STATE_METADATA
from megatron_mm.platform import adam, cuda_graph
from megatron_mm.platform.device import be_deterministic
from megatron_mm.run.data import TrainingData, open_tokenizer
from megatron_mm.run.doctor import diagnose, report
from megatron_mm.run.start import check_shapes
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import Checkpointer, TrainState
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep
from megatron_mm.training.tower_graph import Capture, allowed_difference, graph_tower, graphed_tower, replay_difference

megatron_optimizer: Any = importlib.import_module("megatron.core.optimizer")
distributed_optimizer: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")

STEPS = 5
RECIPES = ("debug_mm1", "debug_mm1_moe", "debug_infimm", "debug_mono_internvl")
"""One recipe of every family, and one with experts."""
GRAPH_IMAGES = 8
"""Images per replay of a tower's graph."""
GATE = 0.7
"""Value that gates are set to: a closed gate hides every error behind it."""


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
    """A check that cannot run here, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Seen:
    """Results of a few training steps."""

    images: list[int]
    """Images in each micro-batch of the first step."""
    logits: dict[str, torch.Tensor]
    """Logits of these micro-batches, on the CPU in fp32, by the micro-batch's number."""
    layers: dict[str, torch.Tensor]
    """Output of every layer for these micro-batches, on the CPU in fp32, by "<layer's name> <micro-batch's number>"."""
    losses: list[float]
    gradients: dict[str, torch.Tensor]
    """Gradients of the first step, by the parameter's name in checkpoints."""


def experiment(data: Path, *, precision: str, layers: str, recipe: str = "debug_mm1") -> Experiment:
    """Build a debug recipe with heads of 64 and widths allowed in FP8 products; half of the sequences are text only."""
    base = get_recipe(recipe)
    return replace(
        base,
        model=_widened(base.model),
        data=replace(base.data, path=data, decoder="pillow", mixture={"pairs": 0.25, "interleaved": 0.25, "text": 0.5}),
        optimizer=replace(base.optimizer, clip_grad_norm=0.0),  # the gradients are read after the step
        train=replace(base.train, global_batch_size=4, micro_batch_size=1, precision=precision, layers=layers),  # type: ignore[arg-type]
    )


def _widened(model: ModelConfig) -> ModelConfig:
    decoder = replace(model.decoder, hidden_size=256, head_dim=64, ffn_hidden_size=512, num_query_groups=2)
    if isinstance(model, MM1Config):
        return replace(model, decoder=decoder, vision=replace(model.vision, hidden_size=256, ffn_hidden_size=512))
    if isinstance(model, InfiMMConfig):
        return replace(model, decoder=decoder, gated=replace(model.gated, head_dim=64))
    return replace(model, decoder=decoder)


def hide_nothing(chunk: torch.nn.Module) -> None:
    """Open the gates, and make the visual experts, which begin as copies, differ from the text experts."""
    for name, parameter in chunk.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(GATE)
        if ".mlp.visual." in name:
            parameter.data.neg_()


def train(settings: Experiment) -> Seen:
    """Train a few steps on demo data. Initial weights and data depend only on names and seeds, so all settings start alike."""
    check_shapes(settings, 1)
    topology = topologies.initialize(settings.parallel, seed=settings.train.seed)
    try:
        model = build_model(settings, topology)
        chunk = model[0].module
        hide_nothing(chunk)
        graph_tower(settings, model)  # only if the settings ask for it
        step = TrainingStep(settings, topology, model, build_optimizer(settings, model), num_sources=len(settings.data.sources))
        data = TrainingData(_padded_alike(settings), topology, open_tokenizer(settings))
        batches = next(data).micro_batches
        logits = _logits(chunk, [batch.to(topology.device) for batch in batches])
        layers: dict[str, torch.Tensor] = {}
        hooks = [module.register_forward_hook(_keep(layers, name)) for name, module in _layers(chunk)]
        losses = [step.run(batches, step=1).losses.mean]
        gradients = _gradients(chunk)
        for hook in hooks:
            hook.remove()
        losses += [step.run(next(data).micro_batches, step=number).losses.mean for number in range(2, STEPS + 1)]
        data.close()
        return Seen([batch.num_images for batch in batches], logits, layers, losses, gradients)
    finally:
        topologies.shutdown()


def _padded_alike(settings: Experiment) -> Experiment:
    """Pad micro-batches as FP8 requires in every precision, so that all have the same number of tokens."""
    return replace(settings, train=replace(settings.train, precision="fp8"))


@torch.no_grad()
def _logits(chunk: torch.nn.Module, batches: list[PackedBatch]) -> dict[str, torch.Tensor]:
    return {str(number): chunk(batch, with_loss=False).float().cpu() for number, batch in enumerate(batches)}


def _layers(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((name, module) for name, module in chunk.named_modules() if isinstance(module, TransformerLayer))


def _keep(into: dict[str, torch.Tensor], name: str) -> Callable[..., Any]:
    numbers = itertools.count()

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        into[f"{name} {next(numbers)}"] = output[0].detach().float().cpu()

    return hook


def _gradients(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Read the gradients after the step: the optimizer neither clips nor changes the buffers that hold them."""
    state = chunk.sharded_state_dict(metadata=dict(STATE_METADATA))  # type: ignore[operator]
    found: dict[str, torch.Tensor] = {}
    for entry in state.values():
        if hasattr(entry.data, "main_grad"):
            number = sum(name.startswith(f"{entry.key} ") for name in found)  # experts share a name
            found[f"{entry.key} {number}"] = entry.data.main_grad.detach().float().cpu()
    return found


def distance(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def farthest(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Return the largest |one - other| / |other| (norms) of any tensor; infinity if one is NaN."""
    assert ones.keys() == others.keys() and ones, "not the same names"
    found = torch.stack([(one - others[name]).norm() / others[name].norm().clamp(min=1e-12) for name, one in ones.items()])
    return float("inf") if found.isnan().any() else float(found.max())


def together(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Return |ones - others| / |others| with all tensors as one long vector."""
    return farthest(*({"all": torch.cat([each[name].flatten() for name in others])} for each in (ones, others)))


def check_layers(data: Path, device: torch.device, *, recipe: str) -> Iterator[Checked | Skipped]:
    """Compare a family in bf16 and FP8 with its fp32 PyTorch layers; for the first recipe, also compare these with a repeat."""
    exact = train(experiment(data, precision="fp32", layers="torch", recipe=recipe))
    assert 0 in exact.images and max(exact.images) > 0, f"micro-batches with {exact.images} images: some must have none, some any"
    if recipe == RECIPES[0]:
        again = train(experiment(data, precision="fp32", layers="torch", recipe=recipe))
        yield from against(exact, again, what=f"{recipe} torch fp32 again", limits=Limits(1e-5, 1e-5, 1e-4, 1e-5))
    yield from check_precisions(data, device, recipe=recipe, exact=exact)


@dataclass(frozen=True)
class Limits:
    """Allowed relative differences."""

    logits: float
    layer: float
    gradients: float
    loss: float


def against(exact: Seen, seen: Seen, *, what: str, limits: Limits) -> Iterator[Checked]:
    yield Checked(f"{what}: logits", together(seen.logits, exact.logits), limits.logits)
    yield Checked(f"{what}: worst layer's output", farthest(seen.layers, exact.layers), limits.layer)
    yield Checked(f"{what}: gradient", together(seen.gradients, exact.gradients), limits.gradients)
    yield Checked(f"{what}: loss of {STEPS} steps", distance(seen.losses, exact.losses), limits.loss)


def check_precisions(data: Path, device: torch.device, *, recipe: str, exact: Seen) -> Iterator[Checked | Skipped]:
    """Compare bf16 and FP8 layers with fp32 PyTorch layers of the same weights on the same batches: only rounding may differ.

    In bf16, three times the error of PyTorch's own bf16 layers is allowed. FP8 has 3 bits of mantissa (rounding to 2^-4 of a value) and
    2 bits in gradients (rounding to 2^-3); its errors partly average out in sums of hundreds of terms.
    """
    plain = train(experiment(data, precision="bf16", layers="torch", recipe=recipe))
    yield from against(exact, plain, what=f"{recipe} torch bf16", limits=Limits(5e-2, 5e-2, 1e-1, 2e-2))
    if device.type != "cuda" or importlib.util.find_spec("transformer_engine") is None:
        why = "needs a GPU" if device.type != "cuda" else "Transformer Engine is not installed"
        yield Skipped(f"{recipe} te bf16 and fp8", why)
        return
    limits = Limits(
        logits=max(3 * together(plain.logits, exact.logits), 1e-2),
        layer=max(3 * farthest(plain.layers, exact.layers), 1e-2),
        gradients=max(3 * together(plain.gradients, exact.gradients), 2e-2),
        loss=max(3 * distance(plain.losses, exact.losses), 5e-3),
    )
    te = train(experiment(data, precision="bf16", layers="te", recipe=recipe))
    yield from against(exact, te, what=f"{recipe} te bf16", limits=limits)
    fp8 = train(experiment(data, precision="fp8", layers="te", recipe=recipe))
    yield from against(exact, fp8, what=f"{recipe} te fp8", limits=Limits(2e-1, 2e-1, 4e-1, 5e-2))


def check_decoders(data: Path, device: torch.device) -> Iterator[Checked | Skipped]:
    """Compare DALI's decoder with Pillow, and on a GPU also with its own CPU backend.

    Differences are in levels (0 to 255): their mean and their 99.9th percentile.
    """
    if not has_dali():
        yield Skipped("DALI", "is not installed")
        return
    (index,) = open_split(data, "heldout", sources=["pairs"])
    rows = index.item_rows[index.item_rows["is_image"] == 1][:64]
    blobs = [read_range(index.shard_of(0), int(row["offset"]), int(row["size"])) for row in rows]

    def decode(backend: Literal["dali", "pillow"], place: torch.device) -> torch.Tensor:
        decoder = make_decoder(backend, ImageTransform(64, fill=(0, 0, 0)), threads=2, device=place)
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
    """Compare the Adam that megatron-core uses here with torch's AdamW and ours: weights and moments after 5 steps on equal gradients."""
    adam.install()

    def steps(kind: Callable[..., Any]) -> dict[str, torch.Tensor]:
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


def check_fp8_weights(data: Path, device: torch.device) -> Iterator[Checked | Skipped]:
    """Compare weights stored in FP8 with bf16 weights that are cast to the same FP8 values: losses, with and without a restart."""
    if device.type != "cuda" or importlib.util.find_spec("transformer_engine") is None:
        yield Skipped("FP8 weights", "needs a GPU with Transformer Engine")
        return
    bf16 = experiment(data, precision="fp8", layers="te", recipe="debug_mm1_moe")
    own = replace(bf16, precision=replace(bf16.precision, fp8_weights=True))
    yield Checked(f"FP8 weights against bf16 ones: loss of {STEPS} steps", distance(train(own).losses, train(bf16).losses), 1e-4)
    adam.install()
    here = megatron_optimizer.Adam
    once, stopped = (run_on(data, [here] * parts, settings=own, steps=6 // parts) for parts in (1, 2))
    yield Checked("FP8 weights, through a checkpoint: loss", distance(stopped, once), 1e-5)


def check_tower_graph(data: Path, device: torch.device) -> Iterator[Checked | Skipped]:
    """Compare replays of towers as CUDA graphs with the towers; for InfiMM, also losses with and without a graph."""
    if device.type != "cuda":
        yield Skipped("tower graph", "needs a GPU")
        return
    kinds = [("torch", "fp32"), ("torch", "bf16")]
    if importlib.util.find_spec("transformer_engine") is not None:
        kinds.append(("te", "bf16"))
    for layers, precision in kinds:
        for recipe in ("debug_infimm", "debug_mm1"):
            yield from compare_replays(experiment(data, precision=precision, layers=layers, recipe=recipe))
        plain = experiment(data, precision=precision, layers=layers, recipe="debug_infimm")
        graphed = replace(plain, kernels=replace(plain.kernels, tower_graph=GRAPH_IMAGES))
        found = distance(train(graphed).losses, train(plain).losses)
        yield Checked(
            f"tower graph, debug_infimm {layers} {precision}: loss of {STEPS} steps", found, 1e-5 if precision == "fp32" else 1e-2
        )


def check_repeats(data: Path, device: torch.device, *, recipe: str) -> Iterator[Checked | Skipped]:
    """Compare losses of a deterministic run with those of a second one, and of one that is resumed after half of the steps: bit by bit."""
    be_deterministic()
    adam.install()
    here = megatron_optimizer.Adam
    kinds = [("torch", "fp32")]
    if device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        kinds = [("te", "bf16"), ("te", "fp8"), ("torch", "bf16")]
    for layers, precision in kinds:
        settings = experiment(data, precision=precision, layers=layers, recipe=recipe)
        settings = replace(settings, train=replace(settings.train, deterministic=True))
        once, again, stopped = (run_on(data, [here] * parts, settings=settings, steps=6 // parts) for parts in (1, 1, 2))
        what = f"{recipe} {layers} {precision}, deterministic"
        yield Checked(f"{what}: losses again", distance(again, once), 0.0)
        yield Checked(f"{what}: losses after a resume", distance(stopped, once), 0.0)


def compare_replays(settings: Experiment, *, capture: Capture = cuda_graph.capture) -> Iterator[Checked]:
    """Compare replays of a tower's graph with the tower, for several numbers of images, before and after its weights change in place."""
    # A tower frozen after it was wrapped must not be one whose weights are gathered while it runs.
    parallel = replace(settings.parallel, overlap_param_gather=False)
    settings = replace(settings, parallel=parallel, kernels=replace(settings.kernels, tower_graph=GRAPH_IMAGES))
    topology = topologies.initialize(settings.parallel, seed=settings.train.seed)
    try:
        model = build_model(settings, topology)
        tower = model[0].module.encoder.parts["vision"].requires_grad_(False)
        graph_tower(settings, model, capture=capture)
        graphed = graphed_tower(model)
        assert graphed is not None
        eager = partial(type(tower).forward, tower)
        what = f"tower graph, {settings.model.family} {settings.train.layers} {settings.train.precision}"
        for when in ("", " with new weights"):
            numbers = [GRAPH_IMAGES, 2 * GRAPH_IMAGES, GRAPH_IMAGES + 3, 1]
            found = replay_difference(graphed, eager, numbers=numbers)
            yield Checked(f"{what}: replays{when}", found, allowed_difference(graphed, eager))
            yield Checked(f"{what}: features of no images{when}", len(graphed(graphed.pixels[:0])), 0)
            for parameter in tower.parameters():
                parameter.data.mul_(0.9)  # as a checkpoint is loaded: in place
    finally:
        topologies.shutdown()


def run_on(data: Path, kinds: list[type], *, settings: Experiment | None = None, steps: int = 3) -> list[float]:
    """Return the losses of a run in parts of `steps` steps, each with its own kind of Adam, resumed from the previous part's checkpoint."""
    settings = settings or experiment(data, precision="fp32", layers="torch")
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
                for number in range(1, steps * (part + 1) + 1):
                    micro_batches = next(batches).micro_batches
                    if number > steps * part:
                        losses.append(step.run(micro_batches, step=number).losses.mean)
                batches.close()
                checkpointer.save(TrainState(step=steps * (part + 1)))
                checkpointer.finish()
            finally:
                topologies.shutdown()
    return losses


@contextlib.contextmanager
def using(kind: type) -> Iterator[None]:
    """Make megatron-core build this kind of Adam inside the context."""
    before = megatron_optimizer.Adam
    megatron_optimizer.Adam = distributed_optimizer.Adam = kind
    try:
        yield
    finally:
        megatron_optimizer.Adam = distributed_optimizer.Adam = before


CHECKS: dict[str, Callable[[Path, torch.device], Iterator[Checked | Skipped]]] = {
    **{f"layers of {recipe}": partial(check_layers, recipe=recipe) for recipe in RECIPES},
    "decoders": check_decoders,
    "optimizer": check_optimizer,
    "FP8 weights": check_fp8_weights,
    "tower graph": check_tower_graph,
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
