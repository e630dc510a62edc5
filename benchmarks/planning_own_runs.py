"""Compare the planner with this project's own steps on a GPU: predicted / measured time and memory of every case in `gpu_bench.py`.

    python benchmarks/planning_own_runs.py [--results benchmarks/results/h200_20261126/*.jsonl]

The baseline of each row is the recorded step; nothing is run here. The steps ran on one process, without messages or pipeline, so this
tests the predictions of products, attention, kernels, host and memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the other files of benchmarks, from wherever this is started

from benchmarks.gpu_cases import MODELS, Case
from benchmarks.gpu_memory import planned_step
from benchmarks.gpu_steps import MICRO_BATCHES, full_batch, on_one_process
from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.registry import family_of
from megatron_mm.flops import StepWork
from megatron_mm.planning.hardware import GPUS, OURS, with_host
from megatron_mm.planning.recipe_job import plan_recipe
from megatron_mm.planning.step import Prediction, StepModel
from megatron_mm.planning.workload import MicroBatch, Workload

FOLDER = Path(__file__).parent / "results"
RESULTS = sorted((FOLDER / "h200_20261126").glob("gpu_bench_[st]*.jsonl"))
"""The first file is left out: its peaks add up over the cases."""
GIB = 2**30
HOST = 1.6
"""Host time of that virtual machine relative to the planner's reference host, fitted to the first table's plain bf16 rows."""


def predict(model: str, case: Case) -> Prediction:
    """Predict a step of the benchmark on one H200."""
    settings = on_one_process(MODELS[model].experiment(), case)
    return planned_step(settings, full_batch(settings), micro_batches=MICRO_BATCHES, software=with_host(OURS, HOST)).predict()


@dataclass(frozen=True)
class TrainingRun:
    """Steps of `megatron-mm train` on one H200. Their mean numbers of tokens and images, and the mean of their FLOPs, are predicted."""

    results: str
    """File of metrics below `benchmarks/results`, without its ending."""
    recipe: str
    batch: int
    micro_batch: int
    steps: Sequence[int]
    """Steps without new shapes, a save, a profile or sampled stacks that slowed them; the median of their times counts."""
    precision: str = "bf16"
    decoder: str = "pillow"
    kernels: float = 0.0
    """Seconds that kernels ran in a profiled step of this recipe on that day (`_kernels.txt` beside the metrics)."""

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        lines = (FOLDER / f"{self.results}.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["step"] in self.steps]

    @property
    def seconds(self) -> float:
        """Seconds of a step without its wait for data, for which training no longer waits."""
        return statistics.median(row["seconds"] - row["phases"]["data"] for row in self.rows)

    def experiment(self) -> Experiment:
        experiment = get_recipe(self.recipe)
        train = replace(
            experiment.train,
            precision=self.precision,
            global_batch_size=self.batch,
            micro_batch_size=self.micro_batch,  # type: ignore[arg-type]
        )
        return replace(experiment, train=train, data=replace(experiment.data, decoder=self.decoder))  # type: ignore[arg-type]

    def work(self) -> Workload:
        """The mean step, in equal micro-batches. FLOPs are linear in the sum of squared lengths, so this follows from them."""
        experiment, count = self.experiment(), self.batch // self.micro_batch
        tokens, images = (round(statistics.mean(row[name] for row in self.rows)) for name in ("tokens", "images"))

        def flops(squares: int) -> float:
            whole = StepWork(num_tokens=tokens, sum_squared_lengths=squares, num_images=images)
            return family_of(experiment.model).step_flops(experiment.model, experiment.train.freeze_policy, whole)

        counted = statistics.mean(row["tflops"] * row["seconds"] for row in self.rows) * 1e12
        squares = round((counted - flops(0)) / (flops(tokens) - flops(0)) * tokens)
        micro = MicroBatch(-(-tokens // count), tokens // count, squares // count, -(-images // count))
        return Workload((micro,) * count, StepWork(num_tokens=tokens, sum_squared_lengths=squares, num_images=images), drawn=True)

    def predict(self) -> Prediction:
        planned = plan_recipe(self.experiment(), GPUS["h200"], 1, work=self.work(), software=with_host(OURS, HOST))
        return StepModel(planned.job).predict()

    def busy(self) -> float:
        """Predict the seconds that kernels run in a step."""
        parts = self.predict().parts
        return sum(parts[name] for name in ("products", "attention", "element-wise kernels", "optimizer"))


FIRST_DAY, SECOND_DAY = "h200_20261126_training", "h200_20261127"
TRAINING_RUNS = (
    TrainingRun(f"{FIRST_DAY}/mm1_1b_sampled", "mm1_1b", 8, 2, range(12, 16), kernels=1.116),
    TrainingRun(f"{FIRST_DAY}/mm1_1b_sampled", "mm1_1b", 8, 2, range(16, 19), decoder="auto", kernels=1.116),
    TrainingRun(f"{FIRST_DAY}/mm1_3b_bf16", "mm1_3b", 4, 1, range(12, 20), kernels=1.033),
    TrainingRun(f"{FIRST_DAY}/mm1_3b_fp8", "mm1_3b", 4, 1, range(12, 20), precision="fp8", kernels=0.935),
    TrainingRun(f"{SECOND_DAY}/mm1_1b", "mm1_1b", 8, 2, range(5, 13), kernels=1.184),
    TrainingRun(f"{SECOND_DAY}/infimm_zephyr_7b_pt", "infimm_zephyr_7b_pt", 32, 8, range(4, 14), kernels=1.154),
    TrainingRun(f"{SECOND_DAY}/mono_internvl_2b_s1_1_after", "mono_internvl_2b_s1_1", 64, 8, (2, 3, 4, 10, 11), kernels=1.502),
)
"""Nothing was decoded in the steps of the second. Stacks were sampled in the first two, at little cost."""


@dataclass(frozen=True)
class TrainingPeak:
    """Peak memory of `megatron-mm train` on one H200 (2026-11-27), with the micro-batch that took most."""

    recipe: str
    micro: MicroBatch
    measured_gb: float
    """torch.cuda.max_memory_allocated, in units of 1e9 bytes."""
    also_kept: Callable[[Experiment, MicroBatch], float] = lambda experiment, micro: 0.0
    """Bytes that this trainer kept for the backward pass on that day and no longer keeps."""

    def predict(self) -> float:
        """Predict the peak in bytes, as the trainer was on that day: its loss copied the bf16 logits (Transformer Engine 2.20)."""
        experiment = get_recipe(self.recipe)
        whole = StepWork(num_tokens=self.micro.tokens, sum_squared_lengths=self.micro.sum_squared_lengths, num_images=self.micro.images)
        experiment = replace(experiment, train=replace(experiment.train, global_batch_size=experiment.train.micro_batch_size))
        work = Workload((self.micro,), whole, drawn=True)
        (use,) = StepModel(plan_recipe(experiment, GPUS["h200"], 1, work=work).job).predict().memory
        copied = 2 * self.micro.tokens * experiment.model.decoder.vocab_size
        return use.state + use.activations + max(use.transient, copied) + self.also_kept(experiment, self.micro)


def _results_of_experts(experiment: Experiment, micro: MicroBatch) -> float:
    decoder = experiment.model.decoder
    return 2.0 * decoder.num_layers * micro.tokens * decoder.hidden_size


TRAINING_PEAKS = (
    TrainingPeak("mm1_1b", MicroBatch(7248, 7245, 4547680, 28), 77.02),
    TrainingPeak("infimm_zephyr_7b_pt", MicroBatch(3072, 3069, 603426, 40), 73.25),
    TrainingPeak("mono_internvl_2b_s1_1", MicroBatch(10920, 10920, 8801684, 38), 50.37, also_kept=_results_of_experts),
)


def case_of(name: str) -> Case | None:
    """Return the case with a row's name; None for layer backends that the planner has no times for."""
    if not name.startswith("te "):
        return None
    words = name.replace(",", "").split()
    case = Case("te", words[1], recompute=words[words.index("recompute") + 1])
    return replace(case, micro_batch_size=2) if "micro-batches of 2" in name else case


