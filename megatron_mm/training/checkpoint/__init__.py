"""Checkpoints: sharded, asynchronous, complete or absent.

    RUN_DIR/checkpoints/step_00000200/
        experiment.json     the resolved experiment
        state.json          step, plan cursor and counters
        tokenizer.model     the tokenizer that the token ids belong to
        tensors/            megatron-core's distributed checkpoint: weights, optimizer state, random-number generators
        manifest.json       size and CRC-32 of every other file; written last

A save writes to a new directory, `.partial-...`, in the same folder. The directory is renamed only after every process has written its
part and the parts are checked. So a directory named step_* is always complete, even if processes were killed during a save. Loading first
checks sizes and checksums; a damaged checkpoint is set aside and the previous one is used (`fallback.py`). The two pickles that
megatron-core writes may refer only to tensor metadata.
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
