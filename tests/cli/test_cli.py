"""The command line: a user's mistake yields one line that names the thing, the value and the fix, and exit code 2."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import Fails

from megatron_mm.cli import main as cli
from megatron_mm.cli.command import Group
from megatron_mm.training.checkpoint import find_checkpoint

PROGRAM = [sys.executable, "-m", "megatron_mm"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mm1_99b"], "unknown recipe 'mm1_99b': did you mean mm1_7b? choose one of debug_mm1, "),
        (["mm1_3x"], "unknown recipe 'mm1_3x': did you mean mm1_3b? choose one of debug_mm1, "),
        (["recipes.py"], "recipes.py is a file: name a function in it, recipes.py:FUNCTION"),
        (["nowhere.py:recipe"], "nowhere.py: correct the path"),
        (["debug_mm1", "--train.stepz", "3"], "error: unknown option --train.stepz: did you mean --train.steps?"),
        (["debug_mm1", "--steps=3"], "error: unknown option --steps: did you mean --train.steps?"),
        (["debug_mm1", "--zzz"], "error: unknown option --zzz: see megatron-mm train --help"),
        (["debug_mm1", "--train.steps", "many"], "error: --train.steps is 'many', but takes an integer"),
        (
            ["debug_mm1", "--train.precision", "fp7"],
            "error: --train.precision is 'fp7', but takes one of fp32, bf16, fp8: did you mean fp8?",
        ),
        (["debug_mm1", "--train.steps", "0"], "error: train.steps is 0, but must be positive"),
        (["debug_mm1", "--parallel.virtual", "2"], "error: parallel.virtual is 2, but interleaving needs parallel.pipeline > 1"),
        (["debug_mm1"], "no run directory given: add --run-dir DIR"),
        (["--run-dir", "runs/a", "--data.path", "data"], "error: no recipe given before --data.path: the name of a recipe comes first"),
        (["--dry-run", "mm1_3x"], "unknown recipe 'mm1_3x': did you mean mm1_3b? choose one of debug_mm1, "),
        ([], "missing RECIPE: see megatron-mm train --help"),
        (["debug_mm1", "more"], "unexpected argument 'more': see megatron-mm train --help"),
        (["debug_mm1", "--recipe", "mm1_3b"], "unknown option --recipe: "),
        (["debug_mm1", "--data.mixture", "pairs"], "--data.mixture takes NAME=NUMBER, for example pairs=0.5, not 'pairs'"),
    ],
)
def test_mistakes_on_the_command_line(fails: Fails, options: list[str], message: str) -> None:
    assert message in fails("train", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--parallel.tensor", "2"],
            "1 processes cannot be divided into groups of tensor 2 x pipeline 1 = 2: start a multiple of 2 processes",
        ),
        (["--parallel.virtual", "2"], "parallel.virtual is 2, but interleaving needs parallel.pipeline > 1"),
        (["--train.global-batch-size", "10"], "train.global_batch_size 10 is not a multiple of train.micro_batch_size 4"),
        (["--data.path", "/nowhere"], "error: data.path /nowhere is not a directory: use --data.path DIR"),
        (["--data.path", "nowhere"], f"error: data.path nowhere is not a directory in {Path.cwd()}: use --data.path DIR"),
        (["--data.path", "/usr"], "error: data.path /usr is not a data set, because it has no folder 'train': use --data.path DIR"),
        (["--extra-hooks", "json:JSONDecoder"], "extra_hooks names json:JSONDecoder, which is not a hook: derive the class from"),
        (["--data.preprocessors", "builtins:print"], "the preprocessor builtins:print returns None for source "),
        (["--data.tokenizer", "/nowhere.model"], "tokenizer /nowhere.model does not exist: give another file as --data.tokenizer"),
        (
            ["--data.mixture", "video=1"],
            "lacks the sources ['video'] of data.mixture; it has ['conversations', 'interleaved', 'pairs', 'tasks', 'text']",
        ),
        (
            ["--model.decoder.vocab-size", "64"],
            "but model.decoder.vocab_size is 64: raise it (--model.decoder.vocab-size 512), or use a smaller",
        ),
        (["--train.precision", "fp8"], "train.precision is fp8, which needs a GPU with Transformer Engine: use --train.precision bf16"),
        (["--train.layers", "te"], "install it or use --train.layers torch"),
    ],
)
def test_mistakes_that_the_data_or_the_machine_shows(
    fails: Fails, demo_data: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in fails("train", "debug_mm1", "--run-dir", tmp_path / "run", "--data.path", demo_data, *options, prints=True)


def test_heads_that_tensor_parallelism_does_not_divide(
    fails: Fails, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    command = ("train", "debug_mm1", "--run-dir", tmp_path, "--data.path", demo_data, "--parallel.tensor", "8")
    assert "parallel.tensor 8 does not divide the decoder's 4 attention heads: use one of [1, 2, 4]" in fails(*command)


def test_empty_and_broken_data(fails: Fails, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "contains no .tar or .jsonl shards" in fails("prepare", "index", tmp_path / "empty")
    data = tmp_path / "data"
    (data / "train" / "pairs").mkdir(parents=True)
    shutil.copyfile(demo_data / "tokenizer.model", data / "tokenizer.model")
    tar = (demo_data / "train" / "pairs" / "00000.tar").read_bytes()
    (data / "train" / "pairs" / "00000.tar").write_bytes(tar[: len(tar) // 2])
    cli.main(["prepare", "index", str(data)])
    out = capsys.readouterr().out
    assert "broken shard: 1" in out and "train/pairs" in out
    assert f"megatron-mm train RECIPE --run-dir RUN --data.path {data} --data.mixture pairs=1" in out


@pytest.mark.parametrize(("out", "indexed"), [("train/mine", "."), ("heldout/mine", "."), ("some where", "some where")])
def test_converting_says_which_folder_to_index(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, indexed: str) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a red circle"}\n')
    cli.main(["prepare", "text", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / out), "--workers", "1"])
    command = f"megatron-mm prepare index {shlex.quote(str(tmp_path / indexed))}"
    said = capsys.readouterr().out.splitlines()
    assert f"next, index it: {command}" in said
    assert (said[-1] == "runs read data sets: to train on it, first move it into one, to DATA/train/some where, and index DATA") == (
        out == "some where"
    )


def test_a_checkpoint_of_another_model_and_export_errors(fails: Fails, demo_data: Path, tmp_path: Path) -> None:
    run = ["train", "debug_mm1", "--run-dir", tmp_path / "run", "--data.path", demo_data]
    quick = ["--train.steps", 1, "--train.global-batch-size", 4, "--eval.interval", 0, "--monitor.wandb", "disabled"]
    done = subprocess.run([*PROGRAM, *map(str, [*run, *quick])], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    error = fails(*run, *quick[:2], "--model.decoder.ffn-hidden-size", 256)
    assert "holds a different model (debug_mm1): model.decoder.ffn_hidden_size is 320 there and 256 here" in error
    assert "is neither a complete checkpoint nor a run directory" in fails("eval", tmp_path / "nothing")
    checkpoint = find_checkpoint(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "exists and is not an empty directory" in fails("convert", "to-hf", checkpoint, tmp_path / "full")
    assert "shard_size is '5 parrots'" in fails("convert", "to-hf", checkpoint, tmp_path / "new", "--shard-size", "5 parrots")
    assert "data.path /nowhere is not a directory" in fails("eval", checkpoint, "--data.path", "/nowhere")
    advice = "has no folder heldout: put shards that training does not use into DATA/heldout/NAME"
    assert advice in fails("eval", checkpoint, "--data.path", tmp_path / "full")


def test_torchrun_says_a_mistake_once_and_does_not_hang(demo_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "megatron_mm", "train"]
    command += ["debug_mm1", "--run-dir", str(tmp_path / "run"), "--data.path", str(demo_data), "--parallel.tensor", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert done.stderr.count("megatron-mm: error:") == 1
    assert "3 processes cannot be divided into groups of tensor 2" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "no command given: choose one of train, prepare, convert, eval, "),
        (["trian"], "unknown command 'trian': did you mean train? choose one of train, prepare, convert, eval, "),
        (["trian"], ": did you mean train?"),
        (["prepare"], "no command given: choose one of demo, index, "),
        (["prepare", "demo"], "missing --out: see megatron-mm prepare demo --help"),
        (["prepare", "demo", "--out", "x", "--samples", "few"], "--samples: 'few' is not an integer: see megatron-mm prepare demo --help"),
        (["prepare", "index", "x", "--workers", "0"], "--workers: 0 is too small: give 1 or more"),
        (["prepare", "text", "x", "--out", "y", "--workers", "-3"], "--workers: -3 is too small"),
        (["prepare", "text", "x", "--out", "y", "--shard-megabytes", "0"], "--shard-megabytes: 0 is too small"),
        (["prepare", "demo", "--out", "x", "--smaples", "3"], "unknown option --smaples: did you mean --samples?"),
        (
            ["convert", "to-hf", "a", "b", "--dtype", "flot16"],
            "--dtype: unknown 'flot16': did you mean float16? choose one of auto, float32, bfloat16, float16: see",
        ),
        (["convert", "from-hf", "x"], "missing --recipe: see megatron-mm convert from-hf --help"),
        (["prepare", "store", "x", "/y"], "'/y' is not an address: give one such as s3://bucket/train/pairs"),
        (
            ["prepare", "demo", "--out", "s3://b/x"],
            "--out: s3://b/x is an address, but this command writes only to file systems: give a folder",
        ),
        (["report", "x", "--out", "gs://b/x.html"], "--out: gs://b/x.html is an address, but"),
        (["convert", "to-hf", "x", "s3://b/x"], "s3://b/x is an address, but"),
        (
            ["train", "debug_mm1", "--run-dir", "s3://b/x"],
            "--run-dir: s3://b/x is an address, but a run writes only to file systems: give a ",
        ),
        (["doctor", "more"], "unexpected argument 'more': see megatron-mm doctor --help"),
    ],
)
def test_mistakes_in_other_commands(fails: Fails, command: list[str], message: str) -> None:
    assert message in fails(*command, prints=True)


def test_a_file_that_cannot_be_written_is_named(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = fails("prepare", "demo", "--out", tmp_path / "file" / "demo")
    assert str(tmp_path / "file") in said and "Errno" not in said
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "report.html").symlink_to(tmp_path / "missing" / "report.html")
    said = fails("report", tmp_path)
    assert said == f"megatron-mm: error: {tmp_path / 'report.html'}: No such file or directory: choose another place with --out FILE"


def _commands(group: Group, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command and group."""
    yield names
    for name, command in group.commands.items():
        if isinstance(command, Group):
            yield from _commands(command, (*names, name))
        else:
            yield (*names, name)


