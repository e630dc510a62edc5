"""Step time, memory and layout stated in recipes, against the planner.

`python tests/families/test_predictions.py` prints the sentences that their docstrings should have.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm.families.recipes import RECIPES, get_recipe
from megatron_mm.planning.hardware import GPUS
from megatron_mm.planning.memory import USABLE_BY_RECIPES, fits
from megatron_mm.planning.recipe_job import plan_recipe
from megatron_mm.planning.report import ERROR_BAND, mfu
from megatron_mm.planning.search import search
from megatron_mm.planning.step import Prediction, StepModel

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = [name for name in RECIPES if not name.startswith(("debug", "mm1_ablation"))]
SENTENCE = re.compile(
    r"Predicted on (\d+) H100: ([\d.]+) s a step \(to (\d+)%\), ([\d.]+)% of the bf16 peak, ([\d.]+) GB(; as many A100-80GB: ([\d.]+) s)?\."
)


def _gpus(name: str) -> int:
    """Return the number of GPUs stated in the recipe's docstring, else a default by family."""
    found = SENTENCE.search(" ".join((RECIPES[name].__doc__ or "").split()))
    return int(found.group(1)) if found else {"mono": 256, "infi": 32}.get(name[:4], 64)


def _predict(name: str, gpu: str) -> tuple[Prediction, float]:
    planned = plan_recipe(get_recipe(name), GPUS[gpu], _gpus(name))
    prediction = StepModel(planned.job).predict()
    return prediction, mfu(planned, prediction)


def sentence(name: str) -> str:
    h100, used = _predict(name, "h100-sxm")
    a100, _ = _predict(name, "a100-80g")
    band = ERROR_BAND["moe" if get_recipe(name).model.decoder.moe else "dense"]
    text = f"Predicted on {_gpus(name)} H100: {h100.seconds:.2f} s a step (to {100 * band:.0f}%), {100 * used:.0f}% of the bf16 peak, "
    text += f"{h100.peak_bytes / 1e9:.0f} GB"
    return text + (f"; as many A100-80GB: {a100.seconds:.2f} s." if fits(a100.peak_bytes, GPUS["a100-80g"]) else ".")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_is_predicted(name: str) -> None:
    document = " ".join((RECIPES[name].__doc__ or "").split())
    assert sentence(name) in document, f"the docstring of {name} should say: {sentence(name)}"
    prediction, _ = _predict(name, "h100-sxm")
    assert fits(prediction.peak_bytes, GPUS["h100-sxm"], usable=USABLE_BY_RECIPES)


@pytest.mark.parametrize(
    "script", sorted(path.name for path in EXAMPLES.glob("m*.slurm")) + sorted(p.name for p in EXAMPLES.glob("infimm*"))
)
def test_a_script_asks_for_the_gpus_and_names_the_layout(script: str) -> None:
    text = (EXAMPLES / script).read_text()
    nodes = re.search(r"--nodes=(\d+)", text)
    name = next(name for name in NAMES if name == script.removesuffix(".slurm") or name.startswith(script.removesuffix(".slurm") + "_"))
    assert nodes is not None and 8 * int(nodes.group(1)) == _gpus(name)
    parallel = get_recipe(name).parallel
    wanted = [f"tensor {parallel.tensor}"] * (parallel.tensor > 1) + [f"pipeline {parallel.pipeline}"] * (parallel.pipeline > 1)
    wanted += [f"data {parallel.data_parallel_size(_gpus(name))}"] * bool(wanted) or ["data"]
    head = " ".join(text.splitlines()[:6])
    assert all(word in head for word in wanted), f"{script} should name {wanted}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_sft") and "moe" not in name])
def test_a_recipe_takes_the_layout_that_the_search_finds(name: str) -> None:
    """Within 3%, among layouts that leave a tenth of the memory free and encode on the first stage."""
    best = search(get_recipe(name), GPUS["h100-sxm"], _gpus(name), keep=1, usable=USABLE_BY_RECIPES, spread=False).best[0]
    assert _predict(name, "h100-sxm")[0].seconds <= 1.03 * best.seconds


def test_other_layouts_are_options() -> None:
    """A recipe's layout is a default: any degree may be given."""
    experiment = get_recipe("mm1_30b")
    other = replace(experiment.parallel, tensor=4, pipeline=4, virtual=2, stage_layers=None)
    assert other.data_parallel_size(512) == 32


if __name__ == "__main__":
    for each in NAMES:
        print(f"{each}: {sentence(each)}")
