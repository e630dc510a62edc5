"""Output of `convert inspect` for our checkpoints and Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.hf_models import make_language, save
from support.trained import Trained

from megatron_mm.cli import main as cli
from megatron_mm.conversion.inspect import _label, inspect, norm
from megatron_mm.platform.files import checksum_of


def test_ours_with_recipe_step_and_norms(trained: Trained) -> None:
    lines = list(inspect(trained.checkpoint.parent.parent))
    assert "debug_mm1 (mm1), step 1, written by 1 processes, not split" in lines[0]
    count = sum(tensor.numel() for tensor in trained.weights.values())
    assert any(line.startswith(f"{count:,} parameters in {len(trained.weights)} tensors") and "of optimizer" in line for line in lines)
    name = "language.decoder.layers.1.self_attention.linear_qkv.weight"
    whole = list(inspect(trained.checkpoint, unfold=True))
    value = float(trained.weights[name].double().norm())
    assert f"linear_qkv.weight  [256, 128] float32  norm {value:.6g}" in [line.strip() for line in whole]
    folded = [line.strip() for line in lines if line.strip().startswith("linear_qkv.weight  3 x ")]
    values = [float(trained.weights[name.replace(".1.", f".{layer}.")].double().norm()) for layer in range(3)]
    assert folded == [f"linear_qkv.weight  3 x [256, 128] float32  norm {min(values):.6g} .. {max(values):.6g}"]


def test_experts_are_folded_apart(sparse: Trained) -> None:
    lines = [line.strip() for line in inspect(sparse.checkpoint, norms=False)]
    assert any(line.startswith("{0,2}  ") for line in lines) and any(line.startswith("1  ") for line in lines)
    assert "linear_fc1.weight  [4, 640, 128] float32" in lines
    experts = [line for line in (line.strip() for line in inspect(sparse.checkpoint)) if line.startswith("linear_fc1.weight  [4, ")]
    own = [t.double() for name, t in sparse.weights.items() if name.endswith("linear_fc1.weight") and ".local_experts." in name]
    assert experts == [f"linear_fc1.weight  [4, 640, 128] float32  norm {float(torch.stack(own).norm()):.6g}"]


def test_hugging_face_directories_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(make_language(), tmp_path / "llama", dtype=torch.bfloat16, max_shard_size="100KB")
    before = {path: checksum_of(path) for path in folder.iterdir()}
    cli.main(["convert", "inspect", str(folder), "--no-norms"])
    out = capsys.readouterr().out
    assert "Hugging Face, LlamaForCausalLM, llama" in out and "q_proj.weight  4 x [128, 64] bfloat16\n" in out and "norm " not in out
    assert before == {path: checksum_of(path) for path in folder.iterdir()}
    save_file({"a.weight": torch.tensor([3.0, 4.0]), "b": torch.tensor([float("nan")])}, tmp_path / "x.safetensors")
    lines = list(inspect(tmp_path / "x.safetensors"))
    assert "a.weight  [2] float32  norm 5" in lines
    assert lines[-1] == "NOT FINITE: 1 tensors hold infinities or NaN: b"


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither a complete checkpoint nor a run directory"):
        list(inspect(tmp_path))


def test_large_norms_are_exact() -> None:
    assert norm([torch.full((100,), 3e38), torch.full((1, 44), 3e38)]).value == pytest.approx(12 * float(torch.tensor(3e38)))


@pytest.mark.parametrize(
    ("numbers", "label"), [([0], "0"), ([0, 1], "{0,1}"), ([0, 1, 2], "{0..2}"), ([1, 3, 5, 7], "{1,3..7}"), ([0, 1, 5], "{0,1,5}")]
)
def test_labels_of_layers(numbers: list[int], label: str) -> None:
    assert _label(numbers) == label
