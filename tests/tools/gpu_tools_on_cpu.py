"""Runs the GPU tools with Transformer Engine on kernels written in PyTorch; used by `test_gpu_tools.py`.

    python gpu_tools_on_cpu.py gpu_check|routed_experts

It is a separate program because megatron-core looks for Transformer Engine when it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from support import te

te.install()

import torch  # noqa: E402

from megatron_mm.data.prepare.demo import prepare_demo  # noqa: E402
from megatron_mm.models.context import Kernels  # noqa: E402
from megatron_mm.training import build  # noqa: E402

REPOSITORY = Path(__file__).parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def check_layers() -> None:
    """Print a line for each check: its name, the value found, the value allowed."""
    tool = load("tools/gpu_check.py")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare_demo(data, samples=400)
        for recipe in ("debug_mm1", "debug_mm1_moe", "debug_infimm", "debug_mono_internvl"):
            for line in tool.check_layers(data, torch.device("cuda", 0), recipe=recipe):  # only the device's type is used
                print(line.what, line.found, line.allowed, sep="; ")


def compare_routed() -> None:
    """Print the benchmark's lines for the cases of a GPU."""
    benchmark = load("benchmarks/routed_experts.py")
    options = benchmark.Options(tokens=208, hidden_size=64, ffn_hidden_size=128, shares=(0.0, 0.3, 1.0), repeats=1)
    for case in benchmark.cases_on(torch.device("cuda", 0)):
        for row in benchmark.compare(options, case):
            print(benchmark.line(row))


def main() -> None:
    torch.set_num_threads(1)
    build.choose_backend = lambda experiment, *, on_gpu: experiment.train.layers
    build.choose_kernels = lambda experiment, *, backend: Kernels(weight_gradients=backend == "te")  # the others are written in Triton
    {"gpu_check": check_layers, "routed_experts": compare_routed}[sys.argv[1]]()


if __name__ == "__main__":
    main()
