"""Model families. What a family must supply is in `base.ModelFamily`."""

from megatron_mm.config import ModelConfig
from megatron_mm.models import infimm, mm1
from megatron_mm.models.base import ModelFamily

FAMILIES: dict[str, ModelFamily] = {"mm1": mm1.FAMILY, "infimm": infimm.FAMILY}


def family_of(model: ModelConfig) -> ModelFamily:
    """The family that builds a model config."""
    return FAMILIES[model.family]
