"""The training loop. Everything that is not the step itself is a hook (`run.hooks`)."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from megatron_mm.config import Experiment
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import TrainingData, open_tokenizer
from megatron_mm.run.hooks import Hook, StepRecord, standard_hooks
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import Checkpointer, TrainState, find_checkpoint, load_weights, newest_checkpoint
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

logger = logging.getLogger(__name__)


class Trainer:
    """One run on this process: the model's part, the data, and the loop over steps."""

    def __init__(self, experiment: Experiment, run_dir: Path) -> None:
        """Join the other processes, build the model, and load the run's newest checkpoint where it has one.

        Raises ValueError where the layout, the data or the checkpoint does not fit the experiment.
        """
        self.experiment = experiment
        self.run_dir = run_dir
        self.topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
        if experiment.train.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.tokenizer = open_tokenizer(experiment)
        self.model = build_model(experiment, self.topology)
        if experiment.init_from is not None and newest_checkpoint(run_dir) is None:
            self._begin_with(find_checkpoint(experiment.init_from))
        self.optimizer = build_optimizer(experiment, self.model)  # after the weights: it copies them
        self.step = TrainingStep(experiment, self.topology, self.model, self.optimizer, num_sources=len(experiment.data.sources))
        self.checkpointer = Checkpointer(experiment, self.topology, run_dir, self.model, self.optimizer)
        self.state = self.checkpointer.load_latest() or TrainState()
        self.data = TrainingData(experiment, self.topology, self.tokenizer, cursor=self.state.plan)
        self.hooks: list[Hook] = standard_hooks(self)
        self.should_stop = False

    def _begin_with(self, checkpoint: Path) -> None:
        """Take the weights of an earlier stage of training, and nothing else."""
        load_weights(self.experiment, self.topology, self.model, checkpoint)
        if self.topology.is_main:
            logger.info("begins with the weights of %s", checkpoint)

    def fit(self) -> TrainState:
        """Train up to `train.steps`, or until a hook asks to stop; returns where the run stands."""
        if self.state.step >= self.experiment.train.steps and self.topology.is_main:
            logger.info("the run has done its %d steps already: give a larger --train.steps to go on", self.state.step)
        failed = True
        try:
            while self.state.step < self.experiment.train.steps and not self.should_stop:
                record = self._one_step()
                for hook in self.hooks:
                    hook.after_step(record)
            for hook in self.hooks:
                hook.after_training()
            failed = False
        finally:
            self.data.close()
            for hook in reversed(self.hooks):
                hook.close(failed=failed)
        return self.state

    def _one_step(self) -> StepRecord:
        began = time.perf_counter()
        batch = next(self.data)
        waited = time.perf_counter() - began
        result = self.step.run(batch.micro_batches, step=self.state.step + 1)
        state = self.state
        state.step += 1
        state.plan = self.data.cursor
        state.tokens += batch.plan.num_tokens
        state.images += batch.plan.num_images
        state.skipped_steps += result.update.skipped
        return StepRecord(step=state.step, result=result, batch=batch, seconds=time.perf_counter() - began, data_seconds=waited)
