"""Peak memory of exporting a sparse model, beside its size and the largest file that is written.

    .venv/bin/python benchmarks/export_memory.py [--layers 2] [--shard-size 1GB]

Makes a checkpoint of MM1 3B-MoE with fewer layers (random weights, written by the trainer's own code), exports it in a fresh process, and
measures that process's own memory while it does. Needs twice the checkpoint's size on disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from megatron_mm.config import CheckpointConfig, Experiment, MM1Config, ParallelConfig
from megatron_mm.conversion.to_hf import convert_to_hf
from megatron_mm.data.tokenizer import train_tokenizer
from megatron_mm.recipes import get_recipe

GIB = 2**30


def experiment(layers: int, tokenizer: Path) -> Experiment:
    """MM1 3B-MoE with few layers and a small image tower, in bf16 on one process."""
    base = get_recipe("mm1_3b_moe")
    assert isinstance(base.model, MM1Config)
    model = replace(base.model, decoder=replace(base.model.decoder, num_layers=layers), vision=replace(base.model.vision, num_layers=1))
    return replace(
        base,
        model=model,
        parallel=ParallelConfig(),
        data=replace(base.data, tokenizer=tokenizer),
        checkpoint=CheckpointConfig(asynchronous=False),
    )


def write_checkpoint(folder: Path, *, layers: int) -> Path:
    """A checkpoint of random weights without an optimizer; returns its directory."""
    from megatron.core import dist_checkpointing

    from megatron_mm.config import save_experiment
    from megatron_mm.parallel import topology as topologies
    from megatron_mm.parallel.build import build_chunks
    from megatron_mm.parallel.initial_weights import STATE_METADATA
    from megatron_mm.training.checkpoint import TENSORS

    tokenizer = folder / "tokenizer.model"
    train_tokenizer([f"word {n}" for n in range(60)], tokenizer, vocab_size=300)
    settings = experiment(layers, tokenizer)
    topology = topologies.initialize(settings.parallel, seed=1)
    (chunk,) = build_chunks(settings, topology)
    for parameter in chunk.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    (folder / TENSORS).mkdir()
    dist_checkpointing.save({"model0": chunk.sharded_state_dict(metadata=dict(STATE_METADATA))}, str(folder / TENSORS))
    save_experiment(settings, folder / "experiment.json")
    files = {path.name: [path.stat().st_size, 0] for path in (folder / TENSORS).iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    topologies.shutdown()
    return folder


def own_memory() -> int:
    """Bytes of this process that are no file's: what an export must find room for."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def export(checkpoint: Path, out: Path, shard_size: str) -> dict[str, float]:
    """Export, and the highest memory that was seen, above what the program takes without it."""
    before, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    found = convert_to_hf(checkpoint, out, shard_size=shard_size, verify=False)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    largest = max(path.stat().st_size for path in out.glob("*.safetensors"))
    return {"peak": peak - before, "bytes": found.num_bytes, "largest": largest, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers, every second one sparse (default: %(default)s)")
    parser.add_argument("--shard-size", default="1GB", help="(default: %(default)s)")
    parser.add_argument("--step", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        what, folder = arguments.step[0], Path(arguments.step[1])
        if what == "write":
            write_checkpoint(folder, layers=arguments.layers)
        else:
            print(json.dumps(export(folder, folder / "out", arguments.shard_size)))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--layers", str(arguments.layers), "--shard-size", arguments.shard_size]
        subprocess.run([sys.executable, "-W", "ignore", __file__, *options, "--step", "write", folder], check=True)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, *options, "--step", "export", folder], check=True, capture_output=True, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
    limit = found["largest"] + 2 * GIB
    print(
        f"exported        {found['bytes'] / GIB:6.2f} GiB in {found['seconds']:.0f} s, {found['bytes'] / 1e9 / found['seconds']:.2f} GB/s"
    )
    print(f"largest file    {found['largest'] / GIB:6.2f} GiB")
    print(f"peak memory     {found['peak'] / GIB:6.2f} GiB; aim: under the largest file + 2 GiB = {limit / GIB:.2f} GiB")
    print(f"ratio           {found['peak'] / limit:6.2f} (peak memory / aim)")


if __name__ == "__main__":
    main()