def rows(paths: list[Path]) -> Iterator[tuple[str, str, float, float]]:
    """Yield (model, case, seconds, peak bytes) of every measured case that the planner covers."""
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row.get("part") in MODELS and "ms" in row and "peak_gib" in row and "blockwise" not in row["case"]:
                yield row["part"], row["case"], row["ms"] / 1e3, row["peak_gib"] * GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, nargs="*", default=RESULTS)
    given = parser.parse_args()
    times, peaks = [], []
    print(
        "| model | case | measured s | predicted / measured | measured GiB | predicted / measured | limit |\n|---|---|---|---|---|---|---|"
    )
    for model, name, seconds, peak in rows(given.results):
        case = case_of(name)
        if case is None:
            continue
        predicted = predict(model, case)
        times.append(predicted.seconds / seconds)
        peaks.append(max(use.allocated for use in predicted.memory) / peak)
        cells = (model, name, f"{seconds:.3f}", f"{times[-1]:.2f}", f"{peak / GIB:.1f}", f"{peaks[-1]:.2f}", predicted.limit)
        print("| " + " | ".join(cells) + " |")
    print("\n| training run | kernels, traced s | predicted / traced | step, measured s | predicted / measured |\n|---|---|---|---|---|")
    for run in TRAINING_RUNS:
        beside = "decoding beside it" if run.decoder == "pillow" else "nothing decoded"
        kernels = f"{run.kernels:.2f} | {run.busy() / run.kernels:.2f}"
        step = f"{run.seconds:.2f} | {run.predict().seconds / run.seconds:.2f}"
        print(f"| {run.results}, {run.precision}, {beside} | {kernels} | {step} |")
    print("\n| training run | peak, measured GB | predicted / measured |\n|---|---|---|")
    for peak in TRAINING_PEAKS:
        print(f"| {peak.recipe} | {peak.measured_gb} | {peak.predict() / peak.measured_gb / 1e9:.3f} |")
    for name, ratios in (("step time", times), ("memory", peaks)):
        errors = sorted(abs(ratio - 1) for ratio in ratios)
        print(f"{name}: median {100 * statistics.median(errors):.1f}%, largest {100 * errors[-1]:.1f}% of {len(errors)} rows")


if __name__ == "__main__":
    main()
