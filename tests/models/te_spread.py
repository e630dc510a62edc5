"""The runs that `test_te_spread.py` compares: a pipeline of two stages on Transformer Engine's own Python (`support.te`). The tower
is either on the first stage, or every stage encodes a share of the images (`parallel.spread_encoder`).

    python te_spread.py FAMILY

It is a separate program because megatron-core looks for Transformer Engine when it is imported. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import te_program  # installs Transformer Engine's Python first
from support import distributed
from support.te.extension import CALLS

from megatron_mm.config import ParallelConfig
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.start import check_fp8


def train(family: str, precision: str, spread: bool, run_dir: Path) -> tuple[list[float], int]:
    """Train, and return the losses and the number of attention calls of this process in step 3.

    Without a checkpoint in `run_dir`, steps 1 to 3 run and a checkpoint is saved after step 2; otherwise only step 3 runs.
    """
    subject = te_program.SUBJECTS[family]
    experiment = replace(subject.experiment(precision=precision), parallel=ParallelConfig(pipeline=2, spread_encoder=spread))
    if precision == "fp8":
        check_fp8(experiment)
    trainee = te_program.Trainee(subject, experiment, "te", run_dir)
    losses = []
    if trainee.checkpointer.load_latest() is None:
        losses = trainee.train(1, 2)
        trainee.save(2)
    CALLS.clear()
    losses += trainee.train(3, 3)
    topologies.shutdown()
    return losses, CALLS["fused_attn_fwd"]


def main() -> None:
    distributed._PRELOADED.clear()  # child processes start with this file, which installs Transformer Engine
    family, found = sys.argv[1], {}
    for precision in ("bf16", "fp8"):
        with tempfile.TemporaryDirectory() as folder:
            runs: dict[str, Any] = {}
            for name, spread, where in (("first stage", False, "one"), ("all", True, "two"), ("all, resumed", True, "two")):
                ranks = distributed.run_processes(train, 2, family, precision, spread, Path(folder) / where, timeout=600)
                runs[name] = {"losses": ranks[0][0], "attentions": [attentions for _, attentions in ranks]}
        found[precision] = runs
    print(json.dumps(found))


if __name__ == "__main__":
    main()
