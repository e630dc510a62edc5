"""The node check distinguishes unfit nodes from fit ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm.run.node_check import Measured, check_node, judge

GPU = Measured(device="cuda:0", free_memory=0.99, result=7.0, tflops=600.0, total=6.0, gb_per_s=200.0)
NODE = [GPU, replace(GPU, device="cuda:1"), replace(GPU, device="cuda:2")]


@pytest.mark.parametrize(
    ("changes", "least", "said"),
    [
        ({}, 0.0, []),
        ({"result": 8.0}, 0.0, ["arithmetic: different result on cuda:1"]),
        ({"tflops": 300.0}, 0.0, ["speed: median 600 TFLOP/s, slower: cuda:1 300"]),
        ({"free_memory": 0.5}, 0.0, ["GPU memory: cuda:1 50% free"]),
        ({"total": 5.0}, 0.0, ["all-reduce: 200 GB/s between 3 processes; wrong sums on cuda:1"]),
        ({"gb_per_s": 20.0}, 100.0, ["all-reduce: 20 GB/s between 3 processes, expected 100"]),
    ],
)
def test_what_is_wrong_with_a_gpu_is_named(changes: dict[str, float], least: float, said: list[str]) -> None:
    found = list(judge([NODE[0], replace(NODE[1], **changes), NODE[2]], min_gb_per_s=least))
    assert [f"{finding.name}: {finding.detail}" for finding in found if not finding.fit] == said
    assert len(found) == 4


@pytest.mark.slow
def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    found = {finding.name: finding for finding in check_node(path=tmp_path)}
    assert {"memory", "/dev/shm", "storage", "arithmetic", "speed", "all-reduce"} <= set(found)
    assert found["arithmetic"].fit and found["all-reduce"].fit, found
    missing = {finding.name: finding for finding in check_node(gpus=8, path=tmp_path / "nothing")}
    assert not missing["GPUs"].fit and not missing["storage"].fit
