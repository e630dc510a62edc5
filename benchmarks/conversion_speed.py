"""Speed and peak memory of conversion in both directions, compared with a plain load and save of the same bytes.

    .venv/bin/python benchmarks/conversion_speed.py [--gib 8] [--shard-size 2GB] [--folder DIR]

Writes an exported MM1 3B-MoE of random bf16 values, with enough layers to reach `--gib`, converts it into a checkpoint and back, each in a
fresh process, and compares the resulting files with the original ones. The plain load and save reads every file with safetensors and writes
it again, one after another. All begin with their input out of the system's cache and end with the output on the disk; an export checks the
checkpoint's checksums first, as always. Needs three times the size on disk, and removes everything at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.conversion.files import TensorInfo, safetensors_header
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.job import cut
from megatron_mm.conversion.target import model_targets
from megatron_mm.conversion.to_hf import Written, convert_to_hf, parse_size, plan_tensors
from megatron_mm.data.text.tokenizer import train_tokenizer
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mm1.files import write_mm1_files
from megatron_mm.families.mm1.names import mm1_table
from megatron_mm.families.recipes import get_recipe
from megatron_mm.platform.files import checksum_of

GIB = 2**30


def experiment(layers: int, tokenizer: Path) -> Experiment:
    """Return MM1 3B-MoE with the given number of layers and an image tower of one layer."""
    base = get_recipe("mm1_3b_moe")
    assert isinstance(base.model, MM1Config)
    model = replace(base.model, decoder=replace(base.model.decoder, num_layers=layers), vision=replace(base.model.vision, num_layers=1))
    return replace(base, model=model, parallel=ParallelConfig(), data=replace(base.data, tokenizer=tokenizer))


def layers_for(num_bytes: int, tokenizer: Path) -> int:
    """Return the smallest even number of layers (so that the last one is sparse) for a model of at least `num_bytes` bytes."""
    layers = 2
    while sum(target.info.num_bytes for target in model_targets(experiment(layers, tokenizer)).values()) < num_bytes:
        layers += 2
    return layers


def make_up(settings: Experiment, folder: Path, *, shard_size: str) -> int:
    """Write an exported model of random values, sharded as an export is; return its size in bytes."""
    folder.mkdir()
    assert isinstance(settings.model, MM1Config)
    write_mm1_files(settings.model, folder, experiment=settings, tokenizer=settings.data.tokenizer_path, dtype="bfloat16")
    infos = {name: target.info for name, target in model_targets(settings).items()}
    shards = cut(plan_tensors(mm1_table(settings.model), infos, dtype=None), limit=parse_size(shard_size))
    values = torch.randn(GIB // 2, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16().view(torch.uint8).numpy()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, values, begin=number * 12_345_678)
        weight_map.update({tensor: name for written in shard for tensor in written.infos})
    total = sum(written.num_bytes for shard in shards for written in shard)
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n")
    return total


def _write_shard(path: Path, shard: list[Written], values: memoryview, *, begin: int) -> None:
    infos: dict[str, TensorInfo] = {name: info for written in shard for name, info in written.infos.items()}
    header, _ = safetensors_header(infos)
    left, begin = sum(info.num_bytes for info in infos.values()), begin % len(values) // 2 * 2
    with path.open("wb", buffering=0) as file:
        file.write(header)
        while left:
            left -= file.write(values[begin : begin + min(left, 1 << 26)])
            begin = (begin + (1 << 26)) % (len(values) // 2)


def plain(source: Path, out: Path) -> None:
    """Load and save every file, as a converter that changes nothing would."""
    out.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        save_file(load_file(file), out / file.name, metadata={"format": "pt"})


def forget(folder: Path) -> None:
    """Flush files to the disk and drop them from the system's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def step(what: str, folder: Path, *, layers: int, shard_size: str, threads: int) -> dict[str, float]:
    """Measure one conversion (or the plain load and save) in this process."""
    torch.set_num_threads(1)
    settings = experiment(layers, folder / "tokenizer.model")
    source, out = {
        "plain": (folder / "hf", folder / "plain"),
        "from_hf": (folder / "hf", folder / "run"),
        "to_hf": (folder / "run", folder / "again"),
    }[what]
    if what == "from_hf":
        model_targets(settings)  # imports
    forget(source)
    before, began = peak_memory(), time.perf_counter()
    if what == "plain":
        plain(source, out)
    elif what == "from_hf":
        convert_from_hf(settings, out, whole=source, threads=threads)
    else:
        convert_to_hf(source, out, shard_size=shard_size, threads=threads)
    sync(out)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": peak_memory(), "before": before}


def peak_memory() -> int:
    """Return the peak resident set of this process in bytes, including mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the model (default: %(default)s)")
    parser.add_argument("--shard-size", default="2GB", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1), help="of the conversions (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of all three, the fastest of each counts (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work; a new directory in it is made and removed (default: the system's)")
    parser.add_argument("--step", nargs=3, metavar=("WHAT", "FOLDER", "LAYERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        what, folder, layers = arguments.step
        found = step(what, Path(folder), layers=int(layers), shard_size=arguments.shard_size, threads=arguments.threads)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        report(Path(name), arguments)


def report(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the model, measure the conversions, and print the results."""
    train_tokenizer([f"word {n}" for n in range(60)], folder / "tokenizer.model", vocab_size=300)
    layers = layers_for(int(arguments.gib * GIB), folder / "tokenizer.model")
    size = make_up(experiment(layers, folder / "tokenizer.model"), folder / "hf", shard_size=arguments.shard_size)
    largest = max(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
    print(f"model           {size / GIB:6.2f} GiB, {layers} layers, largest file {largest / GIB:.2f} GiB", flush=True)
    options = ["--shard-size", arguments.shard_size, "--threads", str(arguments.threads)]
    best: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        for what, out in (("plain", "plain"), ("from_hf", "run"), ("to_hf", "again")):
            command = [sys.executable, "-W", "ignore", __file__, *options, "--step", what, str(folder), str(layers)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            best[what] = min(best.get(what, found), found, key=lambda value: value["seconds"])
            if what == "to_hf":
                _check_equal(folder)
            if what != "from_hf":
                _remove(folder / out)
        _remove(folder / "run")
    limit = largest + GIB
    for what, label in (("plain", "load and save"), ("from_hf", "from HF"), ("to_hf", "to HF")):
        seconds, peak = best[what]["seconds"], best[what]["peak"]
        ratio = best["plain"]["seconds"] / seconds
        print(
            f"{label:15} {size / 1e9 / seconds:6.2f} GB/s in {seconds:5.1f} s, peak memory {peak / GIB:5.2f} GiB "
            f"({best[what]['before'] / GIB:.2f} GiB of it before it began)"
            + (f", ratio {ratio:.2f} (speed / load and save; aim 0.8)" if what != "plain" else "")
        )
    for what, label in (("from_hf", "from HF"), ("to_hf", "to HF")):
        ratio = best[what]["peak"] / limit
        print(f"{label:15} {ratio:6.2f} (peak memory / (largest file + 1 GiB = {limit / GIB:.2f} GiB); aim: at most 1)")


def _check_equal(folder: Path) -> None:
    """Check that every file of the exported model equals the original."""
    for path in sorted((folder / "hf").glob("*.safetensors*")):
        assert checksum_of(path) == checksum_of(folder / "again" / path.name), f"{path.name} did not come back as it was"


def _remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)


if __name__ == "__main__":
    main()
