"""Program of `test_te_options.py`: trains a small sparse MM1 on Transformer Engine's own Python layers (`support.te`), option by option.

    python te_options.py

It is a separate program because megatron-core looks for Transformer Engine when it is imported. Prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import te_program  # installs Transformer Engine's Python first
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from support import distributed
from support.recorded_graph import recorded_graphs
from support.te import extension, fp8
from support.te.extension import CALLS

from megatron_mm.config import Experiment, KernelConfig, ParallelConfig, PrecisionConfig
from megatron_mm.parallel import topology as topologies
from megatron_mm.platform import adam
from megatron_mm.training import build
from megatron_mm.training.options import check_options
from megatron_mm.training.router_graph import graph_routers
from megatron_mm.training.step import StepResult
from megatron_mm.training.tower_graph import graph_tower

SUBJECT = te_program.SUBJECTS["mm1"]
FORKS = "generator states put in place"
WAITING = "weight gradients that wait"
ROUTING = "fused_topk_with_score_function_fwd"


def count(owner: type, method: str, name: str) -> None:
    """Count the calls of a method in `CALLS`, under a name."""
    original = getattr(owner, method)

    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return original(*args, **kwargs)

    setattr(owner, method, counted)


count(CudaRNGStatesTracker, "fork", FORKS)
DELAYED = {"overlap_experts": True, "delay_weight_gradients": True}
IMAGES = 4
"""Images per graph; micro-batches have none, one, and four."""
PARTS = ("core_attn", "mlp", "layernorm", "moe", "moe_act")


def sparse(*, precision: str = "bf16", parallel: dict[str, Any] | None = None, **formats: Any) -> Experiment:
    base = te_program._with_experts(SUBJECT.experiment(precision=precision))["experts"]
    return replace(base, parallel=ParallelConfig(**(parallel or {})), precision=PrecisionConfig(**formats))


def train(experiment: Experiment, folder: Path, *, first: int = 1, last: int = 3, keep: bool = False) -> dict[str, Any]:
    """Train from the checkpoint in a folder, if any; return losses, kernel calls, and formats of gradients, moments and quantizers."""
    check_options(experiment, backend="te")
    CALLS.clear()
    fp8.QUANTIZERS.clear()
    trainee = te_program.Trainee(SUBJECT, experiment, "te", folder)
    trainee.checkpointer.load_latest()
    CALLS.pop(FORKS, None)  # building a model initialises its layers under the tracker
    losses = run(trainee, first, last)
    if keep:
        trainee.save(last)
    parts = trainee.step.optimizer.chained_optimizers
    moments = {name: sorted({str(s[name].dtype) for p in parts for s in p.optimizer.state.values()}) for name in ("exp_avg", "exp_avg_sq")}
    gradients = sorted({str(p.main_grad.dtype) for p in trainee.model[0].parameters() if hasattr(p, "main_grad")})
    topologies.shutdown()
    return {"losses": losses, "gradients": gradients, **moments, "quantizers": sorted(fp8.QUANTIZERS), "calls": dict(CALLS)}


def steps(trainee: te_program.Trainee, first: int, last: int) -> list[StepResult]:
    """Train. (`Trainee.train` would evaluate each batch first, which changes delayed scales.)"""
    batches = {number: SUBJECT.batches(trainee.experiment, trainee.topology, step=number) for number in range(first, last + 1)}
    return [trainee.step.run(batches[number], step=number) for number in batches]


def run(trainee: te_program.Trainee, first: int, last: int) -> list[float]:
    """Train; return the losses."""
    return [result.losses.mean for result in steps(trainee, first, last)]


def user_buffers(precision: str) -> dict[str, Any]:
    """Return the user buffers that a tensor-parallel process allocates, and the layers that exchange through them, by name."""
    base = SUBJECT.experiment(precision=precision)
    experiment = replace(base, parallel=ParallelConfig(tensor=2, overlap_tensor=True), eval=replace(base.eval, samples=0))
    check_options(experiment, backend="te")
    te_program.use_backend("te")
    topology = topologies.initialize(experiment.parallel, seed=1)
    (model,) = build.build_model(experiment, topology)
    flags = ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop")
    layers = {name: module.ub_name for name, module in model.named_modules() if any(getattr(module, flag, False) for flag in flags)}
    made = importlib.import_module("transformer_engine.pytorch.module.base")._ub_communicators
    topologies.shutdown()
    return {"layers": layers, "buffers": {name: [list(buffer.args[0]), str(buffer.args[1])] for (name, _), buffer in made.items()}}


def send_one_by_one() -> None:
    """Send what megatron-core coalesces one by one: gloo mixes up tensors of different types when it coalesces gathers."""
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    begun: list[list[Any]] = []

    @contextlib.contextmanager
    def apart(*args: Any, **kwargs: Any) -> Iterator[SimpleNamespace]:
        works: list[Any] = []
        begun.append(works)
        yield SimpleNamespace(wait=lambda: [work.wait() for work in works])
        begun.pop()

    def noted(send: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            work = send(*args, **kwargs)
            if kwargs.get("async_op"):
                begun[-1].append(work)
            return work

        return call

    buffers._coalescing_manager = apart
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, noted(getattr(buffers, name)))


def fp8_weights(folder: Path) -> dict[str, Any]:
    """Return losses of four steps with either kind of weights, with and without a stop in the middle, where the kind may change."""
    found: dict[str, Any] = {}
    send_one_by_one()
    for recipe in ("tensorwise", "blockwise"):
        bf16, own = (sparse(precision="fp8", fp8_recipe=recipe, fp8_weights=wanted) for wanted in (False, True))
        losses = {"bf16": train(bf16, folder / f"{recipe}_bf16", last=4)["losses"]}
        losses["fp8"] = train(own, folder / f"{recipe}_fp8", last=2, keep=True)["losses"]
        losses["fp8"] += train(own, folder / f"{recipe}_fp8", first=3, last=4)["losses"]
        losses["bf16 from fp8"] = train(bf16, folder / f"{recipe}_fp8", first=3, last=4)["losses"]
        found[recipe] = losses
    return found


def fp8_weights_of_two(kept: bool, late: bool, folder: str) -> dict[str, Any]:
    """Return losses of two data-parallel processes, the last one a second time after a restart from a checkpoint, and the numbers of
    gathered weights by type.

    Args:
        late: gather weights during the next forward pass, as is the default on GPUs.
    """
    adam.install = lambda: None
    send_one_by_one()
    te_program.build.DistributedDataParallelConfig = lambda **options: DistributedDataParallelConfig(  # type: ignore[misc]
        **{**options, "overlap_param_gather": late}
    )
    experiment = sparse(precision="fp8", fp8_weights=kept)
    trainee = te_program.Trainee(SUBJECT, experiment, "te", Path(folder))
    losses = run(trainee, 1, 2)
    trainee.save(2)
    losses += run(trainee, 3, 3)
    trainee.checkpointer.load_latest()
    losses += run(trainee, 3, 3)
    buffers = trainee.model[0].buffers + trainee.model[0].expert_parallel_buffers
    gathered: dict[str, int] = {}
    for buffer in buffers:
        gathered[str(buffer.param_data.dtype)] = gathered.get(str(buffer.param_data.dtype), 0) + buffer.param_data.numel()
    topologies.shutdown()
    return {"losses": losses, "gathered": gathered}


def overlapped(options: dict[str, Any], precision: str, kernels: dict[str, Any]) -> dict[str, Any]:
    """Return losses and gradient norms of two expert-parallel processes, and how many weight gradients waited."""
    adam.install = lambda: None
    count(importlib.import_module("transformer_engine.pytorch.module._common").WeightGradStore, "put", WAITING)
    experiment = replace(sparse(precision=precision, parallel={"expert": 2, **options}), kernels=KernelConfig(**kernels))
    check_options(experiment, backend="te")
    with tempfile.TemporaryDirectory() as folder:
        trainee = te_program.Trainee(SUBJECT, experiment, "te", Path(folder))
        results = steps(trainee, 1, 3)
        topologies.shutdown()
    return {
        "losses": [result.losses.mean for result in results],
        "gradient norms": [result.update.grad_norm for result in results],
        "delayed": CALLS[WAITING],
    }


def graphs_of_the_tower(precision: str = "bf16", **kernels: bool) -> dict[str, Any]:
    """Return losses and gradient norms with and without graphs of a tower that trains, and the weights whose products add gradients.

    Args:
        kernels: of `Kernels`, to change.
    """
    found: dict[str, Any] = {}
    for name in ("plain", "graphs"):
        experiment = SUBJECT.experiment(precision=precision)
        with tempfile.TemporaryDirectory() as folder, recorded_graphs() as graphs:
            trainee = te_program.Trainee(SUBJECT, experiment, "te", Path(folder))
            (model,), chosen = trainee.model, replace(te_program.kernels_of("te"), **kernels)
            for module in model.modules():
                if hasattr(module, "fuse_wgrad_accumulation"):
                    module.fuse_wgrad_accumulation = chosen.weight_gradients
            tower = model.module.encoder.parts["vision"]
            if name == "graphs":
                graph_tower(replace(experiment, kernels=KernelConfig(tower_graph=IMAGES)), trainee.model)
            else:
                tower.forward = filled_up(tower.forward)
            results = steps(trainee, 1, 3)
            replays = [graph.replays for graph in graphs.made]
            fused = sum(getattr(module, "fuse_wgrad_accumulation", False) for module in tower.modules())
            topologies.shutdown()
        numbers = [(result.losses.mean, result.update.grad_norm) for result in results]
        found[name] = {"numbers": numbers, "replays": replays, "fused": fused}
    return found


def graphs_of_routers(precision: str) -> dict[str, Any]:
    """Return losses and gradient norms with and without graphs of the routers, and how often each graph was replayed."""
    found: dict[str, Any] = {}
    for name in ("plain", "graphs"):
        experiment = replace(sparse(precision=precision), kernels=KernelConfig(router_graph=name == "graphs"))
        with tempfile.TemporaryDirectory() as folder, recorded_graphs() as graphs:
            trainee = te_program.Trainee(SUBJECT, experiment, "te", Path(folder))
            graph_routers(experiment, trainee.model, trainee.topology)
            CALLS.clear()
            numbers = [(result.losses.mean, result.update.grad_norm) for result in steps(trainee, 1, 3)]
            found[name] = {"numbers": numbers, "replays": [graph.replays for graph in graphs.made], "kernels": CALLS[ROUTING]}
            topologies.shutdown()
    return found


def filled_up(forward: Any) -> Any:
    """Encode as many images as a graph does, so that features and gradients are the same bits."""

    def run(pixels: torch.Tensor) -> torch.Tensor:
        blank = pixels.new_zeros(IMAGES - len(pixels), *pixels.shape[1:])
        found: torch.Tensor = forward(torch.cat([pixels, blank]))[: len(pixels)]
        return found

    return run


def main() -> None:
    adam.install = lambda: None  # Transformer Engine's Adam, over a kernel that runs here
    torch.set_num_threads(1)
    assert extension.CALLS is CALLS
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["plain"] = train(sparse(), folder / "plain", last=2, keep=True)
        found["plain"]["losses"] += train(sparse(), folder / "plain", first=3, last=4)["losses"]
        for part in PARTS:
            found[part] = train(sparse(parallel={"recompute": "selective", "recompute_modules": (part,)}), folder / part)
        found["fp8"] = train(sparse(precision="fp8"), folder / "fp8")
        for part in ("layernorm", "moe_act"):
            parallel = {"recompute": "selective", "recompute_modules": (part,)}
            found[f"fp8 {part}"] = train(sparse(precision="fp8", parallel=parallel), folder / f"fp8_{part}")
        for recipe in ("delayed", "blockwise"):
            found[recipe] = train(sparse(precision="fp8", fp8_recipe=recipe), folder / recipe)
        found["fp8 weights"] = fp8_weights(folder)
        found["bf16 gradients"] = train(sparse(gradients="bf16"), folder / "gradients")
        small = {"exp_avg": "bf16", "exp_avg_sq": "bf16"}
        found["bf16 moments"] = train(sparse(**small), folder / "moments", last=2, keep=True)
        found["bf16 moments"]["losses"] += train(sparse(**small), folder / "moments", first=3, last=4)["losses"]
        found["bf16 moments, at once"] = train(sparse(**small), folder / "once", last=4)
        found["bf16 moments from fp32"] = train(sparse(**small), folder / "plain", first=3, last=4)
        found["fp32 moments from bf16"] = train(sparse(), folder / "moments", first=3, last=4)
    found["graphs of routers"] = {precision: graphs_of_routers(precision) for precision in ("bf16", "fp8")}
    found["graphs"] = {
        f"{precision} {name}": graphs_of_the_tower(precision, weight_gradients=name == "fused")
        for precision in ("bf16", "fp8")
        for name in ("fused", "not fused")
    }
    distributed._PRELOADED.clear()  # processes begin with this file, and so with Transformer Engine
    found["user buffers"] = {precision: distributed.run_processes(user_buffers, 2, precision)[0] for precision in ("bf16", "fp8")}
    with tempfile.TemporaryDirectory() as name:
        found["fp8 weights of two"] = {
            f"{kept} {late}": distributed.run_processes(fp8_weights_of_two, 2, kept, late, f"{name}/{kept}_{late}")[0]
            for kept in (False, True)
            for late in (False, True)
        }
    found["overlap"] = {
        f"{name} {precision}": distributed.run_processes(overlapped, 2, options, precision, kernels)[0]
        for precision in ("bf16", "fp8")
        for name, options, kernels in (
            ("plain", {}, {}),
            ("overlapped", {"overlap_experts": True}, {}),
            ("delayed", DELAYED, {}),
            ("delayed, not fused,", DELAYED, {"weight_gradients": False}),
        )
    }
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
