"""A hook that is not in the package: it writes how large each part's weights are, and needs no recipe of its own.

megatron-mm train debug_mm1 --extra-hooks examples/extending/weight_norm_hook.py:WeightNorms --run-dir runs/norms --data.path data/demo
"""

from __future__ import annotations

import json

import torch

from megatron_mm.training.trainer import Hook, StepRecord

INTERVAL = 10


class WeightNorms(Hook):
    """`weight_norms.jsonl` in the run directory: the root mean square of each part's weights on the main process, every ten steps."""

    def after_step(self, record: StepRecord) -> None:
        if record.step % INTERVAL == 0:
            self._write(record.step)

    def after_training(self) -> None:
        self._write(self.trainer.state.step)

    def _write(self, step: int) -> None:
        self.trainer.gather_weights()  # on all processes
        if not self.trainer.topology.is_main:
            return
        squares: dict[str, list[torch.Tensor]] = {}
        for chunk in self.trainer.model:
            for name, parameter in chunk.module.named_parameters():
                squares.setdefault(name.partition(".")[0], []).append(parameter.detach().float().square().mean())
        norms = {part: torch.stack(values).mean().sqrt().item() for part, values in squares.items()}
        with (self.trainer.run_dir / "weight_norms.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **norms}) + "\n")
