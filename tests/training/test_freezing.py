"""A freeze policy selects trainable parameters by name, and a pattern that matches no parameter is an error."""

from __future__ import annotations

import pytest
from support.distributed import run_processes
from support.small import small_experiment
from support.small_infimm import small_infimm

from megatron_mm.families.infimm.family import InfiMMFamily
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.dry_run import stage_parameters
from megatron_mm.training import freezing
from megatron_mm.training.build import build_chunks, build_model
from megatron_mm.training.freezing import freeze, trainable_patterns

PROBLEM = r"freeze policy 'pt' of infimm models has patterns that match no parameter: \['resampled'\]; names begin with \['language'"


class Mistaken(InfiMMFamily):
    freeze_policies = {"pt": ("resampled", r"language\.decoder\.layers\.\d+\.gated\.")}  # noqa: RUF012


def test_a_pattern_that_matches_nothing_is_found_in_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezing, "family_of", lambda model: Mistaken())
    with pytest.raises(ValueError, match=PROBLEM):
        stage_parameters(small_infimm(policy="pt", parallel={"pipeline": 2}))
    monkeypatch.setattr(freezing, "family_of", lambda model: InfiMMFamily())
    stage_parameters(small_infimm(policy="pt", parallel={"pipeline": 2}))


def _build() -> list[str]:
    """Return the error of building a model with the mistaken policy, and with the correct one ("" if none)."""
    found = []
    experiment = small_infimm(policy="pt", parallel={"pipeline": 2})
    topology = topologies.initialize(experiment.parallel, seed=1)
    for family in (Mistaken(), InfiMMFamily()):
        freezing.family_of = lambda model, family=family: family
        try:
            build_model(experiment, topology)
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def test_all_processes_find_it() -> None:
    """The resampler is only on the first stage, which is fine; a pattern that matches on neither stage is an error on both."""
    for mistaken, right in run_processes(_build, 2):
        assert "['resampled']" in mistaken and not right


def test_an_unknown_policy_lists_all() -> None:
    with pytest.raises(
        ValueError, match=r"train.freeze_policy is 'all', but must be one of the policies of infimm models: \['ift', .*'pt'\]"
    ):
        trainable_patterns(small_infimm(policy="all"))


def test_a_bias_of_a_parallel_layer_does_not_train_alone() -> None:
    """Its gradient would be missing, silently if reductions do not overlap. Biases of norms may train alone."""
    experiment = small_experiment()
    topology = topologies.initialize(experiment.parallel, seed=1)
    (chunk,) = build_chunks(experiment, topology)
    freeze(chunk, [r"vision\..*layernorm\.bias"])
    with pytest.raises(ValueError, match=r"the freeze policy trains vision\..*linear_proj.bias but not vision\..*linear_proj.weight"):
        freeze(chunk, [r"vision\..*bias"])
