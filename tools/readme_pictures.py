"""Draw README.md's pictures from the output of `make demo`: `python tools/readme_pictures.py demo_output docs/images`."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

SIZE = {"figsize": (6.4, 3.2), "dpi": 110}


def loss_curve(run_dir: Path, out: Path) -> None:
    """Plot the training loss over steps, each source's as a thin line, and mark the step of the stop and restart."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    figure, axes = plt.subplots(**SIZE)
    for source in sorted({source for line in lines for source in line["losses"]}):
        known = [(line["step"], line["losses"][source]) for line in lines if line["losses"].get(source) is not None]
        axes.plot(*zip(*known, strict=True), linewidth=0.7, alpha=0.6, label=source)
    axes.plot(steps, [line["loss"] for line in lines], color="black", linewidth=1.2, label="all")
    axes.axvline(steps[-1] / 2, color="grey", linestyle=":", linewidth=1)
    axes.text(steps[-1] / 2, axes.get_ylim()[1], " stopped and resumed", va="top", fontsize=8, color="grey")
    axes.set(xlabel="step", ylabel="loss, nats a token", xlim=(0, steps[-1]))
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out / "loss_curve.png", metadata={"Software": None})


def captions(table: Path, out: Path, *, count: int = 6) -> None:
    """Draw held-out images with the exported model's captions: green if exactly right, else red."""
    rows = re.findall(r"^\| !\[\]\((.+?)\) \| (.+?) \| (.*?) \|$", table.read_text(), re.MULTILINE)[:count]
    figure, cells = plt.subplots(1, len(rows), figsize=(1.6 * len(rows), 2.2), dpi=110)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.26, top=0.98, wspace=0.15)
    for cell, (name, true, generated) in zip(cells, rows, strict=True):
        with Image.open(table.parent / name) as image:
            cell.imshow(image.convert("RGB"), interpolation="nearest", aspect="equal")
        cell.set(xticks=[], yticks=[], anchor="S")
        cell.set_xlabel(textwrap.fill(generated, 20), fontsize=8, color="darkgreen" if generated == true else "darkred")
    figure.savefig(out / "captions.png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="what `make demo` wrote")
    parser.add_argument("out", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    loss_curve(arguments.demo / "run", arguments.out)
    captions(arguments.demo / "captions.md", arguments.out)


if __name__ == "__main__":
    main()
