"""Checkpoints: sharded, asynchronous, complete or absent.

    RUN_DIR/checkpoints/step_00000200/
        experiment.json     the resolved experiment
        state.json          step, plan cursor and counters
        tokenizer.model     what the token ids mean
        tensors/            megatron-core's distributed checkpoint: weights, optimizer state, random-number generators
        manifest.json       size and CRC-32 of every other file; written last

A save goes to a fresh directory beside these, `.partial-...`; only when every process has written its part and the parts are
checked is it renamed. So a directory named step_* is always whole, whatever was killed when. Reading checks sizes and checksums
first; a damaged checkpoint is set aside and the one before it used (`fallback.py`). The two pickles that megatron-core writes may
name nothing but tensors' metadata.
"""

from megatron_mm.training.checkpoint.checkpointer import Checkpointer
from megatron_mm.training.checkpoint.compatible import check_same_model, check_same_tokenizer, model_differences
from megatron_mm.training.checkpoint.fallback import newest_described_checkpoint
from megatron_mm.training.checkpoint.integrity import verify
from megatron_mm.training.checkpoint.load import load_chunk, load_strategy, load_weights
from megatron_mm.training.checkpoint.names import TENSORS, belongs_to_model, completed_checkpoints, find_checkpoint, newest_checkpoint
from megatron_mm.training.checkpoint.state import TrainState

__all__ = [
    "TENSORS",
    "Checkpointer",
    "TrainState",
    "belongs_to_model",
    "check_same_model",
    "check_same_tokenizer",
    "completed_checkpoints",
    "find_checkpoint",
    "load_chunk",
    "load_strategy",
    "load_weights",
    "model_differences",
    "newest_checkpoint",
    "newest_described_checkpoint",
    "verify",
]
