"""Gain from true resolution in MM1's fine-tuning: questions about small marks that low resolution does not show.

    .venv/bin/python benchmarks/high_resolution.py --out build/high_resolution

Scenes are 48 x 48 px with a small mark in one of four quarters; a conversation asks "what is it?". The mark is 8 x 8 px of one-pixel
lines: rows, columns or squares. With `--marks digits` it is a digit (0, 1, 4 or 7) of 6 x 10 px, in relief: each dot of its strokes is
two dark pixels with two light ones next to them. Reduced to 24 px, the side of the tower's square images, all kinds of lines look alike,
and each dot of a digit becomes as grey as the background.

A `debug_mm1` is trained on the demo's data at 32 px, and fine-tuned by `debug_mm1_sft` with an overview and four crops of 24 px, positions
interpolated, twice: on the scenes as drawn, and on the same scenes in the same order, reduced first, so that crops are as large but show no
more detail. Tokens and FLOPs are equal. Both models are exported, and transformers answers the question about scenes that neither has seen.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from megatron_mm.conversion.to_hf import convert_to_hf
from megatron_mm.data.prepare.demo import prepare_demo
from megatron_mm.data.prepare.index import prepare_index
from megatron_mm.data.sources.shards import TarWriter
from megatron_mm.training.checkpoint import find_checkpoint

Marks = Literal["lines", "digits"]

SIDE, LOW = 48, 24
"""Side of a scene, and side of a square image of the tower, in pixels."""
QUESTION = "what is it?"
LINES = ("rows", "columns", "squares")
_SIZE = 8
"""Side of a mark of lines, in pixels; marks are placed at multiples of a patch's 4 pixels."""
_FONT = (  # digits of 3 x 5 px, row by row
    *("111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001"),
    *("111100111001111", "111100111101111", "111001001001001", "111101111101111", "111101111001111"),
)
ANSWERS: dict[Marks, tuple[str, ...]] = {"lines": LINES, "digits": tuple("0147")}


def draw(rng: random.Random, marks: Marks) -> tuple[Image.Image, str]:
    """Draw a scene; return it and the answer."""
    light, dark, answer = rng.randint(180, 240), rng.randint(0, 90), rng.choice(ANSWERS[marks])
    pixels = np.full((SIDE, SIDE, 3), float(light) if marks == "lines" else (light + dark) / 2)
    mark = _lines(answer) if marks == "lines" else _digit(answer) / 2
    offsets = (0, 1, 2) if marks == "lines" else (1,)
    top, left = (SIDE // 2 * rng.randint(0, 1) + 4 + 4 * rng.choice(offsets) for _ in range(2))
    pixels[top : top + mark.shape[0], left : left + mark.shape[1]] += (dark - light) * mark[..., None]
    pixels += np.random.default_rng(rng.getrandbits(32)).normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), answer


def _lines(kind: str) -> np.ndarray:
    """Return [size, size] of 0 and 1."""
    y, x = np.mgrid[:_SIZE, :_SIZE]
    return ({"rows": y, "columns": x, "squares": x + y}[kind] % 2).astype(float)


def _digit(digit: str) -> np.ndarray:
    """Return [10, 6] of 1 (dark), -1 (light) and 0: each dot is two dark and two light pixels, side by side."""
    dots = np.array([float(dot) for dot in _FONT[int(digit)]]).reshape(5, 3)
    return np.kron(dots, [[1.0, -1.0], [1.0, -1.0]])


def encoded(image: Image.Image, *, side: int) -> bytes:
    """Encode a scene as PNG, reduced to `side` x `side` px by averaging (or unchanged for `SIDE`)."""
    buffer = io.BytesIO()
    (image if side == SIDE else image.resize((side, side), Image.Resampling.BOX)).save(buffer, "PNG")
    return buffer.getvalue()


def write(data: Path, *, marks: Marks, side: int, scenes: int, tokenizer: Path) -> None:
    """Write the scenes as conversations and index them."""
    folder = data / "train" / "conversations"
    folder.mkdir(parents=True)
    rng, tar = random.Random(1), TarWriter(folder / "00000.tar")
    for number in range(scenes):
        image, answer = draw(rng, marks)
        turns = [{"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": answer}]
        tar.add(f"{number:06d}.0.png", encoded(image, side=side))
        tar.add(f"{number:06d}.json", json.dumps({"image": "0.png", "messages": turns}).encode())
    tar.close()
    shutil.copyfile(tokenizer, data / "tokenizer.model")
    prepare_index(data)


