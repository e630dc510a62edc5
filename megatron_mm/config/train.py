"""Configuration of training (length, batches, precision, handling of faults) and of checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from megatron_mm.config.checks import require, require_positive

Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, batches, precision, and handling of faults."""

    renamed: ClassVar[dict[str, str]] = {"policy": "freeze_policy"}
    """Fields that were renamed: earlier name -> current name. Checkpoints and command lines with the earlier names still work."""

    steps: int
    """Number of optimizer steps after which the run ends, counted from the beginning of training (not from a resume)."""
    schedule_steps: int
    """Length of the learning-rate schedule, steps; independent of `steps`, so that ending a run earlier does not change the schedule."""
    global_batch_size: int
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int = 1
    """Full sequences that one process computes at a time, as a budget of tokens and images. Padding is not computed, so a micro-batch may
    contain more sequences if they are short."""
    fewest_micro_batches: bool = False
    """Make as few and as full micro-batches as the budget allows, instead of micro-batches of micro_batch_size sequences on average. Use it
    for layouts without pipeline stages, where fewer micro-batches leave no process idle."""
    precision: Precision = "bf16"
    """fp32; bf16, with fp32 master weights and gradients; or fp8, which is bf16 with FP8 matrix products (Transformer Engine)."""
    seed: int = 1234
    """Seed of the initial weights, the sample order and everything else that is random."""
    freeze_policy: str = "all"
    """Which parameters are trainable: the name of one of the model family's freeze policies. Frozen parameters have no gradient and no
    optimizer state."""
    layers: Literal["auto", "te", "torch"] = "auto"
    """Layer backend: Transformer Engine or plain PyTorch. auto uses te on a GPU if Transformer Engine is installed, except in fp32."""
    deterministic: bool = False
    """Use deterministic algorithms where PyTorch has them: reruns on a GPU are bit-identical, but slower."""
    max_skipped_in_a_row: int = 10
    """Maximum number of consecutive steps that may be skipped because the gradient is not finite; 0 sets no limit. `after_skipped` says
    what happens then."""
    after_skipped: Literal["stop", "roll_back"] = "stop"
    """What to do after `max_skipped_in_a_row` skipped steps in a row: end the run with an error, or go back to the checkpoint before them
    and leave out the data since then."""
    spike_ratio: float = 1.5
    """A loss of more than this many times the median of the last 64 steps is a spike, and is logged; 0 disables the check."""
    after_spike: Literal["alert", "roll_back"] = "alert"
    """What to do after a spike: only log it, or also go back to the newest checkpoint before it and leave out the data since then."""
    max_roll_backs: int = 3
    """Maximum number of times that a run may go back to a checkpoint; one more ends it with an error."""
    checksum_interval: int = 0
    """Steps between comparisons of parameters that are replicated on several processes, to find a process with faulty memory or arithmetic;
    0 disables them."""
    watchdog: float = 480.0
    """Seconds without progress after which a process counts as hung. All processes then write their stacks to the run directory and end, so
    that the launcher can restart them. Must be less than `parallel.collective_timeout_minutes`; 0 disables the watchdog."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "schedule_steps", "global_batch_size", "micro_batch_size")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size {self.global_batch_size} is not a multiple of train.micro_batch_size {self.micro_batch_size}: "
            "change one of them",
        )
        require(
            self.max_skipped_in_a_row >= 0,
            f"train.max_skipped_in_a_row is {self.max_skipped_in_a_row}, but must be at least 0 (0 sets no limit)",
        )
        require(
            self.spike_ratio == 0 or self.spike_ratio > 1,
            f"train.spike_ratio is {self.spike_ratio}, but must be more than 1, or 0 to disable the check for spikes",
        )
        for name in ("watchdog", "checksum_interval", "max_roll_backs"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}, but must be at least 0")


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where checkpoints are written, and how many are kept."""

    interval: int = 1000
    """Steps between checkpoints; there is also one at the end of the run."""
    keep: int = 3
    """Number of newest complete checkpoints to keep."""
    keep_every: int = 0
    """Also keep, permanently, the checkpoints of steps that are multiples of this number, which must be a multiple of `interval`; 0 for
    none."""
    best: bool = False
    """Also save a checkpoint at every evaluation with the lowest held-out loss so far, and keep the newest of these."""
    copy_to: str | None = None
    """Destination of a second copy of every checkpoint, made in the background: a directory, or a URL that fsspec supports
    (s3://bucket/run)."""
    memory: Path | None = None
    """A directory in each node's memory, such as /dev/shm/NAME, for copies of the training state, from which restarted processes resume
    without reading a checkpoint; None keeps no copies."""
    memory_interval: int = 100
    """Steps between copies to `memory`."""
    asynchronous: bool = True
    """Write checkpoints in a separate process while training continues."""
    timeout_minutes: float = 30.0
    """An asynchronous save that takes longer is abandoned, with an error in the log; training continues."""

    def __post_init__(self) -> None:
        require_positive(self, "interval", "keep", "memory_interval", "timeout_minutes")
        require(
            self.keep_every >= 0 and self.keep_every % self.interval == 0,
            f"checkpoint.keep_every is {self.keep_every}, but must be a multiple of checkpoint.interval {self.interval}, or 0 for none",
        )
        require(
            re.search(r"://[^/]*:[^/]*@", self.copy_to or "") is None,
            "checkpoint.copy_to contains a password, which would be written to the run's files: set it in the environment "
            "or in the store's own configuration",
        )
