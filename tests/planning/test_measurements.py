"""Published measurements: any column may be missing or odd, and the errors on known rows must stay within bounds."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from megatron_mm.cli.main import main
from megatron_mm.planning.hardware import gpu_named
from megatron_mm.planning.measurements import Measurement, Skipped, read_measurements
from megatron_mm.planning.validation import report

ANCHORS = Path(__file__).parents[2] / "benchmarks" / "anchors" / "throughput.csv"
HELD_OUT = ANCHORS.with_name("held_out.csv")


def _rows() -> tuple[list[str], list[dict[str, str]]]:
    with ANCHORS.open(newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or ()), list(reader)


def _write(path: Path, names: list[str], rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_any_missing_cell_is_a_plan_or_a_reason(tmp_path: Path) -> None:
    names, rows = _rows()
    dense, sparse = rows[20], next(row for row in rows if row["experts"])
    changed = [{**row, name: value} for row in (dense, sparse) for name in names for value in ("", "unknown", "-1", "0", "1e99")]
    read = list(read_measurements(_write(tmp_path / "rows.csv", names, changed)))
    assert len(read) == len(changed)
    assert sum(isinstance(row, Measurement) for row in read) > len(read) * 0.6  # a -1, a 0 or 1e99 where it makes no sense costs the row
    assert all(row.reason for row in read if isinstance(row, Skipped))


def test_unknown_gpu_is_named(tmp_path: Path) -> None:
    names, rows = _rows()
    path = _write(tmp_path / "rows.csv", names, [{**rows[0], "gpu": "TPU v5p"}, rows[1]])
    lines = list(report(path))
    assert any("unknown GPU 'TPU v5p'" in line for line in lines)
    assert any(re.fullmatch(r"dense: median \d+\.\d% p90 \d+\.\d% of 1 rows", line) for line in lines)


def test_a_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="at least gpu, layers and hidden"):
        list(read_measurements(path))


def test_models_with_latent_attention_have_its_sizes(tmp_path: Path) -> None:
    """Moonlight-16B has 15.96B parameters; its row states neither the latents nor the shared experts."""
    names, rows = _rows()
    found = [row for row in rows if row["model"].startswith("moonlight")]
    jobs = [row.jobs[0] for row in read_measurements(_write(tmp_path / "rows.csv", names, found[:1])) if isinstance(row, Measurement)]
    blocks = [block for stage in jobs[0].kinds[0] for block in stage]
    parameters = sum(2 * block.parameters + 8 * block.expert_parameters for block in blocks)  # tensor 2, expert 8
    assert parameters == pytest.approx(15.96e9, rel=0.02)


@pytest.mark.parametrize(
    ("text", "name"),
    [("NVIDIA H100 80GB HBM3", "h100-sxm"), ("8xB200", "b200"), ("GB200 NVL72", "gb200"), ("A100-SXM4-40GB", "a100-40g"),
     ("H100_80GB", "h100-sxm"), ("DGX H100 (NVLink)", "h100-sxm"), ("H100 PCIe", "h100-pcie"), ("MI300X", "mi300x")],
)  # fmt: skip
def test_names_of_gpus(text: str, name: str) -> None:
    gpu = gpu_named(text)
    assert gpu is not None and gpu.name == name


def test_changes_of_a_row_have_the_right_sign(tmp_path: Path) -> None:
    """Recomputation and longer sequences increase the time, FP8 and more GPUs reduce it, in any row."""
    names, rows = _rows()
    for row in (rows[2], next(row for row in rows if row["model"] == "llama3-70B" and row["tp"] == "4" and row["gbs"] == "128")):
        plain = {**row, "recompute": "none", "precision": "bf16", "gpu": "H100"}
        changed = [
            {**plain, "precision": "FP8"},
            plain,
            {**plain, "recompute": "full"},
            {**plain, "seq": str(2 * int(row["seq"]))},
            {**plain, "n_gpus": str(2 * int(row["n_gpus"])), "dp": str(2 * int(row["dp"])), "grad_accum": ""},
        ]
        read = [r for r in read_measurements(_write(tmp_path / "rows.csv", names, changed)) if isinstance(r, Measurement)]
        fp8, base, full, longer, more = (r.predict().seconds for r in read)
        assert fp8 < base < full < 1.5 * base
        assert 1.9 * base < longer
        assert 0.5 * base < more < base


def test_more_of_anything_takes_longer_and_more_gpus_do_not(tmp_path: Path) -> None:
    """For layers, batch, GPUs and lengths (which may have a suffix K), of a dense and of a sparse model."""
    names, rows = _rows()
    for row in (next(row for row in rows if row["model"] == model) for model in ("llama3-70B", "mixtral-8x22B")):
        plain = {**row, "gbs": "512", "mbs": "1", "dp": "", "n_gpus": "256", "grad_accum": "", "vpp": "1", "recompute": "none"}
        for column, values in (
            ("layers", (48, 64, 80)),
            ("gbs", (256, 512, 1024)),
            ("n_gpus", (512, 256, 128)),
            ("seq", ("2K", "4k", "8K")),
        ):
            changed = [{**plain, column: str(value)} for value in values]
            read = [r for r in read_measurements(_write(tmp_path / "rows.csv", names, changed)) if isinstance(r, Measurement)]
            seconds = [r.predict().seconds for r in read]
            assert len(seconds) == 3 and seconds[0] < seconds[1] < seconds[2], (row["model"], column, seconds)


def test_adapters_cost_no_gradients_of_weights(tmp_path: Path) -> None:
    names, rows = _rows()
    row = {**next(row for row in rows if row["model"] == "llama3-70B"), "recompute": "none"}
    table = _write(tmp_path / "rows.csv", names, [row, {**row, "notes": "LoRA, rank 16"}])
    full, adapters = (r.predict() for r in read_measurements(table) if isinstance(r, Measurement))
    assert 0.6 < adapters.seconds / full.seconds < 1  # reading and writing for the adapters takes part of what gradients would
    assert adapters.memory[-1].optimizer == 0 and adapters.memory[-1].gradients < 0.5 * full.memory[-1].gradients
    # inputs of products are kept for the adapters' weights, in bf16 where a trained layer keeps them in FP8, and whole on each process
    assert adapters.memory[0].activations > full.memory[0].activations


def _errors(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, float]:
    main(["plan", "--measurements", str(path)])
    printed = capsys.readouterr().out
    return {kind: float(median) for kind, median in re.findall(r"^(dense|moe): median ([\d.]+)% p90", printed, flags=re.MULTILINE)}


def test_one_row_in_six_stays_within_the_band(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, rows = _rows()
    found = _errors(capsys, _write(tmp_path / "rows.csv", names, [row for row in rows if not row["pp"] or int(row["pp"]) <= 8][::6]))
    assert found["dense"] < 8
    assert found["moe"] < 12


@pytest.mark.slow
def test_known_rows_stay_within_the_published_band(capsys: pytest.CaptureFixture[str]) -> None:
    """The bounds are those of docs/planning.md, with room for changes of constants; they are not fitted to single rows."""
    found = _errors(capsys, ANCHORS)
    assert found["dense"] < 5
    assert found["moe"] < 8


@pytest.mark.slow
def test_held_out_rows_stay_within_the_published_band(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that no constant was fitted to: other releases, other GPUs, FP4, other layouts."""
    found = _errors(capsys, HELD_OUT)
    assert found["dense"] < 5
    assert found["moe"] < 10


def test_memory_peaks_where_activations_or_the_update_do(tmp_path: Path) -> None:
    """bf16 gradients are copied to float32 for the update, when activations are freed: beyond that peak, more recompute saves nothing."""
    names, rows = _rows()
    plain = next(row for row in rows if row["source"].startswith("Megatron-Bridge") and row["tp"] == "4")
    changed = [{**plain, "recompute": recompute} for recompute in ("none", "mlp", "full")]
    read = [row for row in read_measurements(_write(tmp_path / "rows.csv", names, changed)) if isinstance(row, Measurement)]
    none, mlp, full = ([use.allocated for use in row.predict().memory] for row in read)
    assert none[-1] > mlp[-1] >= full[-1]
    last = read[2].predict().memory[-1]
    assert full[-1] == last.state + last.update