def start(recipe: str, run_dir: Path, data: Path, *, steps: int, batch: int, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start a training run on one thread."""
    settings = {
        "--run-dir": run_dir,
        "--data.path": data,
        "--train.steps": steps,
        "--train.schedule-steps": steps,
        "--train.global-batch-size": batch,
        "--eval.interval": 0,
        "--checkpoint.interval": 100_000,
        "--monitor.wandb": "disabled",
        "--monitor.console-interval": 20,
        **options,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_mm", "train", recipe, *words]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(runs: Sequence[subprocess.Popen[bytes]], *, timeout: float | None) -> None:
    try:
        codes = [run.wait(timeout) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert not any(codes), f"runs ended with exit codes {codes}"


@torch.no_grad()
def share_right(export: Path, *, marks: Marks, side: int, scenes: int) -> float:
    """Return the share of an exported model's answers about unseen scenes that are right."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True).eval()
    rng, right = random.Random(2), 0
    for first in range(0, scenes, 25):
        asked = [draw(rng, marks) for _ in range(min(25, scenes - first))]
        images = [Image.open(io.BytesIO(encoded(image, side=side))) for image, _ in asked]
        inputs = processor(images=images, text=[f"<image>\n{QUESTION}\n"] * len(asked), return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said = [processor.decode(row, skip_special_tokens=True).strip() for row in new]
        right += sum(word == answer for word, (_, answer) in zip(said, asked, strict=True))
    return right / scenes


@dataclass(frozen=True)
class Found:
    """Shares of right answers."""

    true: float
    """Fine-tuned on scenes as drawn, asked about scenes as drawn."""
    true_asked_low: float
    """The same model, asked about reduced scenes."""
    low: float
    """Fine-tuned on reduced scenes, asked about reduced scenes."""


def compare(
    out: Path,
    *,
    marks: Marks = "lines",
    steps: int = 100,
    scenes: int = 4000,
    asked: int = 300,
    pretrained: Path | None = None,
    timeout: float | None = None,
) -> Found:
    """Pre-train, fine-tune twice, export, and ask.

    Args:
        pretrained: a run of debug_mm1 to begin with, instead of 100 steps here.
        timeout: time limit of each training run, in seconds.
    """
    if pretrained is None:
        prepare_demo(out / "demo", samples=1000)
        pretrained = out / "pretrained"
        finish([start("debug_mm1", pretrained, out / "demo", steps=100, batch=4, options={})], timeout=timeout)
    for name, side in (("true", SIDE), ("low", LOW)):
        write(out / name, marks=marks, side=side, scenes=scenes, tokenizer=find_checkpoint(pretrained) / "tokenizer.model")
    options = {
        "--init-from": pretrained,
        "--model.vision.image-size": LOW,
        "--optimizer.peak-lr": 2e-3,
        "--train.micro-batch-size": 8,
    }
    runs = [start("debug_mm1_sft", out / f"run_{name}", out / name, steps=steps, batch=16, options=options) for name in ("true", "low")]
    finish(runs, timeout=timeout)
    for name in ("true", "low"):
        convert_to_hf(out / f"run_{name}", out / f"export_{name}")
    pairs = (("true", SIDE), ("true", LOW), ("low", LOW))
    return Found(*(share_right(out / f"export_{name}", marks=marks, side=side, scenes=asked) for name, side in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/high_resolution"))
    parser.add_argument("--marks", choices=list(ANSWERS), default="lines")
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning")
    parser.add_argument("--scenes", type=int, default=4000, help="of training")
    parser.add_argument("--asked", type=int, default=300, help="scenes that the exported models are asked about")
    parser.add_argument("--pretrained", type=Path, metavar="RUN", help="a run of debug_mm1 to begin with (default: 100 steps of one)")
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    options = {"marks": given.marks, "steps": given.steps, "scenes": given.scenes, "asked": given.asked, "pretrained": given.pretrained}
    found = compare(given.out, **options)
    print("fine-tuned on   asked about     right")
    for trained, side, share in ((SIDE, SIDE, found.true), (SIDE, LOW, found.true_asked_low), (LOW, LOW, found.low)):
        print(f"{f'{trained} px':15} {f'{side} px':12} {100 * share:7.1f}%")
    print(f"chance                       {100 / len(ANSWERS[given.marks]):7.1f}%")
    print(f"ratio of right answers, true to low resolution: {found.true / max(found.low, 1e-9):.2f}")


if __name__ == "__main__":
    main()
