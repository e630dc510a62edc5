"""The settings that the debug recipes share: models that train on two CPU cores in minutes, with the same code as the large ones.

All values are ours. `python -m megatron_mm train debug_mm1 --run-dir runs/debug --data.path data/demo` runs one on a laptop, on the data of
`megatron-mm prepare demo`.
"""

from __future__ import annotations

from megatron_mm.config import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    Experiment,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    TrainConfig,
)

DEBUG_DECODER = DecoderConfig(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=320,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=32,
    vocab_size=512,
)
"""A tiny decoder, whose vocabulary has room for the demo's 500 tokens and a few special ones."""


def debug_experiment(recipe: str, model: ModelConfig) -> Experiment:
    """Return an experiment of 400 steps with 16 sequences of 256 tokens each, in fp32."""
    return Experiment(
        recipe=recipe,
        model=model,
        data=DataConfig(sequence_length=256, decode_threads=2, read_threads=2, packing_window=1024),
        optimizer=OptimizerConfig(peak_lr=2e-3, min_lr=2e-4, warmup_steps=20),
        train=TrainConfig(steps=400, schedule_steps=400, global_batch_size=16, micro_batch_size=4, precision="fp32"),
        checkpoint=CheckpointConfig(interval=200, keep=2),
        eval=EvalConfig(interval=100, batches=4, samples=4, max_new_tokens=16),
        monitor=MonitorConfig(console_interval=10),
    )
