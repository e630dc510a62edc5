"""Compare every stage of recipes at full size on the `torch` and the `te` layer backend: checkpoint entries and parameters in memory.

    python te_recipes.py fp8 mm1_30b ...

It is a separate program because megatron-core looks for Transformer Engine when it is imported. Weights have shapes but no values (meta
device). Prints a line of JSON for each recipe: the numbers of entries and parameters of its stages, and the differences.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from support import te

te.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_mm.config import Experiment  # noqa: E402
from megatron_mm.families.recipes import get_recipe  # noqa: E402
from megatron_mm.families.registry import family_of  # noqa: E402
from megatron_mm.models.context import ChunkContext  # noqa: E402
from megatron_mm.parallel import initial_weights  # noqa: E402
from megatron_mm.parallel import topology as topologies  # noqa: E402
from megatron_mm.parallel.images import TensorParallelImages  # noqa: E402
from megatron_mm.platform import cpu  # noqa: E402

PLACE = ("key", "global_shape", "local_shape", "global_offset", "dtype", "replica_id", "allow_shape_mismatch")
"""Attributes that a checkpoint stores of a tensor."""


def stage(experiment: Experiment, topology: topologies.Topology, backend: str) -> list[dict[str, Any]]:
    """Return, for each chunk of a stage, its checkpoint entries, and the number, types and devices of its parameters."""
    found = []
    for virtual_stage in range(experiment.parallel.virtual):
        context = ChunkContext(
            parallel=experiment.parallel,
            precision=experiment.train.precision,
            backend=backend,  # type: ignore[arg-type]
            on_gpu=True,
            sequence_length=experiment.data.sequence_length,
            stage=virtual_stage * experiment.parallel.pipeline + topology.pipeline_rank,
            tensor_rank=topology.tensor_rank,
            encoder_groups=topologies.single_process_groups(),
            sharing=TensorParallelImages(
                parallel_state.get_tensor_model_parallel_group(), sequence_parallel=experiment.parallel.sequence_parallel
            ),
        )
        with torch.device("meta"):
            chunk = family_of(experiment.model).build(experiment.model, context)
        entries = chunk.sharded_state_dict(metadata=dict(initial_weights.STATE_METADATA)).values()
        parameters = list(chunk.parameters())
        found.append(
            {
                "entries": sorted(str([getattr(entry, name, None) for name in PLACE]) for entry in entries),
                "parameters": sum(parameter.numel() for parameter in parameters),
                "types": sorted({f"{parameter.dtype} on {parameter.device}" for parameter in parameters}),
            }
        )
    return found


def compare(experiment: Experiment) -> dict[str, Any]:
    differences, entries, parameters = [], 0, 0
    for rank in range(experiment.parallel.pipeline):
        found = {}
        for backend in ("torch", "te"):
            with topologies.pretend(experiment.parallel, pipeline_rank=rank) as topology:
                found[backend] = stage(experiment, topology, backend)
        entries += sum(len(chunk["entries"]) for chunk in found["te"])
        parameters += sum(chunk["parameters"] for chunk in found["te"])
        for index, (ours, theirs) in enumerate(zip(found["torch"], found["te"], strict=True)):
            for part in ours:
                if ours[part] != theirs[part]:
                    here, there = _only(ours[part], theirs[part]), _only(theirs[part], ours[part])
                    differences.append(f"stage {rank} chunk {index} {part}: torch {here}, te {there}")
    return {"entries": entries, "parameters": parameters, "differences": differences}


def _only(here: Any, there: Any) -> Any:
    return [value for value in here if value not in there][:3] if isinstance(here, list) else here


def main() -> None:
    torch.set_num_threads(1)
    precision, *names = sys.argv[1:]
    for name in names:
        base = get_recipe(name)
        with topologies.pretend(base.parallel, pipeline_rank=0):
            pass  # rebinds megatron-core's torch
        cpu._CudaOnCpu.current_device = staticmethod(lambda: "meta")  # type: ignore[assignment, method-assign]
        experiment = replace(base, train=replace(base.train, precision=precision))  # type: ignore[arg-type]
        print(json.dumps({"recipe": name, **compare(experiment)}), flush=True)


if __name__ == "__main__":
    main()
