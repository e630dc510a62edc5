"""`make demo`: from drawn pictures to a Hugging Face model that captions them, through every stage of a large run."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

CAPTION_PROGRAM = Path(__file__).with_name("caption_with_transformers.py")
PICTURE_PROGRAM = Path(__file__).with_name("readme_pictures.py")


def run(title: str, *command: str | Path) -> None:
    """Run a command with its output on the terminal; end the demo if it fails."""
    print(f"\n== {title}\n   {' '.join(str(word) for word in command)}", flush=True)
    began = time.monotonic()
    code = subprocess.run([str(word) for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    if code:
        sys.exit(f"the demo failed: {title} (exit code {code})")
    print(f"   done in {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="directory to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--samples",
        type=int,
        default=2000,
        help="pairs, interleaved documents and texts to draw, and half as many conversations and tasks (default: %(default)s)",
    )
    arguments = parser.parse_args()
    out, began = arguments.out, time.monotonic()
    data, run_dir, model = out / "data", out / "run", out / "model"
    if out.exists():
        sys.exit(
            f"{out} exists already: remove it (rm -r {out}), or write elsewhere with `make demo DEMO_OUT=DIR` or "
            f"`{Path(sys.executable).name} tools/demo.py --out DIR`"
        )
    program = (sys.executable, "-m", "megatron_mm")
    run("Draw a data set, train its tokenizer, index it", *program, "prepare", "demo", "--out", data, "--samples", str(arguments.samples))
    train = (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
        *("-m", "megatron_mm", "train", "debug_mm1", "--run-dir", run_dir, "--data.path", data),
        *("--parallel.tensor", "2", "--parallel.pipeline", "2", "--train.schedule-steps", str(arguments.steps)),
        *("--train.global-batch-size", "8"),
        *("--eval.interval", str(arguments.steps), "--checkpoint.interval", str(arguments.steps)),
    )
    half = arguments.steps // 2
    run("Train on 4 processes (tensor 2 x pipeline 2), and stop half way", *train, "--train.steps", str(half))
    run("Resume to the end", *train, "--train.steps", str(arguments.steps))
    checkpoint = run_dir / "checkpoints" / f"step_{arguments.steps:08d}"
    run("What it has learned from looking", *program, "eval", checkpoint, "--eval.samples", "0")
    run(
        "Ask it questions, with demonstrations and without",
        *(*program, "evaluate", checkpoint, "--tasks", "drawn", "--shots", "0", "4", "8", "--limit", "60", "--monitor.wandb", "disabled"),
    )
    run("Export to Hugging Face format", *program, "convert", "to-hf", checkpoint, model, "--dtype", "float32")
    captions = out / "captions.md"
    run("Caption held-out images with transformers alone", sys.executable, CAPTION_PROGRAM, model, data / "heldout" / "pairs", captions)
    pictures = out / "pictures"
    run("Draw its losses and captions, as README.md shows them", sys.executable, PICTURE_PROGRAM, out, pictures)
    print(f"\nAll of it took {time.monotonic() - began:.0f} s.")
    for name, path in (
        ("run directory", run_dir),
        ("W&B offline run", run_dir / "wandb"),
        ("benchmarks", run_dir / "evaluation"),
        ("exported model", model),
        ("captions", captions),
        ("pictures", pictures),
    ):
        print(f"  {name:16} {path}")


if __name__ == "__main__":
    main()
