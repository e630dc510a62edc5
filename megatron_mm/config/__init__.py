"""The configuration of a run: one dataclass, `Experiment`, made of one part for each concern.

    blocks.py      the blocks that families share; a family's own are in its folder
    kernels.py     which fused kernels are used
    parallel.py    how the model is split over processes
    precision.py   number formats of gradients, optimizer state and FP8 products
    train.py       length of training, handling of faults, checkpoints
    run.py         data, optimizer, evaluation, monitoring, profiling; `Experiment`

A recipe (`megatron_mm.families.recipes`) is a function that returns a complete `Experiment`; the command line overrides its fields
(`--train.steps 100`); the resolved result is written to the run directory as JSON and can be read back. Every part checks its values when
it is created, so that a wrong value is reported before anything starts.
"""

from megatron_mm.config.blocks import (
    ConnectorConfig,
    DecoderConfig,
    EvaConfig,
    ModelConfig,
    MoEConfig,
    ResamplerConfig,
    VisionConfig,
)
from megatron_mm.config.kernels import KernelConfig
from megatron_mm.config.parallel import ParallelConfig
from megatron_mm.config.precision import PrecisionConfig
from megatron_mm.config.run import (
    FP8_MULTIPLE,
    FP8_MULTIPLES,
    DataConfig,
    EvalConfig,
    Experiment,
    MonitorConfig,
    OptimizerConfig,
    ProfileConfig,
)
from megatron_mm.config.train import CheckpointConfig, Precision, TrainConfig

__all__ = [
    "FP8_MULTIPLE",
    "FP8_MULTIPLES",
    "CheckpointConfig",
    "ConnectorConfig",
    "DataConfig",
    "DecoderConfig",
    "EvaConfig",
    "EvalConfig",
    "Experiment",
    "KernelConfig",
    "MoEConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Precision",
    "PrecisionConfig",
    "ProfileConfig",
    "ResamplerConfig",
    "TrainConfig",
    "VisionConfig",
]
