"""All known model families, in the dictionary `FAMILIES`. `families.base.Family` defines the interface of a family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_mm.config import Experiment
from megatron_mm.families.base import Config, Family
from megatron_mm.families.infimm.family import INFIMM
from megatron_mm.families.mm1.family import MM1
from megatron_mm.families.mono_internvl.family import MONO_INTERNVL

if TYPE_CHECKING:
    from megatron_mm.data.batch import PackedBatch

FAMILIES: dict[str, Family[Any]] = {"mm1": MM1, "infimm": INFIMM, "mono_internvl": MONO_INTERNVL}


def register_family(family: Family[Any]) -> None:
    """Register a family defined outside this package. Raises ValueError if its name is taken."""
    known = FAMILIES.setdefault(family.name, family)
    if known is not family:
        raise ValueError(
            f"a family {family.name!r} is already registered, {type(known).__module__}.{type(known).__name__}: "
            "choose another name, or refer to its file in only one way (by its path or as a module)"
        )


def family_of(model: Config) -> Family[Config]:
    """Return the family that a model config belongs to. Raises ValueError if it is not registered."""
    if model.family not in FAMILIES:
        raise ValueError(
            f"model family {model.family!r} is unknown; known families are {sorted(FAMILIES)}: "
            "add the file that registers it to `extensions`"
        )
    return FAMILIES[model.family]


def pipeline_rows(experiment: Experiment, batch: PackedBatch) -> int:
    """Return the number of rows [rows, 1, hidden_size] sent between stages for a micro-batch."""
    return family_of(experiment.model).pipeline_rows(experiment.model, experiment.parallel, batch.num_tokens, batch.num_images)