@pytest.mark.parametrize("command", _commands(cli.COMMANDS), ids=" ".join)
def test_help_has_the_same_shape_everywhere(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*command, "--help"])
    usage, empty, about, *rest = capsys.readouterr().out.splitlines()
    assert usage.startswith(f"usage: {' '.join(['megatron-mm', *command])} ") and not empty and about
    assert any(line in ("options:", "commands:") for line in rest)


def test_help_imports_neither_torch_nor_megatron_core() -> None:
    """This keeps it under a second."""
    heavy = "('torch', 'megatron.core', 'transformers')"
    commands = [list(command) for command in _commands(cli.COMMANDS)] + [["train", "mm1_30b"]]
    program = (
        "import sys\nfrom megatron_mm.cli.main import main\n"
        f"for command in {commands!r}:\n    main([*command, '--help'])\n"
        f"    assert not [name for name in {heavy} if name in sys.modules], command\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_train_help_lists_every_field_with_the_recipes_value(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "mm1_30b", "--help"])
    out = capsys.readouterr().out
    for option in ("--run-dir", "--dry-run", "--parallel.tensor", "--train.schedule-steps", "--optimizer.peak-lr", "--data.path"):
        assert f"  {option} " in out
    assert "default: 17920" in " ".join(out.split())
    assert "--checkpoint.asynchronous, --checkpoint.no-asynchronous" in out


def test_options_may_have_underscores_and_an_equals_sign_and_the_last_counts(demo_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--train.policy",
        "all",
        "--train.global_batch_size=8",
        "--data.path",
        "/first",
        "--data.path",
        str(demo_data),
        "--checkpoint.no-asynchronous",
    ]
    cli.main(["train", "debug_mm1", "--dry-run", *given])
    out = capsys.readouterr().out
    config = json.loads(out[: out.index("\n}") + 2])
    assert config["train"]["global_batch_size"] == 8 and config["data"]["path"] == str(demo_data)
    assert config["checkpoint"]["asynchronous"] is False


def test_dry_run_shows_configuration_stages_and_plan(demo_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "debug_mm1", "--data.path", str(demo_data), "--parallel.pipeline", "2", "--parallel.tensor", "2", "--dry-run"])
    out = capsys.readouterr().out
    config = json.loads(out[: out.index("\n}") + 2])
    assert config["parallel"]["tensor"] == 2 and config["model"]["family"] == "mm1"
    assert "4 processes = tensor 2 x pipeline 2 x data 1; 4 micro-batches of 4 sequences each a step" in out
    stages = [line.split() for line in out.splitlines() if line.strip()[:2] in ("0 ", "1 ")]
    assert [stage[3] for stage in stages] == ["2", "2"]
    assert "step 1:" in out and "step 2:" in out and "% full" in out and "interleaved: " in out


def test_dry_run_of_the_30b_needs_neither_data_nor_processes(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "mm1_30b", "--dry-run", "--data.path", "/nowhere"])
    out = capsys.readouterr().out
    assert "8 processes = tensor 4 x pipeline 2 x data 1" in out
    assert "vision 631,371,520, connector 69,599,040" in out
    assert "no plan: data path /nowhere does not exist" in out


def test_doctor_says_what_is_here_and_what_stands_in(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])
    out = capsys.readouterr().out
    for name in ("torch", "NCCL", "Transformer Engine", "apex", "DALI", "wandb", "megatron-core"):
        assert name in out
