"""Whether a node is fit to join a run: `megatron-mm doctor --node`, which the Slurm scripts run on every node first.

For a few seconds, one process per GPU (two on a machine without GPUs) does what a run does: a matrix product with a known result, and an
all-reduce with a known sum. The node is unfit if a GPU gives a wrong result, is much slower than its neighbours, has its memory in use, or
cannot be reached directly by its neighbours. The other nodes are not needed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_mm.platform.device import communication_backend, local_device

FREE_GPU_MEMORY = 0.95
"""Minimum free fraction of a GPU's memory."""
FREE_HOST_MEMORY = 2 * 2**30
"""Minimum free host memory per process, bytes: index of the shards, batches read ahead, a checkpoint being written."""
FREE_SHARED_MEMORY = 64 * 2**20
"""Minimum free space in /dev/shm per process, bytes: NCCL's buffers and locks of checkpoint writers."""
SLOW = 0.8
"""A device is slow if its speed is less than this fraction of the median."""
MESSAGE_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}
"""Size of the timed all-reduce, bytes."""
PRODUCT_SIZE = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the multiplied matrices."""
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    fit: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok ' if self.fit else 'BAD'}  {self.name}: {self.detail}"


@dataclass(frozen=True)
class Measured:
    """Measurements of one process."""

    device: str
    free_memory: float
    """Free fraction of its GPU's memory; 1 on a CPU."""
    result: float
    """Sum of the product's elements, which are whole numbers."""
    tflops: float
    """Speed of the product, TFLOP/s."""
    total: float
    """First element of the all-reduced message."""
    gb_per_s: float
    """Size of the message divided by the time of an all-reduce, GB/s."""


def check_node(*, gpus: int | None = None, min_gb_per_s: float = 0.0, path: Path = Path(".")) -> list[Finding]:
    """Check this node, which takes a few seconds.

    Args:
        gpus: expected number of GPUs; None accepts any.
        min_gb_per_s: minimum speed of an all-reduce between its processes.
        path: where the run will write.
    """
    here = torch.cuda.device_count()
    findings = []
    if gpus is not None:
        findings.append(Finding("GPUs", here == gpus, f"{here}, expected {gpus}"))
    processes = here or 2
    findings += [*_host(processes, path), *_links(here)]
    try:
        measured = _measure(processes)
    except Exception as error:  # a process that dies, or does not answer in time, whatever the reason
        first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return [*findings, Finding("work", False, f"one of {processes} processes failed: {first}")]
    return [*findings, *judge(measured, min_gb_per_s=min_gb_per_s)]


def judge(measured: list[Measured], *, min_gb_per_s: float) -> Iterator[Finding]:
    """Findings from the processes' measurements, one for each kind."""
    usual = statistics.multimode([one.result for one in measured])[0]
    wrong = [one.device for one in measured if one.result != usual]
    yield Finding(
        "arithmetic", not wrong, f"different result on {', '.join(wrong)}" if wrong else f"same result on {len(measured)} devices"
    )
    speed = statistics.median([one.tflops for one in measured])
    slow = [f"{one.device} {one.tflops:.3g}" for one in measured if one.tflops < SLOW * speed]
    on_gpu = measured[0].device.startswith("cuda")
    # Processes of a CPU share its cores with everything else: their speeds do not show a defect.
    yield Finding("speed", not slow or not on_gpu, f"median {speed:.3g} TFLOP/s" + (f", slower: {', '.join(slow)}" if slow else ""))
    taken = [f"{one.device} {100 * one.free_memory:.0f}% free" for one in measured if one.free_memory < FREE_GPU_MEMORY]
    if on_gpu:
        yield Finding("GPU memory", not taken, "; ".join(taken) if taken else "free")
    expected = len(measured) * (len(measured) + 1) / 2
    summed = [one.device for one in measured if one.total != expected]
    least = min(one.gb_per_s for one in measured)
    detail = f"{least:.3g} GB/s between {len(measured)} processes" + (f"; wrong sums on {', '.join(summed)}" if summed else "")
    if least < min_gb_per_s:
        detail += f", expected {min_gb_per_s:g}"
    yield Finding("all-reduce", not summed and least >= min_gb_per_s, detail)


def _host(processes: int, path: Path) -> Iterator[Finding]:
    available = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    wanted = processes * FREE_HOST_MEMORY
    yield Finding("memory", available >= wanted, f"{available / 2**30:.1f} GiB available, {wanted / 2**30:.1f} needed")
    shared, wanted = shutil.disk_usage("/dev/shm").free, processes * FREE_SHARED_MEMORY
    yield Finding("/dev/shm", shared >= wanted, f"{shared / 2**30:.2f} GiB free, {wanted / 2**30:.2f} needed")
    try:
        with tempfile.NamedTemporaryFile(dir=path) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        yield Finding("storage", True, f"files can be written to {path.absolute()}, {shutil.disk_usage(path).free / 2**30:.0f} GiB free")
    except OSError as error:
        yield Finding("storage", False, f"files cannot be written to {path.absolute()}: {error}")


def _links(gpus: int) -> Iterator[Finding]:
    """Whether every GPU can read every other GPU's memory directly (NVLink, or PCIe where there is none)."""
    if gpus < 2:
        return
    apart = [f"{a}-{b}" for a in range(gpus) for b in range(gpus) if a < b and not torch.cuda.can_device_access_peer(a, b)]
    yield Finding("links", not apart, f"no direct access between GPUs {', '.join(apart)}" if apart else f"direct between all {gpus} GPUs")


def _measure(processes: int) -> list[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        context = multiprocessing.start_processes(_work, (processes, folder), nprocs=processes, join=False, start_method="spawn")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no result within {TIMEOUT_SECONDS} s")
        finally:
            for process in context.processes:
                process.kill()
        return [Measured(**json.loads((results / str(rank)).read_text())) for rank in range(processes)]


def _work(rank: int, processes: int, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    device = local_device()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info(device)
    else:
        torch.set_num_threads(1)
        free, total = 1, 1
    size = PRODUCT_SIZE[device.type]
    generator = torch.Generator().manual_seed(1)
    # Small whole numbers: their products and sums are exact in every order of addition.
    left, right = (
        torch.randint(-2, 3, (size, size), generator=generator).to(device, torch.bfloat16 if on_gpu else torch.float32) for _ in "ab"
    )
    seconds = min(_timed(lambda: left @ right, device) for _ in range(3))
    result = (left.float() @ right.float()).double().sum()
    store = dist.FileStore(str(Path(folder) / "store"), processes)
    dist.init_process_group(
        communication_backend(device), store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=TIMEOUT_SECONDS)
    )
    message = torch.empty(MESSAGE_BYTES[device.type] // 4, device=device)
    seconds_sent = []
    for _ in range(3):
        message.fill_(rank + 1)
        dist.barrier()
        seconds_sent.append(_timed(lambda: dist.all_reduce(message), device))
    name = f"cuda:{rank}" if on_gpu else f"process {rank}"
    measured = Measured(
        device=name,
        free_memory=free / total,
        result=float(result),
        tflops=2 * size**3 / seconds / 1e12,
        total=float(message[0]),
        gb_per_s=message.numel() * 4 / min(seconds_sent) / 1e9,
    )
    (Path(folder) / str(rank)).write_text(json.dumps(asdict(measured)))
    dist.barrier()
    dist.destroy_process_group()


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
