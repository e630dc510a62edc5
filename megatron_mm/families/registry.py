"""Model families. What a family must supply is in `families.base.ModelFamily`."""

from collections.abc import Iterable

from megatron_mm.config import Experiment, ModelConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.base import ModelFamily
from megatron_mm.families.infimm import model as infimm
from megatron_mm.families.mm1 import model as mm1
from megatron_mm.families.mono_internvl import model as mono_internvl

FAMILIES: dict[str, ModelFamily] = {"mm1": mm1.FAMILY, "infimm": infimm.FAMILY, "mono_internvl": mono_internvl.FAMILY}


def family_of(model: ModelConfig) -> ModelFamily:
    """The family that builds a model config."""
    return FAMILIES[model.family]


def pipeline_rows(experiment: Experiment, micro_batches: Iterable[PackedBatch]) -> int:
    """Rows [rows, 1, hidden_size] that go from stage to stage for each of these micro-batches; enough for the fullest."""
    batches = list(micro_batches)
    tokens, images = max(batch.num_tokens for batch in batches), max(batch.num_images for batch in batches)
    return family_of(experiment.model).pipeline_rows(experiment.model, experiment.parallel, tokens, images)
