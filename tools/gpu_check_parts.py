"""The checks of `gpu_check.py` besides layers: decoders, optimizer and checkpoints, FP8 weights, CUDA graphs, deterministic runs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_mm.config import Experiment
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.load.decode import has_dali, make_decoder
from megatron_mm.data.sources.index import open_split
from megatron_mm.data.sources.shards import read_range
from megatron_mm.models.moe import routers
from megatron_mm.models.router_graph import GraphedRouting
from megatron_mm.parallel import topology as topologies
from megatron_mm.platform import adam, cuda_graph
from megatron_mm.platform.device import be_deterministic
from megatron_mm.run.data import TrainingData, open_tokenizer
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import Checkpointer, TrainState
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.router_graph import LIMIT as ROUTER_LIMIT
from megatron_mm.training.router_graph import graph_routers
from megatron_mm.training.router_graph import replay_difference as replay_difference_of_router
from megatron_mm.training.step import TrainingStep
from megatron_mm.training.tower_graph import Capture, allowed_difference, graph_tower, graphed_tower, replay_difference
from tools.gpu_check_layers import STEPS, Checked, Skipped, distance, experiment, farthest, together, train

megatron_optimizer: Any = importlib.import_module("megatron.core.optimizer")
distributed_optimizer: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")

GRAPH_IMAGES = 8
"""Images per replay of a tower's graph."""


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
    """Compare replays of towers as CUDA graphs with the towers, and training with and without graphs."""
    if device.type != "cuda":
        yield Skipped("tower graph", "needs a GPU")
        return
    kinds = [("torch", "fp32"), ("torch", "bf16")]
    if importlib.util.find_spec("transformer_engine") is not None:
        kinds.append(("te", "bf16"))
    for layers, precision in kinds:
        for recipe in ("debug_infimm", "debug_mm1"):
            plain = experiment(data, precision=precision, layers=layers, recipe=recipe)
            yield from compare_replays(plain)
            yield from compare_training(plain, "tower graph", tower_graph=GRAPH_IMAGES)


def check_router_graph(data: Path, device: torch.device) -> Iterator[Checked | Skipped]:
    """Compare replays of routers as CUDA graphs with the routers, and training with and without graphs."""
    if device.type != "cuda":
        yield Skipped("router graph", "needs a GPU")
        return
    kinds = [("torch", "fp32"), ("torch", "bf16")]
    if importlib.util.find_spec("transformer_engine") is not None:
        kinds += [("te", "bf16"), ("te", "fp8")]
    for layers, precision in kinds:
        plain = experiment(data, precision=precision, layers=layers, recipe="debug_mm1_moe")
        yield from compare_routers(plain)
        yield from compare_training(plain, "router graph", router_graph=True)


def compare_training(plain: Experiment, name: str, **kernels: Any) -> Iterator[Checked]:
    """Compare losses and gradients with and without graphs: of routers, of InfiMM's tower, which is frozen, or of MM1's, which trains.

    Args:
        kernels: the option of `kernels` that asks for the graphs.
    """
    found, expected = train(replace(plain, kernels=replace(plain.kernels, **kernels))), train(plain)
    assert any(number <= GRAPH_IMAGES for number in expected.images), f"micro-batches of {expected.images} images: none fits into a graph"
    what, exact = f"{name}, debug_{plain.model.family} {plain.train.layers} {plain.train.precision}", plain.train.precision == "fp32"
    yield Checked(f"{what}: loss of {STEPS} steps", distance(found.losses, expected.losses), 1e-5 if exact else 1e-2)
    yield Checked(f"{what}: gradient", together(found.gradients, expected.gradients), 1e-4 if exact else 0.1)


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


def compare_routers(settings: Experiment) -> Iterator[Checked]:
    """Compare replays of each router's graphs with the router, for several numbers of tokens and with shares that change in place."""
    settings = replace(settings, kernels=replace(settings.kernels, router_graph=True))
    topology = topologies.initialize(settings.parallel, seed=settings.train.seed)
    try:
        model = build_model(settings, topology)
        graph_routers(settings, model, topology)
        found = []
        for _, router in routers(list(model)):
            assert isinstance(router.graphed, GraphedRouting)
            router.shares.copy_(torch.arange(1.0, router.shares.numel() + 1).softmax(0))
            rows, copies = router.graphed.rows, router.graphed.copies
            found += [
                replay_difference_of_router(router, router.graphed, copy, tokens=tokens)
                for copy in copies
                for tokens in (rows, 1, rows // 3)
            ]
        what = f"router graph, debug_{settings.model.family} {settings.train.layers} {settings.train.precision}"
        yield Checked(f"{what}: replays of {len(found) // 3} copies", max(found), ROUTER_LIMIT)
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
