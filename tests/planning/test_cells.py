"""Cells of tables of measurements: every usual spelling is read, and anything else is a reason why the row is not predicted."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from megatron_mm.planning.cells import UnusableRow, count, flag, measured, precision_of
from megatron_mm.planning.measurements import Measurement, Skipped, read_measurements
from megatron_mm.planning.validation import report

ROW = {
    "id": "a",
    "model": "llama3-8B",
    "layers": "32",
    "hidden": "4096",
    "heads": "32",
    "kv_heads": "8",
    "ffn": "14336",
    "vocab": "128256",
    "gpu": "H100",
    "n_gpus": "64",
    "tp": "4",
    "seq": "8192",
    "gbs": "128",
    "mbs": "1",
    "precision": "bf16",
    "recompute": "none",
    "step_time_s": "4.2",
}


def _read(tmp_path: Path, *rows: dict[str, str], delimiter: str = ",") -> list[Measurement | Skipped]:
    names = list(dict.fromkeys(name for row in rows for name in {**ROW, **row}))
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**ROW, **row} for row in rows)
    return list(read_measurements(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("tp", "4", 4),
        ("tp", "~4", 4),
        ("tp", "TP4", 4),
        ("tp", "tp=4", 4),
        ("tp", "4.0", 4),
        ("tp", "4 (per node)", 4),
        ("n_gpus", "64 GPUs", 64),
        ("n_gpus", "8x8", 64),
        ("n_gpus", "8x H100-80GB", 8),
        ("n_gpus", "8 x 80GB A100", 8),
        ("n_gpus", "1,024", 1024),
        ("n_gpus", "1 024", 1024),
        ("n_gpus", "1_024", 1024),
        ("n_gpus", "about 64", 64),
        ("seq", "4K", 4096),
        ("seq", "8k tokens", 8192),
        ("vocab", "128K", 128_000),
        ("topk", "top-2", 2),
        ("experts", "8x22B", 8),
        ("experts", "22B", 22),
        ("gbs", "2048 sequences", 2048),
        ("gbs", "2048 (8M tokens)", 2048),
        ("hidden", "1.2288e4", 12288),
        ("vpp", "0", None),
        ("ep", "none", None),
        ("ep", "off", None),
        ("tp", "n/a", None),
        ("tp", "-", None),
        ("tp", "?", None),
        ("tp", "unknown", None),
        ("tp", "not reported", None),
        ("mbs", "auto", None),
        ("tp", "nan", None),
    ],
)
def test_whole_numbers_as_people_write_them(name: str, text: str, value: int | None) -> None:
    assert count({name: text}, name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tp", "four"),
        ("tp", "-2"),
        ("tp", "0"),
        ("tp", "2.5"),
        ("tp", "4-8"),
        ("tp", "4 or 8"),
        ("heads", "32/8"),
        ("tp", "1e99"),
        ("tp", "50%"),
        ("n_gpus", "eight"),
        ("n_gpus", "16 nodes"),
        ("gbs", "4M tokens"),
        ("layers", "\u221280"),
        ("pp", "1,5"),
        ("seq", "4K-128K"),
    ],
)
def test_other_cells_are_named_with_what_they_may_be(name: str, text: str) -> None:
    with pytest.raises(UnusableRow, match=f"^{name} is .*, but must be a whole number, [01] to "):
        count({name: text}, name)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("step_time_s", "1234 ms", 1.234),
        ("step_time_s", "1.2 s/it", 1.2),
        ("step_time_s", "1.2 sec. per step", 1.2),
        ("step_time_s", "~1,024.5", 1024.5),
        ("step_time_s", "1,5", 1.5),
        ("step_time_s", "1.2 \u00b1 0.1 s", 1.2),
        ("step_time_s", "1.2 (median of 5)", 1.2),
        ("step_time_s", "2 min", 120.0),
        ("step_time_s", "n/a", None),
        ("tokens_per_s_per_gpu", "12.5k tok/s/GPU", 12500.0),
        ("tokens_per_s_per_gpu", "6,798 tokens/s", 6798.0),
        ("tflops_causal_half", "412 TFLOP/s/GPU", 412.0),
        ("tflops_causal_half", "0.4 PFLOPS", 400.0),
        ("mem_gib", "64 GiB", 64.0),
        ("mem_gib", "65536 MiB", 64.0),
    ],
)
def test_measured_values_with_their_units(name: str, text: str, value: float | None) -> None:
    assert measured({name: text}, name) == (value if value is None else pytest.approx(value))


@pytest.mark.parametrize("text", ["-5", "0", "1:23", "2 it/s", "12 parsecs", "fast", "1e999", "1-2"])
def test_step_times_that_are_none(text: str) -> None:
    with pytest.raises(
        UnusableRow, match=f"^step_time_s is '{text}', but must be a positive number of seconds, or a number with s, ms or min"
    ):
        measured({"step_time_s": text}, "step_time_s")


def test_words() -> None:
    for text in ("bf16", "BF-16", "amp_bf16/DEFAULT", "FP8(linears)", "float8 rowwise", "FP 8", "NVFP4", "16-mixed", "half", ""):
        precision_of({"precision": text})
    assert precision_of({"precision": "FP-8"}) == "fp8"
    assert [flag({"gated_mlp": text}, "gated_mlp") for text in ("1", "False", "SwiGLU", "0.0", "")] == [True, False, True, False, None]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tp": "four"}, "tp is 'four', but must be a whole number"),
        ({"precision": "int3"}, "precision is 'int3', but must be a format such as bf16"),
        ({"recompute": "maybe"}, "recompute is 'maybe', but must be none, full, selective or modules"),
        ({"heads": "7"}, "heads is 7, but must divide hidden 4096"),
        ({"kv_heads": "5"}, "kv_heads is 5, but must divide heads 32"),
        ({"n_gpus": "eight"}, "n_gpus is 'eight', but must be a whole number"),
        ({"n_gpus": "7"}, "n_gpus is 7, but must be a multiple of tp 4 x pp 1 x cp 1 = 4"),
        ({"dp": "5"}, "dp is 5, but 64 GPUs / (tp 4 x pp 1 x cp 1 = 4) is 16"),
        ({"gbs": "100"}, "gbs is 100, but must be a multiple of the data-parallel size 16"),
        ({"experts": "8", "topk": "9", "moe_ffn": "4096"}, "topk is 9, but there are 8 experts"),
        ({"experts": "8", "topk": "2", "moe_ffn": "4096", "ep": "3"}, "ep is 3, but must divide experts 8"),
        ({"fsdp": "perhaps"}, "fsdp is 'perhaps', but must be a number of GPUs or a strategy"),
        ({"gated_mlp": "perhaps"}, "gated_mlp is 'perhaps', but must be 1 or 0"),
        ({"step_time_s": "-5"}, "step_time_s is '-5', but must be a positive number of seconds"),
        ({"mem_gib": "OOM"}, "mem_gib is 'OOM', but must be a positive number"),
    ],
)
def test_a_row_with_a_wrong_cell_is_not_predicted(tmp_path: Path, changed: dict[str, str], reason: str) -> None:
    (row,) = _read(tmp_path, changed)
    assert isinstance(row, Skipped) and row.reason.startswith(reason)


def test_cells_that_are_not_used_never_cost_a_row(tmp_path: Path) -> None:
    odd = ("notes", "verified", "ref", "params_B", "tflops_reported", "mfu_reported_pct", "step_time_kind", "tokens_per_s_per_gpu")
    rows = _read(tmp_path, {}, *({name: text} for name in odd for text in ("perhaps", "-1", "0", "1e99", "50%")))
    assert all(isinstance(row, Measurement) and row.step_seconds == 4.2 for row in rows)


def test_spellings_do_not_change_the_prediction(tmp_path: Path) -> None:
    spelled = {"n_gpus": "8x8", "tp": "TP4", "seq": "8K", "precision": "BF-16", "recompute": "None", "step_time_s": "4200 ms", "dp": "16"}
    plain, other = (row for row in _read(tmp_path, {}, spelled) if isinstance(row, Measurement))
    assert (plain.jobs, plain.step_seconds) == (other.jobs, other.step_seconds)


@pytest.mark.parametrize(
    ("name", "text", "same"),
    [
        ("recompute", "no recomputation", "none"),
        ("recompute", "off", "none"),
        ("recompute", "activation checkpointing", "full"),
        ("recompute", "Uniform, 1 layer", "full"),
        ("recompute", "core attention", "core_attn"),
        ("recompute", "selective: moe act, layer norm", "moe_act+layernorm"),
        ("gated_mlp", "SwiGLU (gated)", "1"),
        ("gated_mlp", "squared ReLU", "0"),
        ("fsdp", "ZeRO-2", "SHARD_GRAD_OP"),
        ("fsdp", "NO_SHARD", ""),
        ("precision", "bf16-mixed", "bf16"),
    ],
)
def test_words_with_the_same_meaning(tmp_path: Path, name: str, text: str, same: str) -> None:
    one, other = (row for row in _read(tmp_path, {name: text}, {name: same}) if isinstance(row, Measurement))
    assert one.jobs == other.jobs


def test_without_a_number_of_gpus_the_degrees_give_it(tmp_path: Path) -> None:
    (row,) = _read(tmp_path, {"n_gpus": "", "dp": "16"})
    assert isinstance(row, Measurement) and row.jobs[0].layout.gpus == 64 and "n_gpus" in row.assumed


def test_a_row_without_measured_values_is_named(tmp_path: Path) -> None:
    _read(tmp_path, {"step_time_s": "nan"}, {"id": "b"})
    lines = list(report(tmp_path / "rows.csv"))
    assert any("step_time_s, tokens_per_s_per_gpu, tflops_causal_half or mem_gib to compare with" in line for line in lines[-2:])


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_separators(tmp_path: Path, delimiter: str) -> None:
    (row,) = _read(tmp_path, {"step_time_s": "4,125" if delimiter == ";" else "4.125"}, delimiter=delimiter)
    assert isinstance(row, Measurement) and row.step_seconds == 4.125
