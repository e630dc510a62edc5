"""MM1's fine-tuning on true high-resolution pictures against the same pictures at low resolution.

    .venv/bin/python benchmarks/high_resolution.py --out build/high_resolution

Drawn scenes of 48 x 48 px with one small digit, 8 x 12 px, in a quadrant on a noisy ground; conversations ask what is there, as in
"top left red 7". `debug_mm1_sft` with smaller images, an overview of 24 px and four crops of 24 px, and half its decoder is trained twice,
on the same scenes in the same order, with the same tokens and FLOPs. Once the pictures are as drawn; once they were reduced to so many
pixels a side (`--reduced`) first, so that the crops are as large but show no more. Both are exported, and transformers answers the question
about scenes that neither has seen. Chance is 10% for the digit; low resolution shows row, column (50% each) and colour (25%) as well.

350 steps are too few: training losses were alike by then.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from megatron_mm.conversion.to_hf import convert_to_hf
from megatron_mm.data.prepare.index import prepare_index, prepare_tokenizer
from megatron_mm.data.sources.shards import TarWriter

SIDE = 48
QUESTION = "what is there?"
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
COLOURS = {"red": (200, 20, 20), "green": (20, 130, 40), "blue": (30, 40, 210), "black": (20, 20, 20)}
SEGMENTS = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")
"""Seven-segment digits: top, upper left, upper right, middle, lower left, lower right, bottom."""
KINDS = ("true", "reduced")


def draw(rng: random.Random) -> tuple[Image.Image, tuple[str, ...]]:
    """A scene and the words that say what is there, the digit last."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(200, 250) for _ in range(3)))
    pen, digit, (w, h) = ImageDraw.Draw(image), rng.randint(0, 9), (6, 10)
    column, row, colour = rng.randint(0, 1), rng.randint(0, 1), rng.choice(list(COLOURS))
    x, y = (SIDE // 2 * place + middle + rng.randint(-2, 2) for place, middle in ((column, 8), (row, 6)))
    lines = (
        (x, y, x + w, y),
        (x, y, x, y + h // 2),
        (x + w, y, x + w, y + h // 2),
        (x, y + h // 2, x + w, y + h // 2),
        (x, y + h // 2, x, y + h),
        (x + w, y + h // 2, x + w, y + h),
        (x, y + h, x + w, y + h),
    )
    for line, on in zip(lines, SEGMENTS[digit], strict=True):
        if on == "1":
            pen.rectangle((line[0], line[1], line[2] + 1, line[3] + 1), fill=COLOURS[colour])
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 5, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)), (ROWS[row], COLUMNS[column], colour, str(digit))


def write(data: Path, *, side: int, scenes: int, seed: int) -> None:
    """The scenes as conversations, indexed."""
    folder = data / "train" / "conversations"
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    tar = TarWriter(folder / "00000.tar")
    for number in range(scenes):
        image, answer = draw(rng)
        turns = [{"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": " ".join(answer)}]
        tar.add(f"{number:06d}.0.png", encoded(image, side=side))
        tar.add(f"{number:06d}.json", json.dumps({"image": "0.png", "messages": turns}).encode())
    tar.close()


def encoded(image: Image.Image, *, side: int) -> bytes:
    """A scene reduced to so many pixels, or as it is."""
    buffer = io.BytesIO()
    (image if side == SIDE else image.resize((side, side), Image.Resampling.BICUBIC)).save(buffer, "PNG")
    return buffer.getvalue()


def prepare(out: Path, *, sides: dict[str, int], scenes: int) -> None:
    """Both data sets, with one tokenizer."""
    words = out / "words" / "train" / "text"
    words.mkdir(parents=True)
    answers = itertools.product(ROWS, COLUMNS, COLOURS, map(str, range(10)))
    lines = [f"{QUESTION} {' '.join(answer)}" for answer in answers] * 4
    (words / "0.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepare_tokenizer(out / "words", out=out / "tokenizer.model", vocab_size=310)
    for kind, side in sides.items():
        write(out / kind, side=side, scenes=scenes, seed=1)
        shutil.copyfile(out / "tokenizer.model", out / kind / "tokenizer.model")
        prepare_index(out / kind)


def train(out: Path, kind: str, *, steps: int) -> subprocess.Popen[bytes]:
    options = {
        "--run-dir": out / f"run_{kind}",
        "--data.path": out / kind,
        "--train.steps": steps,
        "--train.schedule-steps": steps,
        "--train.global-batch-size": 16,
        "--model.vision.image-size": 24,
        "--model.connector.num-tokens": 9,
        "--model.decoder.num-layers": 2,
        "--optimizer.peak-lr": 2e-3,
        "--eval.interval": 0,
        "--checkpoint.interval": 100_000,
        "--monitor.wandb": "disabled",
        "--monitor.console-interval": 20,
    }
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_mm", "train", "debug_mm1_sft", *words]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


@torch.no_grad()
def share_right(out: Path, kind: str, *, side: int, scenes: int) -> list[float]:
    """Of row, column, colour and digit in the exported model's answers about unseen scenes."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    export = out / f"export_{kind}"
    convert_to_hf(out / f"run_{kind}", export)
    processor: Any = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True).eval()
    rng, right = random.Random(2), np.zeros(4)
    for _ in range(scenes):
        image, answer = draw(rng)
        shown = Image.open(io.BytesIO(encoded(image, side=side)))
        inputs = processor(images=shown, text=f"<image>\n{QUESTION}\n", return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said = processor.decode(new, skip_special_tokens=True).split()
        right += [said[place : place + 1] == [word] for place, word in enumerate(answer)]
    return (right / scenes).tolist()


def final_loss(run_dir: Path) -> float:
    """Mean of the last 20 steps."""
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").open()]
    last = losses[-20:]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/high_resolution"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--scenes", type=int, default=12_000, help="of training")
    parser.add_argument("--asked", type=int, default=300, help="scenes that the exported models are asked about")
    parser.add_argument("--reduced", type=int, default=6, help="side of a reduced picture, pixels")
    given = parser.parse_args()
    sides = dict(zip(KINDS, (SIDE, given.reduced), strict=True))
    shutil.rmtree(given.out, ignore_errors=True)
    prepare(given.out, sides=sides, scenes=given.scenes)
    runs = [train(given.out, kind, steps=given.steps) for kind in KINDS]
    assert [run.wait() for run in runs] == [0, 0], "a run failed"
    found = {kind: share_right(given.out, kind, side=side, scenes=given.asked) for kind, side in sides.items()}
    print("answers right                           row  column  colour   digit     loss")
    for kind, side in sides.items():
        shares = "".join(f"{100 * share:7.1f}%" for share in found[kind])
        print(f"{f'pictures of {side} px':35} {shares}  {final_loss(given.out / f'run_{kind}'):7.3f}")
    print(f"ratio of right digits, true to reduced: {found['true'][-1] / max(found['reduced'][-1], 1e-9):.2f}")


if __name__ == "__main__":
    main()
