"""Reports what this machine has, whether it works, and what is used in place of missing parts.

Each check imports or runs the thing that it reports on, because an installed package may still fail to load. Nothing here is an error: a
machine without a GPU, Transformer Engine, apex or DALI can still train, more slowly, and the last column says what is used instead.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import resource
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import megatron_mm
from megatron_mm.platform import engines

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["ok", "missing", "warning"]

MIN_FREE_DISK = 50 * 2**30
"""Free disk space wanted, bytes. A checkpoint of MM1 30B with optimizer state is about 430 GB over all nodes; the demo's is a few MB."""
MIN_SHARED_MEMORY = 2**30
"""Free space wanted in /dev/shm, bytes. NCCL and the checkpoint writers pass buffers through it."""
MIN_OPEN_FILES = 4096
"""Limit on open files wanted: a process keeps shards, sockets to its peers and checkpoint files open."""
FP8_CAPABILITY = (8, 9)
"""CUDA compute capability of the first GPUs with FP8 matrix products (Ada); Hopper has 9.0, an A100 8.0."""
FP8_TE_VERSION = (2, 2)
"""First version of Transformer Engine that computes FP8 scales from the current tensor."""
OWN_LINES = ("torch", "megatron-core", "wandb")
"""Required packages that have a check of their own."""
MODULES = {"pillow": "PIL"}
"""Modules of packages whose names differ."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    detail: str
    """Version or size, or why it is missing."""
    falls_back_to: str = ""
    """What is used instead; empty if nothing is missing."""


def diagnose(path: Path = Path(".")) -> list[Finding]:
    """Check everything that a run uses. `path` is where runs will be written. A check of a package that raises becomes a warning."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings.extend(check())
        except Exception as error:  # a broken package may raise anything when it is imported
            findings.append(Finding(check.__name__.removeprefix("_check_"), "warning", f"the check failed: {_short(error)}"))
    return [*findings, *_check_limits(path)]


def report(findings: list[Finding] | None = None) -> str:
    """The findings as a table for the terminal."""
    rows = [("", "what", "found", "used instead")]
    rows += [(_MARKS[f.state], f.name, f.detail, f.falls_back_to) for f in (diagnose() if findings is None else findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in [rows[0], ("-" * widths[0], "-" * widths[1], "-" * widths[2], "-" * len(rows[0][3])), *rows[1:]]
    )


_MARKS: dict[State, str] = {"ok": "ok", "missing": "no", "warning": "!!"}


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


def _version(package: str) -> str:
    return engines.installed(package) or "unknown version"


def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    """Spec of a module, found without importing more than its parent packages; None if it or a parent is missing."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def _check_python() -> Iterator[Finding]:
    yield Finding("Python", "ok" if sys.version_info >= (3, 11) else "warning", f"{platform.python_version()} on {platform.platform()}")


def _check_torch() -> Iterator[Finding]:
    yield from (_package(requirement) for requirement in _requirements() if requirement.name == "torch")


def _check_gpu() -> Iterator[Finding]:
    if _find("torch") is None:
        yield Finding("GPU", "missing", "needs torch", "nothing: no model can be built")
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("GPU", "ok", f"{count} x {', '.join(names)}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    else:
        why = "torch is a CPU build" if torch.version.cuda is None else f"torch's CUDA {torch.version.cuda} finds no GPU"
        yield Finding("GPU", "missing", why, "CPU, fp32 or bf16")
    if dist.is_nccl_available() and torch.cuda.is_available():
        yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("NCCL", "missing", "needs a GPU and torch's CUDA build", "gloo" if dist.is_gloo_available() else "nothing: no gloo")


def _check_engine() -> Iterator[Finding]:
    version, name = _version("megatron-core"), "megatron-core"
    if engines.installed() is None:
        yield Finding(name, "missing", f"not installed: pip install '{engines.WANTED}'", "nothing: no model can be built")
        return
    importlib.import_module("megatron.core.pipeline_parallel")
    remark = engines.remark(version)
    if remark:
        try:
            engines.check(version)
            engines.check_parts(version)
        except ValueError as why:
            remark = str(why)
    yield Finding(name, "warning" if remark else "ok", remark or version)


def _check_transformer_engine() -> Iterator[Finding]:
    name, instead = "Transformer Engine", "torch layers (--train.layers torch); no FP8"
    if _find("transformer_engine") is None:
        yield Finding(name, "missing", "package transformer-engine is not installed", instead)
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a build for another torch or CUDA fails in its own ways
        yield Finding(name, "warning", f"installed but does not load ({_short(error)}); reinstall it, or uninstall it", instead)
        return
    version, core = _version("transformer-engine"), _version("megatron-core")
    if mismatch := engines.mismatch(core, version):
        yield Finding(name, "warning", mismatch, engines.range_of(core))
    else:
        yield Finding(name, "ok", version)
    yield _packed_attention()
    yield _fp8(version)


def _packed_attention() -> Finding:
    """Whether Transformer Engine's attention over packed documents works on the first GPU."""
    import torch

    from megatron_mm.platform.device import packed_attention_missing

    name, instead = "packed attention", "torch layers (--train.layers torch); no FP8"
    if not torch.cuda.is_available():
        return Finding(name, "missing", "needs a GPU", instead)
    missing = packed_attention_missing()
    return Finding(name, "missing", missing, instead) if missing else Finding(name, "ok", "by Transformer Engine")


def _fp8(version: str) -> Finding:
    """Whether FP8 products work with this version of Transformer Engine on the first GPU."""
    import torch

    instead = "bf16 (--train.precision bf16)"
    if not torch.cuda.is_available():
        return Finding("FP8", "missing", "needs a GPU", instead)
    capability = torch.cuda.get_device_capability(0)
    if capability < FP8_CAPABILITY:
        needed, here = (".".join(map(str, numbers)) for numbers in (FP8_CAPABILITY, capability))
        return Finding("FP8", "missing", f"the GPU has compute capability {here}, and FP8 products need {needed}", instead)
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < FP8_TE_VERSION:
        needed = ".".join(map(str, FP8_TE_VERSION))
        return Finding("FP8", "missing", f"Transformer Engine {version} is too old: install {needed} or later", instead)
    return Finding("FP8", "ok", "for sizes that are multiples of 16, which a run checks before it starts")


def _check_apex() -> Iterator[Finding]:
    """Beside Transformer Engine, whose fused Adam megatron-core prefers, apex adds only the fusion of the output layer's weight gradient,
    which is not used (`training.kernels.fuse_weight_gradients`)."""
    spec, beside_te = _find("apex"), _find("transformer_engine") is not None
    adds = "beside Transformer Engine it only fuses the output layer's weight gradient, which is not used here"
    instead = f"nothing is lost: {adds}" if beside_te else "torch's fused AdamW"
    if spec is None:
        yield Finding("apex (NVIDIA)", "missing", "not installed", instead)
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        detail = "an unrelated package of the same name is installed: pip uninstall apex; NVIDIA's must be built from source"
        yield Finding("apex (NVIDIA)", "warning", detail, instead)
        return
    built = _find("amp_C") is not None
    detail = "with fused kernels" if built else "built without fused kernels"
    if built and beside_te:
        detail += f"; {adds}"
    yield Finding("apex (NVIDIA)", "ok" if built else "warning", detail, "" if built else instead)


def _check_dali() -> Iterator[Finding]:
    instead = "Pillow"
    if _find("nvidia.dali") is None:
        yield Finding("DALI", "missing", "package nvidia-dali-cuda130 (or -cuda120) is not installed", instead)
        return
    from PIL import Image
    from torch import device

    from megatron_mm.data.image_transform import ImageTransform
    from megatron_mm.data.load.decode import DaliDecoder

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "JPEG")
    decoder = DaliDecoder(ImageTransform(8, fill=(0, 0, 0)), threads=1, device=device("cpu"))
    try:
        pixels = decoder._with_dali([buffer.getvalue()])
    finally:
        decoder.close()
    detail = f"{importlib.import_module('nvidia.dali').__version__}, CPU backend"
    if pixels is None or pixels[0, 0].float().mean() < 200:
        yield Finding("DALI", "warning", f"{detail} does not decode a red JPEG here", instead)
    else:
        yield Finding("DALI", "ok", f"{detail} decodes; images in tiles use Pillow")


