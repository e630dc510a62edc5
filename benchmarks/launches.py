"""Count the kernels launched in a training step, by part of the model: launches limit a small model on a fast GPU.

    .venv/bin/python benchmarks/launches.py [--recipe mm1_1b] [--lines 20]

No GPU is needed: a step of the recipe's model, with as many layers but tiny widths, runs on the CPU with a counter below autograd. Each
operation that computes something counts as one launch. Transformer Engine's own Python code runs on the tests' kernels, and each call of
its compiled extension counts as one. Functions that megatron-core compiles or fuses on a GPU (activations, the norm of gradients) count as
one per call, and operations that stay on the processor (integers of the plan) are not counted. A profiler sees more launches, because
attention, norms and some products are several kernels; compare only the differences between two implementations. The baseline of the same
run is megatron-core's own: sums of gradients and copies of weights parameter by parameter (`platform/multi_tensor.py`), towers that add
biases in separate kernels, and attention that sets generator states.

Models with experts run on one process, with the permutation of tokens in PyTorch's operations, because the fused one is written in Triton.
For them, a third column counts launches with `--kernels.router-graph True`; a replay is one launch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

MICRO_BATCHES = 2
PARTS = (
    "decoder layers",
    "tower layers",
    "connector",
    "embedding, output, loss",
    "sums of gradients",
    "norm of gradients",
    "update",
    "rest",
)
NAMES = {"before": "before", "after": "now", "graphs": "with graphs"}
"""What is counted, and its name in the table."""
COMPILED = {"quick_gelu": {"sigmoid", "sigmoid_backward"}, "swiglu": {"silu"}, "swiglu_back": {"cat"}}
"""Functions that are one kernel on a GPU, and the operations that represent that kernel in the count."""
NO_KERNELS = ("empty", "_local_scalar", "_unsafe_view", "_record_function")


def count(recipe: str, backend: str, *, which: str) -> dict[str, Any]:
    """Count the launches of the second step by part and by place in the code; `which` is one of `NAMES`."""
    if backend != "torch":
        from support import te

        te.install()
    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer.enums import AttnMaskType
    from support.recorded_graph import RecordedGraph, recorded_graphs
    from support.small import IMAGE_TOKENS, random_batch
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_mm.families.mm1 import model as mm1
    from megatron_mm.families.recipes import get_recipe
    from megatron_mm.models import layers
    from megatron_mm.models.context import Kernels
    from megatron_mm.parallel import topology as topologies
    from megatron_mm.platform import multi_tensor
    from megatron_mm.training import build
    from megatron_mm.training.optimizer import build_optimizer
    from megatron_mm.training.router_graph import graph_routers
    from megatron_mm.training.step import TrainingStep

    torch.set_num_threads(1)

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.by_part: Counter[str] = Counter()
            self.by_place: Counter[str] = Counter()
            self.state = 0
            """Changes of the generators' states."""
            self.inside = 1
            """Depth of nested calls that count as one launch; 0 while operations are counted."""

        def add(self, operation: str, *, integers: bool = False) -> None:
            place = where(torch._C._current_autograd_node())
            if place.file == "random.py" and "tensor_parallel" in place.path:
                self.state += operation == "all"  # each has about ten more calls that change or copy the state
            elif not (integers and place.ours) and operation in COMPILED.get(place.function, {operation}):
                self.by_part[place.part] += 1
                self.by_place[f"{place.part}: {place.path.split('site-packages/')[-1]} {place.function}: {operation}"] += 1

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            aliases = [result.alias_info for result in func._schema.returns]
            name = func._overloadpacket.__name__
            view = any(alias is not None and not alias.is_write for alias in aliases)
            if not self.inside and not view and not any(word in name for word in NO_KERNELS):
                first = out[0] if isinstance(out, tuple | list) and out else out
                integers = isinstance(first, torch.Tensor) and not first.is_floating_point()
                self.add(name, integers=integers)
            return out

        def as_one(self, name: str, function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if not self.inside:
                    self.add(name)
                self.inside += 1
                try:
                    return function(*args, **kwargs)
                finally:
                    self.inside -= 1

            return call

    counting = Counting()
    if backend != "torch":
        from support.te.extension import recorded

        names = set(recorded(str(te.python_of_transformer_engine()))["functions"])
        for module in [m for n, m in sys.modules.items() if n.startswith("transformer_engine")]:
            for name in names & vars(module).keys():
                if callable(getattr(module, name)):
                    setattr(module, name, counting.as_one(name, getattr(module, name)))
    base = get_recipe(recipe)
    sizes = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
    model = replace(
        base.model,
        decoder=replace(base.model.decoder, **sizes, num_query_groups=4, head_dim=16, vocab_size=256),
        vision=replace(base.model.vision, **sizes, image_size=48, patch_size=8),
        connector=replace(base.model.connector, num_tokens=IMAGE_TOKENS, hidden_size=32),
    )
    experiment = replace(
        base,
        model=model,
        data=replace(base.data, sequence_length=96),
        parallel=replace(
            base.parallel, tensor=1, pipeline=1, virtual=1, expert=1, stage_layers=None, recompute="none", recompute_encoder=None
        ),
        kernels=replace(base.kernels, router_graph=which == "graphs"),
        train=replace(base.train, precision="fp8" if backend == "fp8" else "bf16", micro_batch_size=1, global_batch_size=MICRO_BATCHES),
    )
    build.choose_backend = lambda experiment, *, on_gpu: "torch" if backend == "torch" else "te"  # type: ignore[assignment, return-value]
    build.choose_kernels = lambda experiment, *, backend: Kernels(
        weight_gradients=backend == "te", router=backend == "te" and base.model.decoder.moe is not None
    )
    multi_tensor.install()
    vision_layers: Any = mm1.vision_layer_spec
    copies: Any = DistributedOptimizer._copy_main_params_to_model_params
    if which == "before":
        build.DataParallel = DistributedDataParallel  # type: ignore[misc, assignment]
        build.engine.leave_generators_alone = lambda modules: None
        copies = copies.one_by_one
        vision_layers = lambda backend: layers._LAYER_SPECS[backend](AttnMaskType.no_mask)  # noqa: E731
    mm1.vision_layer_spec = vision_layers
    multi_tensor.install = lambda: None
    replay: Any = counting.as_one("replay", RecordedGraph.replay)
    with (
        patch.object(DistributedOptimizer, "_copy_main_params_to_model_params", copies),
        patch.object(RecordedGraph, "replay", replay),
        recorded_graphs(),
    ):
        topology = topologies.initialize(experiment.parallel, seed=1)
        clip_grads.l2_norm_impl = counting.as_one("l2_norm", clip_grads.l2_norm_impl)  # type: ignore[attr-defined]
        chunks = build.build_model(experiment, topology)
        graph_routers(experiment, chunks, topology)
        step = TrainingStep(experiment, topology, chunks, build_optimizer(experiment, chunks), num_sources=2)
        batches = [random_batch(experiment, topology, number=number) for number in (2, 8)]  # four images each
        step.run(batches, step=1)
        with counting, torch.autograd.set_detect_anomaly(True, check_nan=False):  # records where operations were called
            counting.inside = 0
            step.run(batches, step=2)
            counting.inside = 1
    topologies.shutdown()
    return {"parts": counting.by_part, "places": counting.by_place, "state": counting.state}


class Place:
    """Place in the code that calls an operation."""

    def __init__(self, path: str, function: str, part: str) -> None:
        self.path, self.function, self.part = path, function, part
        self.file = path.rsplit("/", 1)[-1]
        self.ours = "/megatron_mm/" in path


def where(node: Any) -> Place:
    """Return the place that this process is at; in a backward pass, the forward pass's place when `node` was recorded."""
    frame, stack = sys._getframe(2), []
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    recorded = []
    for line in reversed(node.metadata.get("traceback_", [])) if node is not None else []:
        quoted, rest = line.split("\n")[0].strip().removeprefix('File "').split('"', 1)
        recorded.append((quoted, rest.rsplit("in ", 1)[-1]))
    part = part_of(recorded or stack, backward=node is not None, node="" if node is None else node.name(), stack=stack)
    known = [place for place in [*stack, *recorded] if _is_known(place[0])]
    return Place(*(known[0] if known else ("", "")), part)


_AROUND = ("platform/cpu.py", "schedules.py", "training/step.py")
"""Files that call a whole forward or backward pass."""


def _is_known(path: str) -> bool:
    return any(name in path for name in ("/megatron", "transformer_engine")) and not path.endswith(_AROUND)


def part_of(frames: list[tuple[str, str]], *, backward: bool, node: str, stack: list[tuple[str, str]]) -> str:
    """Return the part of `PARTS` that a stack of frames belongs to."""
    files, functions = " ".join(path for path, _ in frames), {name for _, name in stack}
    if "AccumulateGrad" in node or "_add_waiting" in functions:
        return "sums of gradients"
    for function, part in (("squared_grad_norm", "norm of gradients"), ("update", "update")):
        if function in functions:
            return part
    for file, part in (("models/vision.py", "tower layers"), ("connectors/", "connector"), ("transformer_layer.py", "decoder layers")):
        if file in files:
            return part
    return "embedding, output, loss" if backward or "forward_step" in functions else "rest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mm1_1b", help="of the MM1 family (default: %(default)s)")
    parser.add_argument("--backends", nargs="+", default=["te", "fp8", "torch"], choices=["te", "fp8", "torch"])
    parser.add_argument("--lines", type=int, default=0, help="also print so many places in the code, those with the most launches")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(count(arguments.recipe, arguments.backends[0], which=arguments.one)))
        return
    columns = [which for which in NAMES if which != "graphs" or "moe" in arguments.recipe]
    for backend in arguments.backends:
        found = []
        for which in columns:
            command = [sys.executable, "-W", "ignore", __file__, "--recipe", arguments.recipe, "--backends", backend, "--one", which]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        totals = [sum(of["parts"].values()) for of in found]
        print(f"{arguments.recipe}, {backend}: launches of a step of {MICRO_BATCHES} micro-batches")
        print(f"  {'':26}", *(f"{NAMES[which]:>12}" for which in columns))
        for part in PARTS:
            print(f"  {part:26}", *(f"{of['parts'].get(part, 0):12}" for of in found))
        print(f"  {'all':26}", *(f"{total:12}" for total in totals))
        print(f"  {'all, relative':26}", *(f"{total / totals[0]:12.2f}" for total in totals))
        print(f"  {'generator states changed':26}", *(f"{of['state']:12}" for of in found))
        for place, number in Counter(found[-1]["places"]).most_common(arguments.lines):
            print(f"  {number:6} {place}")


if __name__ == "__main__":
    main()
