"""`convert verify` confirms equal models, and reports differences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.trained import Trained

from megatron_mm.cli.main import main
from megatron_mm.conversion.to_hf import Export, convert_to_hf
from megatron_mm.conversion.verify import report, verify


def test_a_checkpoint_and_its_export_are_the_same(trained: Trained, exported: Export) -> None:
    found = verify(trained.checkpoint, exported.path, prompt="a red circle")
    assert found.same_tensors and found.num_equal == exported.num_tensors
    assert found.logits == 0 and found.scale is not None and found.scale > 0.1


def test_what_differs_is_said(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = convert_to_hf(trained.checkpoint, tmp_path / "a", dtype="float32").path
    shutil.copytree(whole, tmp_path / "b")
    tensors = load_file(whole / "model.safetensors")
    name = "connector.output.weight"
    changed = tensors[name].clone()
    changed[0, 0] += 0.5
    rest = {key: value for key, value in tensors.items() if key != "connector.output.bias"}
    cut = {"language_model.norm.weight": tensors["language_model.norm.weight"][:-1].clone()}
    save_file({**rest, **cut, name: changed, "more": torch.ones(2)}, tmp_path / "b" / "model.safetensors")
    found = verify(whole, tmp_path / "b")
    assert (found.only_in_first, found.only_in_second) == (["connector.output.bias"], ["more"])
    assert [tensor.name for tensor in found.different] == [name] and found.different[0].largest == pytest.approx(0.5)
    assert "language_model.norm.weight: [128] and [127]" in "\n".join(report(found))
    with pytest.raises(SystemExit) as ended:
        main(["convert", "verify", str(whole), str(tmp_path / "b")])
    assert ended.value.code == 1 and "1 only in the second: more" in capsys.readouterr().out


def test_the_same_tensors_under_another_configuration(trained: Trained, tmp_path: Path) -> None:
    first = convert_to_hf(trained.checkpoint, tmp_path / "a", dtype="float32").path
    second = Path(shutil.copytree(first, tmp_path / "b"))
    config = json.loads((second / "config.json").read_text())
    text = config["text_config"]
    text["rope_theta"] = text["rope_parameters"]["rope_theta"] = 7.0
    (second / "config.json").write_text(json.dumps(config))
    assert verify(first, second).passed
    found = verify(first, second, prompt="a red circle left of the blue star")
    assert found.same_tensors and not found.passed and "compare the two config.json" in "\n".join(report(found))


def test_weights_of_another_type(trained: Trained, tmp_path: Path) -> None:
    """Rounded weights count as the same; larger changes do not."""
    rounded = convert_to_hf(trained.checkpoint, tmp_path / "b", dtype="bfloat16").path
    found = verify(trained.checkpoint, rounded, prompt="a red circle")
    assert found.passed and (found.num_equal, found.num_rounded) == (0, len(load_file(rounded / "model.safetensors")))
    tensors = load_file(rounded / "model.safetensors")
    tensors["language_model.norm.weight"] *= 1.1
    save_file(tensors, rounded / "model.safetensors", metadata={"format": "pt"})
    assert [tensor.name for tensor in verify(trained.checkpoint, rounded).different] == ["language_model.norm.weight"]


def test_what_transformers_does_not_load_is_a_failure(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both models are the same, so only loading them can fail."""
    folder = convert_to_hf(trained.checkpoint, tmp_path / "a", part="language", dtype="float32").path
    assert verify(folder, folder, prompt="a red circle").passed
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.extra.weight"] = torch.ones(2)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as ended:
        main(["convert", "verify", str(folder), str(folder), "--prompt", "a red circle"])
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "logits" not in out
    assert "does not load the first: model.norm.weight (missing)" in out
    assert "does not load the second: model.layers.0.extra.weight (unexpected)" in out


def test_modeling_code_that_is_not_there(exported: Export, tmp_path: Path) -> None:
    """For example that of an InternLM2 alone: exports do not include its authors' code."""
    folder = Path(shutil.copytree(exported.path, tmp_path / "a"))
    (folder / "modeling_mm1.py").unlink()
    assert verify(folder, exported.path).passed
    with pytest.raises(
        ValueError, match=r"a: its Hugging Face model needs modeling_mm1.py, which exports do not include \(its README.md names"
    ):
        verify(folder, exported.path, prompt="a red circle")


def test_an_export_is_ready_to_publish(exported: Export) -> None:
    card, config = (exported.path / "README.md").read_text(), json.loads((exported.path / "config.json").read_text())
    assert "AutoProcessor.from_pretrained" in card and "| steps | 1 of 400 |" in card and config["architectures"]
    assert "must state their license" in (exported.path / "LICENSE").read_text()
    index = json.loads((exported.path / "model.safetensors.index.json").read_text())
    assert {(exported.path / file).is_file() for file in index["weight_map"].values()} == {True}
