"""The configuration of a run: one dataclass, `Experiment`, made of one part for each concern.

    models.py      the model: decoder, tower, what joins them; one class for each family
    run.py         how it is cut, fed, trained, saved, evaluated, watched; `Experiment`
    serialize.py   an experiment as JSON and back

A recipe (`megatron_mm.recipes`) is a function that returns a complete `Experiment`; the command line overrides its
fields (`--train.steps 100`); the resolved result is written to the run directory as JSON and can be read back.
Every part checks itself once, when it is made, so that a wrong value is reported before anything is started.
"""

from megatron_mm.config.models import (
    ConnectorConfig,
    DecoderConfig,
    EvaConfig,
    GatedConfig,
    InfiMMConfig,
    MM1Config,
    ModelConfig,
    MoEConfig,
    MonoInternVLConfig,
    PatchEmbeddingConfig,
    ResamplerConfig,
    VisionConfig,
)
from megatron_mm.config.run import (
    FP8_MULTIPLE,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    Experiment,
    MonitorConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    TrainConfig,
)
from megatron_mm.config.serialize import from_dict, load_experiment, save_experiment, to_dict

__all__ = [
    "FP8_MULTIPLE",
    "CheckpointConfig",
    "ConnectorConfig",
    "DataConfig",
    "DecoderConfig",
    "EvaConfig",
    "EvalConfig",
    "Experiment",
    "GatedConfig",
    "InfiMMConfig",
    "MM1Config",
    "MoEConfig",
    "ModelConfig",
    "MonitorConfig",
    "MonoInternVLConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PatchEmbeddingConfig",
    "Precision",
    "ResamplerConfig",
    "TrainConfig",
    "VisionConfig",
    "from_dict",
    "load_experiment",
    "save_experiment",
    "to_dict",
]
