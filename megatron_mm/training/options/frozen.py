"""Which options a freeze policy excludes."""

from __future__ import annotations

from megatron_mm.config import Experiment
from megatron_mm.training.freezing import is_trainable, trainable_patterns


def frozen_in_decoder(experiment: Experiment, consequence: str) -> str:
    """Return why an option cannot be used with this freeze policy; empty if it freezes no weight of the decoder."""
    patterns = trainable_patterns(experiment)
    if all(is_trainable(name, patterns) for name in _OF_THE_DECODER):
        return ""
    return f"freeze policy {experiment.train.freeze_policy!r} freezes weights of the decoder, {consequence}"


_OF_THE_DECODER = tuple(f"language.decoder.layers.0.{name}.weight" for name in ("self_attention.linear_qkv", "mlp.text.linear_fc1"))
