"""The entry point `lmms_eval.models` for lmms-eval: the name of our model class, which is imported when it is used."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The model `megatron_mm` (`run.lmms_eval_model`)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="megatron_mm", simple_class_path="megatron_mm.run.lmms_eval_model.MegatronMM")