def _check_packages() -> Iterator[Finding]:
    if _find("packaging") is None:
        yield Finding("packaging", "missing", "not installed: pip install packaging", "nothing: other required packages are not checked")
        return
    for requirement in _requirements():
        if requirement.name not in OWN_LINES:
            yield _package(requirement)


def _requirements() -> list[Requirement]:
    """Return what this package requires on this machine, without extras: from pyproject.toml beside it, or as pip has installed it."""
    from packaging.requirements import Requirement

    project = Path(megatron_mm.__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires("megatron-mm") or []
    wanted = map(Requirement, lines)
    return [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]


def _package(requirement: Requirement) -> Finding:
    """Import a required package and compare its version with the one wanted."""
    name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
    module = MODULES.get(name, name.replace("-", "_"))
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return Finding(name, "missing", f"not installed: pip install '{wanted}'", "nothing: it is required")
        return Finding(name, "warning", f"installed but does not load ({_short(error)}); reinstall it: pip install '{wanted}'")
    version = _version(name)
    if engines.installed(name) is not None and not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, "warning", f"{version}, but {requirement.specifier} is required: pip install '{wanted}'")
    return Finding(name, "ok", version)


def _check_wandb() -> Iterator[Finding]:
    if _find("wandb") is None:
        yield Finding("wandb", "missing", "not installed: pip install wandb", "metrics.jsonl and the console (--monitor.wandb disabled)")
        return
    import wandb

    mode = os.environ.get("WANDB_MODE")
    logged_in = bool(os.environ.get("WANDB_API_KEY")) or _in_netrc("api.wandb.ai")
    detail = f"{wandb.__version__}, {'with' if logged_in else 'without'} an API key{f', WANDB_MODE={mode}' if mode else ''}"
    yield Finding("wandb", "ok", detail, "" if logged_in else "offline runs (the default); `wandb sync` uploads them")


def _in_netrc(host: str) -> bool:
    import netrc

    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _check_limits(path: Path) -> Iterator[Finding]:
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    yield _size(
        "disk space", there, MIN_FREE_DISK, "a run with large checkpoints may fill it, so give `train` a --run-dir on a larger disk"
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield _size("/dev/shm", shared, MIN_SHARED_MEMORY, "in a container, use --ipc=host or --shm-size")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    detail = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    yield Finding("open files", "ok" if enough else "warning", detail if enough else f"{detail}: raise it with ulimit -n {MIN_OPEN_FILES}")
    yield Finding("CPU cores", "ok", f"{_usable_cores()} usable of {os.cpu_count()}")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(name: str, path: Path, wanted: int, advice: str) -> Finding:
    free = shutil.disk_usage(path).free
    detail = f"{free / 2**30:.1f} GiB free in {path}"
    return Finding(name, "ok", detail) if free >= wanted else Finding(name, "warning", f"{detail}, which is little: {advice}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _check_python,
    _check_torch,
    _check_gpu,
    _check_engine,
    _check_transformer_engine,
    _check_apex,
    _check_dali,
    _check_packages,
    _check_wandb,
)
"""Checks, in the order of the report."""
