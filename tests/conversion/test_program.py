"""The command line, from Hugging Face weights through training back to Hugging Face weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.converted import weights
from support.hf_models import make_language, make_vision, save

from megatron_mm.cli import main as cli

PROGRAM = [sys.executable, "-W", "ignore", str(Path(__file__).parents[2] / "tools" / "convert_checkpoint.py")]
SHAPES = {
    "decoder.num-layers": 4, "decoder.hidden-size": 64, "decoder.ffn-hidden-size": 96, "decoder.num-attention-heads": 8,
    "decoder.num-query-groups": 4, "decoder.head-dim": 16, "decoder.rotary-base": 500.0,
    "vision.hidden-size": 32, "vision.ffn-hidden-size": 64,
}  # fmt: skip
MODEL = [word for name, value in SHAPES.items() for word in (f"--model.{name}", str(value))] + ["--model.decoder.no-tied-embeddings"]


def run(*words: object) -> str:
    done = subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_there_training_and_back(demo_data: Path, tmp_path: Path) -> None:
    """With a tiny learning rate the exported decoder is nearly the imported one, which shows that the imported one was trained."""
    language, vision = save(make_language(), tmp_path / "language"), save(make_vision(), tmp_path / "vision")
    options = ["--data.tokenizer", demo_data / "tokenizer.model", *MODEL]
    out = run("from-hf", tmp_path / "imported", "--recipe", "debug_mm1", "--language", language, "--vision", vision, *options)
    assert "parameters read: language (llama)" in out and "parameters with initial values: connector" in out
    assert f"megatron-mm train debug_mm1 --run-dir RUN_DIR --data.path DATA --init-from {tmp_path / 'imported'}" in out
    train = ["train", "debug_mm1", "--run-dir", tmp_path / "run", "--data.path", demo_data, "--init-from", tmp_path / "imported", *MODEL]
    quick = ["--train.steps", 1, "--train.global-batch-size", 4, "--eval.interval", 0, "--monitor.wandb", "disabled"]
    gentle = ["--optimizer.peak-lr", 1e-6, "--optimizer.min-lr", 1e-6, "--optimizer.warmup-steps", 0]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_mm", *map(str, [*train, *quick, *gentle])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    run("to-hf", tmp_path / "run", tmp_path / "back", "--part", "language", "--vocab-size", 512)
    before, after = weights(language), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    largest = {name: float((after[name][: tensor.shape[0]] - tensor).abs().max()) for name, tensor in before.items()}
    assert 0 < max(largest.values()) < 1e-5
    tree = run("inspect", tmp_path / "run", "--no-norms")
    assert "debug_mm1 (mm1), step 1, written by 1 processes" in tree
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_from_hf_says_what_it_wants(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["convert", "from-hf", "--help"])
    out = capsys.readouterr().out
    assert "usage: megatron-mm convert from-hf OUT --recipe RECIPE" in out and "a decoder: Llama, Vicuna, Mistral" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["from-hf"], "missing OUT, --recipe", marks=pytest.mark.slow),
        pytest.param(["from-hf", "x", "--recipe", "none_such"], "unknown recipe 'none_such'", marks=pytest.mark.slow),
        pytest.param(
            ["from-hf", "x", "--recipe", "debug_mm1"], "use --whole DIR, or --language DIR, --vision DIR or both", marks=pytest.mark.slow
        ),
        (["from-hf", "x", "--recipe", "debug_mm1", "--language", "/nowhere"], "/nowhere does not exist"),
        (["inspect", "/nowhere"], "/nowhere is neither a complete checkpoint nor a run directory"),
        pytest.param(
            ["to-hf", "/nowhere", "x", "--part", "language"],
            "/nowhere is neither a complete checkpoint nor a run directory",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_reader_may_leave_before_the_end(tmp_path: Path) -> None:
    """As in `inspect ... | head -1`."""
    folder = save(make_language(), tmp_path / "llama")
    command = [*PROGRAM, "inspect", str(folder), "--unfold"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()
        assert program.wait(timeout=240) == 0 and "Traceback" not in program.stderr.read()
