"""Time that the host takes for a layer of each kind, forward and backward, beside what the planner counts for it.

    python benchmarks/layer_host_times.py [--rounds 40]

No GPU is needed: small models of each family run on the CPU with Transformer Engine's own Python code, and the time inside its kernels is
subtracted. What remains is Python, autograd and torch's small operations. It lacks the launches themselves (some 5 to 15 microseconds per
kernel) and calls of compiled functions (SwiGLU), so compare the ratios of layers, not the times. The baseline is a plain decoder layer, for
which the planner's times of the host were chosen. Each time is the shortest of all rounds, in a process of its own per family.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

KINDS = {
    "mm1": {"decoder.layers": "layer", "vision.transformer.layers": "tower layer"},
    "infimm": {"decoder.layers": "gated block", "vision.layers": "tower layer"},
    "mono_internvl": {"decoder.layers": "layer"},
}
"""Family -> list of layers of a model, of which the last is timed -> the planner's block of that layer."""
SIZES = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16}


def measure(family: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return seconds per layer, {block: {"forward", "backward", and as planned, "planned forward", "planned backward"}}."""
    from support import te

    te.install()
    import torch
    from support.small import random_batch, small_experiment
    from support.small_infimm import infimm_batch, small_infimm
    from support.small_mono import mono_batch, small_mono
    from support.te.extension import recorded

    from megatron_mm.models.context import Kernels
    from megatron_mm.parallel import topology as topologies
    from megatron_mm.platform import multi_tensor
    from megatron_mm.training import build
    from megatron_mm.training.optimizer import build_optimizer
    from megatron_mm.training.step import TrainingStep

    torch.set_num_threads(1)
    inside = 0.0

    def timed(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            began, before = time.perf_counter(), inside
            try:
                return kernel(*args, **kwargs)
            finally:
                inside = before + time.perf_counter() - began

        return call

    names = set(recorded(str(te.python_of_transformer_engine()))["functions"])
    for module in [module for name, module in sys.modules.items() if name.startswith("transformer_engine")]:
        for name in names & vars(module).keys():
            if callable(getattr(module, name)):
                setattr(module, name, timed(getattr(module, name)))
    build.choose_backend = lambda experiment, *, on_gpu: "te"  # type: ignore[assignment]
    build.choose_kernels = lambda experiment, *, backend: Kernels(weight_gradients=True)
    multi_tensor.install()
    make, batch_of = {
        "mm1": (small_experiment, random_batch),
        "infimm": (small_infimm, infimm_batch),
        "mono_internvl": (small_mono, mono_batch),
    }[family]
    experiment = make(decoder=SIZES, **({"policy": "s1_1"} if family == "mono_internvl" else {}))  # type: ignore[operator]
    experiment = replace(experiment, train=replace(experiment.train, precision="bf16", micro_batch_size=1, global_batch_size=2))
    topology = topologies.initialize(experiment.parallel, seed=1)
    chunks = build.build_model(experiment, topology)
    step = TrainingStep(experiment, topology, chunks, build_optimizer(experiment, chunks), num_sources=2)
    layers = {kind: _last(chunks[0], ending) for ending, kind in KINDS[family].items()}
    given: dict[str, Any] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, kind=kind: given.update({kind: (args, kwargs)}), with_kwargs=True)
        for kind, layer in layers.items()
    ]
    step.run([batch_of(experiment, topology, number=number) for number in (1, 2)], step=1)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    found = {}
    for kind, layer in layers.items():
        args, kwargs = (_detached(value) for value in given[kind])
        spent: dict[str, list[float]] = {"forward": [], "backward": []}
        for _ in range(rounds):
            for leaf in (*args, *kwargs.values()):
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                    leaf.requires_grad_()
            inside, began = 0.0, time.perf_counter()
            out = layer(*args, **kwargs)
            spent["forward"].append(time.perf_counter() - began - inside)
            out = out[0] if isinstance(out, tuple) else out
            gradient = torch.ones_like(out)
            inside, began = 0.0, time.perf_counter()
            out.backward(gradient)
            spent["backward"].append(time.perf_counter() - began - inside)
        found[kind] = {name: min(values) for name, values in spent.items()} | _planned(experiment, kind)
    topologies.shutdown()
    return found


def _last(model: Any, ending: str) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(ending))[-1]


def _detached(value: Any) -> Any:
    """The same arguments without a graph, inside dataclasses and tuples as well."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {name: _detached(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_detached(one) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _detached(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init})
    return value


def _planned(experiment: Any, kind: str) -> dict[str, float]:
    from megatron_mm.planning.hardware import GPUS
    from megatron_mm.planning.recipe_job import plan_recipe
    from megatron_mm.planning.step import StepModel

    model = StepModel(plan_recipe(experiment, GPUS["h200"], 1).job)
    blocks = [block for block in model.job.kinds[0][0] if block.name == kind or (kind == "gated block" and block.name == "layer")]
    own = [blocks[-1]] if kind != "gated block" else blocks[-2:]  # the block and the layer that follows it are one module
    return {
        f"planned {name}": sum(model.seconds(block, backward=name == "backward").launch for block in own)
        for name in ("forward", "backward")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="of which the shortest counts (default: %(default)s)")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.rounds)))
        return
    base: dict[str, float] = {}
    print("| family | layer | forward, us | of a plain layer's | as planned | backward, us | of a plain layer's | as planned |")
    print("|---|---|---|---|---|---|---|---|")
    for family in KINDS:
        command = [sys.executable, "-W", "ignore", __file__, "--one", family, "--rounds", str(given.rounds)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        for kind, row in json.loads(lines[-1]).items():
            base = base or row
            cells = [family, "gated block and its layer" if kind == "gated block" else kind]
            for name in ("forward", "backward"):
                cells.append(f"{1e6 * row[name]:.0f}")
                cells += [f"{row[key] / base[key]:.2f}" if row[key] else "frozen" for key in (name, f"planned {name}")]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
