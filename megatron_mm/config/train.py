"""How long a run trains, in which batches and precision, what it does about faults, and its checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from megatron_mm.config.checks import require, require_positive

Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class TrainConfig:
    """How long, in which batches and in which precision."""

    renamed: ClassVar[dict[str, str]] = {"policy": "freeze_policy"}
    """Fields of earlier versions and their names now: checkpoints and command lines that have the earlier ones are read as before."""

    steps: int
    """Optimizer steps after which the run ends, counted from the beginning of training (not from a resume)."""
    schedule_steps: int
    """Length of the learning-rate schedule, steps; independent of `steps`, so that stopping early does not change it."""
    global_batch_size: int
    """Sequences of one optimizer step, over all processes."""
    micro_batch_size: int = 1
    """Full sequences that one process handles at once: a budget of their tokens and images. Padding is not computed, so a micro-batch may
    hold more sequences where these are short."""
    fewest_micro_batches: bool = False
    """Make as few micro-batches as the budget allows, rather than micro_batch_size sequences on average: fewer and fuller ones, for layouts
    without pipeline stages, where fewer micro-batches leave no process idle."""
    precision: Precision = "bf16"
    """fp32; bf16 with fp32 master weights and gradients; fp8 is bf16 with FP8 matrix products (Transformer Engine)."""
    seed: int = 1234
    """Seed of the initial weights, the sample order and everything else that is random."""
    freeze_policy: str = "all"
    """Which parameters are trainable, by a name of the model family's. Frozen ones have no gradient and no optimizer state."""
    layers: Literal["auto", "te", "torch"] = "auto"
    """Layer backend: Transformer Engine or plain PyTorch; auto takes te on a GPU where its package is, except in fp32."""
    deterministic: bool = False
    """Use deterministic algorithms where PyTorch has them; bit-identical reruns on a GPU, slower."""
    max_skipped_in_a_row: int = 10
    """Steps in a row that may be skipped because the gradient is not finite; 0 allows any number. What comes then: `after_skipped`."""
    after_skipped: Literal["stop", "roll_back"] = "stop"
    """After `max_skipped_in_a_row` such steps the run ends with an error; or it goes back to the checkpoint before them and leaves out the
    data since then."""
    spike_ratio: float = 1.5
    """A loss of more than this many times the median of the last 64 steps' is a spike, and is said in the log; 0 never looks."""
    after_spike: Literal["alert", "roll_back"] = "alert"
    """Say so; or go back to the newest checkpoint before the spike, too, and leave out the data since then."""
    max_roll_backs: int = 3
    """Times that a run goes back; the next time it ends with an error."""
    checksum_interval: int = 0
    """Steps between comparisons of the parameters that several processes hold copies of, to find a process whose memory or arithmetic is
    wrong; 0 never compares."""
    watchdog: float = 480.0
    """Seconds without progress after which a process counts as hung: all processes write where they stand to the run directory and end, so
    that the launcher starts them again. Less than `parallel.collective_timeout_minutes`; 0 never looks."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "schedule_steps", "global_batch_size", "micro_batch_size")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size {self.global_batch_size} is not a multiple of train.micro_batch_size {self.micro_batch_size}",
        )
        require(
            self.max_skipped_in_a_row >= 0,
            f"train.max_skipped_in_a_row is {self.max_skipped_in_a_row}, but must be at least 0, which never ends a run",
        )
        require(
            self.spike_ratio == 0 or self.spike_ratio > 1,
            f"train.spike_ratio is {self.spike_ratio}, but must be more than 1, or 0 to never look for spikes",
        )
        for name in ("watchdog", "checksum_interval", "max_roll_backs"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}, but must be at least 0")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    interval: int = 1000
    """Steps between checkpoints; one is always written at the end of the run."""
    keep: int = 3
    """Newest complete checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this stay for ever, beside the newest `keep`; a multiple of `interval`; 0 for none."""
    best: bool = False
    """Save at every evaluation with the lowest held-out loss so far, and keep the newest of these checkpoints beside the others."""
    copy_to: str | None = None
    """Where a second copy of every checkpoint goes in the background: a directory, or a URL that fsspec knows (s3://bucket/run)."""
    memory: Path | None = None
    """A directory in each node's memory, such as /dev/shm/NAME, for a copy of the training state from which restarted processes resume
    without reading a checkpoint; None keeps none."""
    memory_interval: int = 100
    """Steps between copies to `memory`."""
    asynchronous: bool = True
    """Write in a separate process while training continues."""
    timeout_minutes: float = 30.0
    """An asynchronous save that takes longer is given up with an error in the log; training continues."""

    def __post_init__(self) -> None:
        require_positive(self, "interval", "keep", "memory_interval", "timeout_minutes")
        require(
            self.keep_every >= 0 and self.keep_every % self.interval == 0,
            f"checkpoint.keep_every is {self.keep_every}, but must be a multiple of checkpoint.interval {self.interval}, or 0 for none",
        )
        require(
            re.search(r"://[^/]*:[^/]*@", self.copy_to or "") is None,
            "checkpoint.copy_to holds a password, which would stand in the run's files: give it in the environment or the store's own "
            "configuration",
        )
