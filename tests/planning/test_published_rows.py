"""What the text of a published row says about its software and network."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from megatron_mm.planning.hardware import STACKS
from megatron_mm.planning.job import Job
from megatron_mm.planning.kernels import Message
from megatron_mm.planning.measurements import Measurement, read_measurements
from megatron_mm.planning.memory import parameters_of_ranks
from megatron_mm.planning.step import Prediction

DENSE = {"model": "llama3-8B", "layers": "32", "hidden": "4096", "heads": "32", "kv_heads": "8", "ffn": "14336", "vocab": "128256"}
SPARSE = {"model": "gpt-oss-120B", "layers": "36", "hidden": "2880", "heads": "64", "head_dim": "64", "kv_heads": "8", "experts": "128",
          "topk": "4", "moe_ffn": "2880", "vocab": "201088", "ep": "64"}  # fmt: skip
RUN = {
    "gpu": "H100",
    "n_gpus": "64",
    "gbs": "128",
    "mbs": "1",
    "seq": "4096",
    "precision": "bf16",
    "source": "somewhere",
    "recompute": "none",
}


def _plan(tmp_path: Path, *rows: dict[str, str]) -> list[tuple[Job, Prediction]]:
    names = sorted({name for row in rows for name in {**RUN, **row}})
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({**RUN, **row} for row in rows)
    read = [row for row in read_measurements(tmp_path / "rows.csv") if isinstance(row, Measurement)]
    assert len(read) == len(rows)
    return [(row.jobs[0], row.predict()) for row in read]


@pytest.mark.parametrize(
    ("notes", "rate"),
    [("A100 with 1600 Gbps node-node interconnect (RoCE)", 25), ("400 Gbps between nodes", 6.25), ("RoCE, 400 Gb/s per GPU", 50),
     ("IB 8x400G", 50), ("read at 90 Gbps", 50)],
)  # fmt: skip
def test_notes_give_the_network(tmp_path: Path, notes: str, rate: float) -> None:
    ((job, _),) = _plan(tmp_path, {**DENSE, "notes": notes})
    assert job.gpu.nic_gb_s == rate


def test_sharded_training_is_slower_on_a_slow_network(tmp_path: Path) -> None:
    fast, slow = _plan(tmp_path, *({**DENSE, "fsdp": "64", "notes": notes} for notes in ("FSDP2", "FSDP2; 100 Gbps between nodes")))
    assert slow[1].seconds > 1.1 * fast[1].seconds


def test_transformer_engine_under_fsdp_fuses_what_eager_modules_do_not(tmp_path: Path) -> None:
    eager, fused = _plan(tmp_path, *({**DENSE, "fsdp": "64", "notes": notes} for notes in ("PyTorch FSDP2", "PyTorch FSDP2, TE")))
    assert (fused[0].software.moved, fused[0].software.attention) == (STACKS["megatron"].moved, "fused")
    assert fused[1].seconds < 0.9 * eager[1].seconds


def test_a_fake_gate_sends_a_token_to_one_machine(tmp_path: Path) -> None:
    notes = ("DeepEP, force-balanced", "DeepEP, fake balanced gate")
    drawn, in_turn = _plan(tmp_path, *({**SPARSE, "notes": each} for each in notes))
    machines = {kernel.machines for block in in_turn[0].kinds[0][0] for kernel in block.forward if isinstance(kernel, Message)}
    assert machines == {1}
    assert in_turn[1].parts["messages of layers"] < 0.5 * drawn[1].parts["messages of layers"]


def test_adapters_on_all_products_cost_more_than_on_queries_alone(tmp_path: Path) -> None:
    """Megatron-Bridge's performance recipes adapt the projection to queries, keys and values only."""
    sources = ("somewhere", "Megatron-Bridge performance summary 26.06")
    everywhere, queries = _plan(tmp_path, *({**DENSE, "notes": "LoRA", "source": source} for source in sources))
    moved = [sum(kernel.bytes for kernel in block.forward if hasattr(kernel, "part")) for block in everywhere[0].kinds[0][0][1:2]]
    fewer = [sum(kernel.bytes for kernel in block.forward if hasattr(kernel, "part")) for block in queries[0].kinds[0][0][1:2]]
    assert moved[0] - fewer[0] == pytest.approx(2 * 4096 * (4 * 4096 + 4096 + 14336 + 4 * (2 * 4096 + 2 * 14336)), rel=1e-6)


def test_every_second_layer_is_recomputed(tmp_path: Path) -> None:
    choices = ("none", "selective layer (every 2nd)", "full")
    none, half, full = (row[1] for row in _plan(tmp_path, *({**DENSE, "recompute": choice} for choice in choices)))
    assert half.seconds == pytest.approx((none.seconds + full.seconds) / 2, rel=0.02)
    assert full.memory[0].activations < half.memory[0].activations < none.memory[0].activations


def test_gpt_3_has_dropout_except_in_nemo_2(tmp_path: Path) -> None:
    sources = ("NeMo performance summary 24.07", "NeMo performance summary 25.04")
    before, after = (row[1].seconds for row in _plan(tmp_path, *({**DENSE, "model": "gpt3-8B", "source": source} for source in sources)))
    assert after < before


def test_sharded_experts_take_memory(tmp_path: Path) -> None:
    ((job, prediction),) = _plan(tmp_path, {**SPARSE, "ep": "8", "fsdp": "64", "notes": "FSDP2, TE"})
    held = parameters_of_ranks(job)[0].experts
    assert prediction.memory[0].optimizer > 12 * held / 8
    assert prediction.memory[0].gradients > 4 * held / 8


def test_megatron_deepspeed_has_the_kernels_of_2021(tmp_path: Path) -> None:
    old = {**DENSE, "model": "gpt-176B", "notes": "Megatron-DeepSpeed", "tp": "4", "pp": "2", "recompute": "full (no SP)"}
    (job, _), (newer, _) = _plan(tmp_path, old, {**old, "notes": ""})
    assert job.software == STACKS["megatron-2021"] and not job.layout.sequence
    assert newer.hidden_bytes == 4 * job.hidden_bytes  # only a part is sent to the next stage


def test_modules_take_the_host_longer_in_fp8(tmp_path: Path) -> None:
    rows = ({**DENSE, "source": "NeMo performance summary 25.04", "precision": precision} for precision in ("bf16", "FP8"))
    bf16, fp8 = (row[1].stage_seconds[0][0].launch for row in _plan(tmp_path, *rows))
    assert fp8 > 1.3 * bf16


def test_fine_tuning_of_megatron_bridge_packs_short_documents(tmp_path: Path) -> None:
    source = "Megatron-Bridge performance summary 26.06"
    whole, packed = (row[1] for row in _plan(tmp_path, *({**DENSE, "source": source, "notes": notes} for notes in ("", "SFT"))))
    assert packed.parts["attention"] < 0.5 * whole.parts["attention"]


def test_a_run_under_jax_that_cannot_fit_otherwise_recomputes_everything(tmp_path: Path) -> None:
    jax = {**DENSE, "notes": "JAX", "recompute": "", "fsdp": "64"}
    small, large = _plan(tmp_path, {**jax, "gbs": "64"}, {**jax, "mbs": "32", "gbs": "2048"})
    kept, recomputed = (row[1].stage_seconds[0][1].product / row[1].stage_seconds[0][0].product for row in (small, large))
    assert kept < 2.7 < 2.8 < recomputed
