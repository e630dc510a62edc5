"""The debug recipes train as before: checkpoints have the same tensors and losses are the same, whatever is refactored.

`python tests/test_golden_runs.py` writes the golden files anew; `--compare-exactly` instead requires bit-identical results, which hold
on the machine that wrote them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_mm.cli.main import main
from megatron_mm.data.prepare.demo import prepare_demo

GOLDEN = Path(__file__).parent / "golden_runs"
RECIPES = ("debug_mm1", "debug_mm1_moe", "debug_infimm", "debug_mono_internvl")
STEPS = 4
TOLERANCE = 1e-5
"""Relative tolerance in fp32 between processors, whose kernels add in different orders."""


def run(recipe: str, *, data: Path, out: Path) -> dict[str, Any]:
    """Train on one process; return losses and gradient norms, and the shape of every tensor in the checkpoint by name."""
    quick = ["--train.steps", str(STEPS), "--eval.interval", "0", "--monitor.wandb", "disabled", "--data.decoder", "pillow"]
    main(["train", recipe, "--run-dir", str(out), "--data.path", str(data), *quick])
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (checkpoint,) = (out / "checkpoints").iterdir()
    saved = dcp.FileSystemReader(_folder_of_tensors(checkpoint)).read_metadata().state_dict_metadata
    return {
        "losses": [line["loss"] for line in metrics],
        "grad_norms": [line["grad_norm"] for line in metrics],
        "tensors": {name: "x".join(map(str, entry.size)) for name, entry in sorted(saved.items()) if hasattr(entry, "size")},
    }


def _folder_of_tensors(checkpoint: Path) -> Path:
    return next(checkpoint.rglob(".metadata")).parent


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_debug_recipe_trains_as_before(recipe: str, demo_data: Path, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{recipe}.json").read_text())
    found = run(recipe, data=demo_data, out=tmp_path / "run")
    assert found["tensors"] == golden["tensors"]
    assert found["losses"] == pytest.approx(golden["losses"], rel=TOLERANCE)
    assert found["grad_norms"] == pytest.approx(golden["grad_norms"], rel=1e-4)


def _write_or_compare(*, exactly: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)  # the number of threads changes the order of sums
        data = Path(folder) / "data"
        prepare_demo(data, samples=240)
        for recipe in RECIPES:
            found, path = run(recipe, data=data, out=Path(folder) / recipe), GOLDEN / f"{recipe}.json"
            if exactly:
                assert found == json.loads(path.read_text()), f"{recipe} differs"
                print(f"{recipe}: {len(found['tensors'])} tensors and {STEPS} losses, bit-identical")
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    _write_or_compare(exactly="--compare-exactly" in sys.argv)
