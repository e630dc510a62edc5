"""The claims of docs/security.md."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm.cli.main import PrintableFormatter
from megatron_mm.config import CheckpointConfig
from megatron_mm.families.recipes import RECIPES, get_recipe
from megatron_mm.families.serialize import load_experiment, to_dict
from megatron_mm.run.start import check_no_secrets
from megatron_mm.training.checkpoint.copies import Copies
from megatron_mm.training.checkpoint.memory import _check_private

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "conversion/reader.py": {"pickle.loads"},
    "training/safe_pickle.py": {"pickle.loads"},
    "platform/part_reader.py": {"pickle.loads"},
    "conversion/verify.py": {"trust_remote_code"},
}
"""Pickles that `training.safe_pickle` has checked, and the model's own code, which `convert verify --prompt` runs on request."""


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", sorted((ROOT / "megatron_mm").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_from_outside_is_unpickled_or_run(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(ROOT / "megatron_mm").as_posix(), set())
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name, given = _called(node), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load":
            assert given.get("weights_only") == "True", f"line {node.lineno}"
        if name in ("np.load", "numpy.load"):
            assert given.get("allow_pickle") == "False", f"line {node.lineno}"
        forbidden = ("pickle.load", "pickle.loads", "eval", "exec", "os.system", "yaml.load", "marshal.loads", "shelve.open")
        assert name not in forbidden or name in allowed, f"line {node.lineno}: {name}"
        assert given.get("shell") != "True", f"line {node.lineno}"
        assert given.get("trust_remote_code") != "True" or "trust_remote_code" in allowed, f"line {node.lineno}"


SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-a-store",
    "HF_TOKEN": "hf_" + "x" * 30,
}


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_and_the_run_is_private(demo_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = ["--train.steps", "2", "--eval.interval", "0", "--train.watchdog", "300", "--monitor.wandb", "offline"]
    command = [
        sys.executable,
        "-m",
        "megatron_mm",
        "train",
        "debug_mm1",
        "--run-dir",
        str(run_dir),
        "--data.path",
        str(demo_data),
        *options,
    ]
    before = os.umask(0)
    try:
        done = subprocess.run(command, env={**os.environ, **SECRETS}, capture_output=True, timeout=240, check=False)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr.decode()
    assert run_dir.stat().st_mode & 0o777 == 0o700
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), path
    assert not any(secret.encode() in done.stdout + done.stderr for secret in SECRETS.values())


def test_a_password_in_a_url_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.copy_to contains a password"):
        CheckpointConfig(copy_to="s3://key:secret@bucket/run")
    CheckpointConfig(copy_to="s3://bucket/run")


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        ("https://user:pass@host/data", True),
        ("https://host/data?X-Amz-Signature=0123", True),
        ("s3://bucket/AKIA0123456789ABCDEF", True),
        ("hf_" + "x" * 34, True),
        ("s3://bucket/data", False),
        ("/data/keys=1/token", False),
    ],
)
def test_no_option_may_hold_a_credential(value: str, refused: bool) -> None:
    recipe = get_recipe("debug_mm1")
    experiment = replace(recipe, monitor=replace(recipe.monitor, run_name=value))
    if not refused:
        check_no_secrets(experiment)
        return
    with pytest.raises(ValueError, match=r"^monitor.run_name seems to contain a password") as error:
        check_no_secrets(experiment)
    assert value not in str(error.value)


def test_no_recipe_looks_as_if_it_held_a_credential() -> None:
    for name in RECIPES:
        check_no_secrets(get_recipe(name))


def test_the_log_has_no_commands_for_a_terminal() -> None:
    record = logging.LogRecord("megatron_mm", logging.WARNING, "", 0, "blank image in %s", ("a\x1b]0;owned\x07\x9b\n\tä",), None)
    assert PrintableFormatter("%(message)s").format(record) == "blank image in a?]0;owned??\n\tä"


_LISTENING = """
import glob, json, os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0:
    mine = set()
    for pid in (os.getpid(), os.getppid()):
        for link in glob.glob(f"/proc/{pid}/fd/*"):
            try:
                mine.add(os.readlink(link))
            except OSError:
                pass
    rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
    print(json.dumps([row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]), flush=True)
dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("meeting", [["--standalone"], ["--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", "--master-port=0"]])
def test_the_launcher_listens_on_the_address_where_processes_meet_alone(meeting: list[str], tmp_path: Path) -> None:
    script = tmp_path / "listening.py"
    script.write_text(_LISTENING)
    if "--master-port=0" in meeting:
        meeting = [*meeting[:-1], f"--master-port={20000 + os.getpid() % 10000}"]
    command = [sys.executable, "-m", "megatron_mm.run.launcher", "--nproc-per-node=2", *meeting, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, cwd=ROOT, env=environment)
    addresses = json.loads(done.stdout)
    assert addresses and all(address.startswith("0100007F:") for address in addresses), addresses


# ------------------------------------------------------------------------------------------------- what a checkpoint may name


def _checkpoint(folder: Path, **values: object) -> Path:
    """Write the configuration of a checkpoint in a run directory; return its path."""
    path = folder / "checkpoints" / "step_00000001" / "experiment.json"
    path.parent.mkdir(parents=True)
    experiment = to_dict(get_recipe("debug_mm1"))
    data = {**experiment["data"], "preprocessors": values.pop("preprocessors", [])}
    path.write_text(json.dumps({**experiment, **values, "data": data}))
    return path


def _code(path: Path) -> Path:
    """Write Python code that creates a file when it runs; return its path."""
    path.write_text(f"from pathlib import Path\nPath({str(path.with_suffix('.ran'))!r}).touch()\n")
    return path


@pytest.mark.parametrize("field", ["extensions", "preprocessors"])
@pytest.mark.parametrize("where", ["in the checkpoint", "in the run directory", "relative", "of everybody"])
def test_a_checkpoint_brings_no_code_along(field: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    places = {
        "in the checkpoint": run / "checkpoints" / "step_00000001" / "code.py",
        "in the run directory": run / "code.py",
        "relative": Path("code.py"),
        "of everybody": tmp_path / "everybody.py",
    }
    code = places[where]
    word = str(code) if field == "extensions" else f"{code}:something"
    path = _checkpoint(run, **{field: [word]})
    _code(code)
    if where == "of everybody":
        code.chmod(0o666)
    with pytest.raises(ValueError, match=r"experiment.json names .*\.py, whose Python code would be run"):
        load_experiment(path)
    assert not code.with_suffix(".ran").exists()


def test_a_checkpoint_of_ones_own_runs_ones_own_files(tmp_path: Path) -> None:
    code = _code(tmp_path / "mine.py")
    load_experiment(_checkpoint(tmp_path / "run", extensions=[str(code)]))
    assert code.with_suffix(".ran").exists()


def test_a_copy_is_not_written_outside_its_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "step_00000002"
    elsewhere.mkdir(parents=True)
    (elsewhere / "manifest.json").write_text(json.dumps({"files": {"../../../stolen": [1, 0]}}))
    copies = Copies(str(tmp_path / "elsewhere"), superseded=lambda checkpoints: [])
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"names the file \.\./\.\./\.\./stolen, which is outside its folder"):
        copies.fetch("step_00000002", tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_in_shared_memory_must_be_ones_own(tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir(mode=0o700)
    _check_private(tmp_path / "copies")
    (tmp_path / "copies").chmod(0o755)
    (tmp_path / "link").symlink_to(tmp_path / "copies")
    for path in (tmp_path / "copies", tmp_path / "link"):
        with pytest.raises(PermissionError, match="is not private to this user"):
            _check_private(path)
