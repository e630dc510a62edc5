"""Compares a run with its prediction: refuses a layout that cannot fit, and logs predicted and measured values.

This works only for GPUs that the planner knows; a run on a CPU has no prediction.
"""

from __future__ import annotations

import logging
import statistics
from dataclasses import replace

import torch

from megatron_mm.config import Experiment
from megatron_mm.data.load.decode import has_dali
from megatron_mm.data.plan.plan import Plan
from megatron_mm.parallel import topology as topologies
from megatron_mm.planning.hardware import GIGA, Gpu, gpu_named
from megatron_mm.planning.memory import fits
from megatron_mm.planning.recipe_job import plan_recipe
from megatron_mm.planning.report import ERROR_BAND
from megatron_mm.planning.step import Prediction, StepModel
from megatron_mm.planning.workload import Workloads
from megatron_mm.platform.device import local_device
from megatron_mm.reporting.monitor import Monitor
from megatron_mm.run.start import Checked
from megatron_mm.training.metrics import MetricsFile
from megatron_mm.training.trainer import Hook, StepRecord, Trainer

logger = logging.getLogger(__name__)

WINDOW = 20
"""Number of most recent steps whose median is compared with the prediction. A warning needs this many steps."""


def gpu_here() -> Gpu | None:
    """Return this process's GPU; None on a CPU, or if the planner does not know the GPU."""
    device = local_device()
    return gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def predict(experiment: Experiment, *, world_size: int, gpu: Gpu, plan: Plan | None = None) -> Prediction:
    """Predict a step of an experiment on `world_size` GPUs, with the workload of its data's plan if that is given, and with this machine's
    decoder."""
    if experiment.data.decoder == "auto" and not has_dali():
        experiment = replace(experiment, data=replace(experiment.data, decoder="pillow"))
    work = Workloads(experiment, plan=plan).of(data_size=experiment.parallel.data_parallel_size(world_size))
    return StepModel(plan_recipe(experiment, gpu, world_size, work=work).job).predict()


def check_fits(experiment: Experiment, *, world_size: int, gpu: Gpu, plan: Plan | None = None) -> None:
    """Raise ValueError if the layout cannot fit according to the planner."""
    prediction = predict(experiment, world_size=world_size, gpu=gpu, plan=plan)
    if not fits(prediction.peak_bytes, gpu):
        rank = max(range(len(prediction.memory)), key=lambda rank: prediction.memory[rank].total)
        needed = prediction.peak_bytes / GIGA
        raise ValueError(
            f"a process of pipeline rank {rank} would need {needed:.1f} GB, but a {gpu.name} has {gpu.memory_gb:.0f} GB: "
            f"`megatron-mm plan {experiment.recipe} --num-gpus {world_size} --search` finds a layout that fits; --force trains anyway"
        )


def examine(checked: Checked) -> None:
    """Call `check_fits` for this process's GPU, if the planner knows it."""
    gpu = gpu_here()
    if gpu is not None:
        check_fits(checked.experiment, world_size=topologies.world_size(), gpu=gpu, plan=checked.plan)


def plan_hooks(trainer: Trainer, monitor: Monitor, plan: Plan) -> list[Hook]:
    """Return the hooks that `train` adds to a run."""
    return [PlanRatio(trainer, monitor, gpu=gpu_here(), plan=plan)]


class PlanRatio(Hook):
    """Writes predicted step time and memory, and measured / predicted, to `plan.jsonl` and to `plan/...` in W&B."""

    def __init__(self, trainer: Trainer, monitor: Monitor, *, gpu: Gpu | None, plan: Plan | None = None) -> None:
        """
        Args:
            gpu: GPU of this run; without one there is no prediction.
            plan: plan of the training data.
        """
        super().__init__(trainer)
        self.monitor = monitor
        self.seconds: list[float] = []
        self.warned = False
        self.prediction: Prediction | None = None
        if gpu is not None and trainer.topology.is_main:
            self.prediction = predict(trainer.experiment, world_size=trainer.topology.world_size, gpu=gpu, plan=plan)
            self.file = MetricsFile(trainer.run_dir / "plan.jsonl", resume_step=trainer.state.step)
        self.band = ERROR_BAND["dense" if trainer.experiment.model.decoder.moe is None else "moe"]

    def predicted_seconds(self) -> dict[str, float]:
        return dict(self.prediction.parts) if self.prediction is not None else {}

    def after_step(self, record: StepRecord) -> None:
        if self.prediction is None:
            return
        self.seconds = [*self.seconds[-(WINDOW - 1) :], record.seconds]
        ratio = statistics.median(self.seconds) / self.prediction.seconds
        values = {"plan/seconds": self.prediction.seconds, "plan/ratio": ratio}
        if torch.cuda.is_available():
            own = self.prediction.memory[self.trainer.topology.pipeline_rank].allocated
            values |= {"plan/memory": own, "plan/memory_ratio": torch.cuda.max_memory_allocated() / own}
        self.file.write({"step": record.step, **values})
        self.monitor.log_values(record.step, values)
        if not self.warned and len(self.seconds) == WINDOW and abs(ratio - 1) > self.band:
            self.warned = True
            logger.warning(
                "steps take %.2f times the predicted %.3f s, which is beyond the error band of %.0f%%. Possible "
                "causes: a slower host than those of the "
                "published runs (plan --host-microseconds), a slow GPU, a shared network, slow data loading",
                ratio,
                self.prediction.seconds,
                100 * self.band,
            )

    def close(self, *, failed: bool) -> None:
        if self.prediction is not None:
            self.file.close()
