"""A checkpoint is complete or absent, and loading one never executes code that it contains."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import pickle
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small import small_run
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_mm.config import CheckpointConfig, DecoderConfig, Experiment
from megatron_mm.platform.files import checksum_of
from megatron_mm.run.start import start
from megatron_mm.training.checkpoint import completed_checkpoints, find_checkpoint, integrity
from megatron_mm.training.checkpoint.names import superseded


def experiment(data: Path, steps: int, **checkpoint: Any) -> Experiment:
    base = small_run(data, steps=steps, schedule_steps=20)
    return replace(base, checkpoint=replace(base.checkpoint, **checkpoint))


def train(data: Path, run_dir: Path, steps: int, options: dict[str, Any]) -> int:
    return start(experiment(data, steps, **options), run_dir).step


def train_and_report(data: Path, run_dir: Path, steps: int) -> str:
    """Start a run that should fail; return its error."""
    try:
        start(experiment(data, steps), run_dir)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def finished(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of two processes with checkpoints of steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("finished")
    run_processes(train, 2, demo_data, run_dir, 4, {"interval": 2})
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_newest_checkpoints_are_kept(demo_data: Path, run_dir: Path) -> None:
    run_processes(train, 2, demo_data, run_dir, 7, {"interval": 1, "keep": 2})
    assert [path.name for path in completed_checkpoints(run_dir)] == ["step_00000006", "step_00000007"]
    assert not list((run_dir / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_the_newest_checkpoints_and_every_kth_are_kept(demo_data: Path, run_dir: Path) -> None:
    run_processes(train, 2, demo_data, run_dir, 7, {"interval": 1, "keep": 2, "keep_every": 4})
    assert [path.name for path in completed_checkpoints(run_dir)] == ["step_00000004", "step_00000006", "step_00000007"]


def test_what_is_kept_beside_the_newest() -> None:
    paths = [Path(f"step_{step:08d}") for step in (2, 4, 6, 8, 10)]
    assert superseded(paths, keep=2, keep_every=0) == paths[:3]
    assert superseded(paths, keep=2, keep_every=4) == [paths[0], paths[2]]
    with pytest.raises(ValueError, match=r"keep_every is 5, but must be a multiple of checkpoint.interval 2"):
        CheckpointConfig(interval=2, keep_every=5)


def test_an_asynchronous_checkpoint_is_of_the_step_it_was_begun_at(finished: Path) -> None:
    states = {path.name: json.loads((path / "state.json").read_text()) for path in completed_checkpoints(finished)}
    assert {name: state["step"] for name, state in states.items()} == {"step_00000002": 2, "step_00000004": 4}


def test_a_path_names_a_checkpoint_or_the_newest_of_a_run(run_dir: Path, tmp_path: Path) -> None:
    newest = run_dir / "checkpoints" / "step_00000004"
    assert find_checkpoint(run_dir) == find_checkpoint(run_dir / "checkpoints") == find_checkpoint(newest) == newest
    with pytest.raises(ValueError, match=r"neither a complete checkpoint nor a run directory"):
        find_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------------------- killed


def _killed_while_saving(data: Path, run_dir: Path, after_files: int, victims: set[str]) -> None:
    """Continue training; kill `victims` as soon as the save of step 6 has written `after_files` of its files."""
    write = integrity.write_checksums

    def slowly(partial: Path, *, rank: int) -> None:
        time.sleep(30)  # tensors are written, but checksums and the final name are not
        write(partial, rank=rank)

    integrity.write_checksums = slowly
    if os.environ["RANK"] in victims:
        threading.Thread(target=_kill_when_saving, args=(run_dir / "checkpoints", after_files), daemon=True).start()
    start(experiment(data, 6), run_dir)


def _kill_when_saving(folder: Path, after_files: int) -> None:
    while not list(folder.glob(".partial-*/state.json")) or len(list(folder.glob(".partial-*/tensors/*.distcp"))) < after_files:
        time.sleep(0.005)
    os.killpg(0, signal.SIGKILL)  # this process and its writer process


@pytest.mark.parametrize(
    ("after_files", "victims"),
    [pytest.param(0, {"0", "1"}, marks=pytest.mark.slow), (1, {"1"}), pytest.param(4, {"0", "1"}, marks=pytest.mark.slow)],
    ids=["before the first file", "one process, after the first file", "after the last file"],
)
def test_sigkill_in_a_save_leaves_the_previous_checkpoint(demo_data: Path, run_dir: Path, after_files: int, victims: set[str]) -> None:
    # A surviving process fails because the other one is gone; either may be noticed first.
    with pytest.raises(AssertionError, match=r"ended without a result|rank 0 of 2 failed"):
        run_processes(_killed_while_saving, 2, demo_data, run_dir, after_files, victims)
    assert [path.name for path in completed_checkpoints(run_dir)] == ["step_00000002", "step_00000004"]
    assert run_processes(train, 2, demo_data, run_dir, 6, {}) == [6, 6]
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not list((run_dir / "checkpoints").glob(".*")), "the unfinished save is cleaned up"


# ------------------------------------------------------------------------------------------------------------------ damaged


def _flip_a_byte(tensors: Path) -> Path:
    path = max(tensors.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def _truncate(tensors: Path) -> Path:
    path = min(tensors.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1])
    return path


def _remove(tensors: Path) -> Path:
    path = min(tensors.glob("*.distcp"))
    path.unlink()
    return path


class _Dangerous:
    """Unpickling an instance would create a directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def _poison(name: str) -> Any:
    def poison(tensors: Path) -> Path:
        path = tensors / name
        if name == "common.pt":
            torch.save({"content": _Dangerous()}, path)
        else:
            path.write_bytes(pickle.dumps(_Dangerous()))
        _sum_again(path)
        return path

    return poison


def _sum_again(path: Path) -> None:
    """Update a file's checksum, as an attacker who changes the file can do."""
    manifest = path.parents[1] / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][path.name] = [path.stat().st_size, checksum_of(path)]
    manifest.write_text(json.dumps(content))


def _pickle_for_a_tensor(tensors: Path) -> Path:
    """Declare an optimizer's tensor to be an object in the metadata, so that torch would unpickle it."""
    path = tensors / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.startswith("optimizer.") and "exp_avg" in name)
    entry = BytesStorageMetadata()
    entry.size = metadata.state_dict_metadata[name].size
    metadata.state_dict_metadata[name] = entry
    (place,) = [index for index in metadata.storage_data if index.fqn == name][:1]
    info = metadata.storage_data[place]
    metadata.storage_data[MetadataIndex(name)] = replace(info, relative_path="more.distcp", offset=0)
    torch.save(_Dangerous(), tensors / "more.distcp")
    path.write_bytes(pickle.dumps(metadata))
    _sum_again(tensors / "more.distcp")
    _sum_again(path)
    return path


def _pickle_for_plain_values(tensors: Path) -> Path:
    """Store a pickle as megatron-core 0.19 stores the optimizer's options; 0.16 would not read it, but it is refused, too."""
    path = tensors / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    name = "common_state/shard_0_1"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    info = next(iter(metadata.storage_data.values()))
    for index in [index for index in metadata.storage_data if index.fqn == name]:
        del metadata.storage_data[index]
    torch.save(_Dangerous(), tensors / "more.distcp")
    size = (tensors / "more.distcp").stat().st_size
    metadata.storage_data[MetadataIndex(name)] = replace(info, relative_path="more.distcp", offset=0, length=size)
    path.write_bytes(pickle.dumps(metadata))
    _sum_again(tensors / "more.distcp")
    _sum_again(path)
    return tensors / "more.distcp"


def _file_elsewhere(tensors: Path) -> Path:
    path = tensors / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    place, info = next(iter(metadata.storage_data.items()))
    metadata.storage_data[place] = replace(info, relative_path="../../../../secret")
    path.write_bytes(pickle.dumps(metadata))
    _sum_again(path)
    return path


def _no_archive(tensors: Path) -> Path:
    (tensors / "common.pt").write_bytes(b"not an archive")
    _sum_again(tensors / "common.pt")
    return tensors / "common.pt"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip_a_byte, "is damaged"),
        (_truncate, "bytes long, expected"),
        (_remove, "is missing"),
        (_poison(".metadata"), "mkdir"),
        (_poison("common.pt"), "mkdir"),
        (_pickle_for_a_tensor, "is a pickle, not a tensor"),
        pytest.param(_pickle_for_plain_values, "mkdir", marks=pytest.mark.slow),
        pytest.param(_file_elsewhere, "which is outside its folder", marks=pytest.mark.slow),
        pytest.param(_no_archive, "is damaged", marks=pytest.mark.slow),
    ],
    ids=[
        "flipped byte",
        "truncated",
        "removed",
        "malicious metadata",
        "malicious common",
        "a pickle in a tensor's place",
        "a pickle in plain values' place",
        "a file elsewhere",
        "not an archive",
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    demo_data: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, reason: str
) -> None:
    """No other checkpoint is left; nothing is renamed then, since the file system may be at fault."""
    shutil.rmtree(run_dir / "checkpoints" / "step_00000002")
    path = damage(run_dir / "checkpoints" / "step_00000004" / "tensors")
    monkeypatch.chdir(run_dir)
    errors = run_processes(train_and_report, 2, demo_data, run_dir, 6)
    assert all(str(path) in error and reason in error for error in errors), errors
    assert not (run_dir / "executed").exists()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000004"]


def train_and_log(data: Path, run_dir: Path, steps: int, options: dict[str, Any] | None = None) -> str:
    """Start a run; return the warnings and errors that it logs."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    handler.setLevel(logging.WARNING)
    logging.getLogger("megatron_mm").addHandler(handler)
    start(experiment(data, steps, **(options or {})), run_dir)
    return heard.getvalue()


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_damaged_checkpoint_costs_its_steps_and_not_the_run(demo_data: Path, run_dir: Path, tmp_path: Path) -> None:
    undisturbed = Path(shutil.copytree(run_dir, tmp_path / "undisturbed"))
    run_processes(train, 2, demo_data, undisturbed, 6, {})
    checkpoints = run_dir / "checkpoints"
    damaged = Path(shutil.copytree(checkpoints / "step_00000004", checkpoints / "step_00000005"))
    (damaged / "state.json").write_text("{}")
    path = _flip_a_byte(checkpoints / "step_00000004" / "tensors")
    bad_bytes = path.read_bytes()

    logs = run_processes(train_and_log, 2, demo_data, run_dir, 6)
    log, other = logs
    assert f"step_00000004 is damaged and ignored: checkpoint file {path} is damaged (its CRC-32 is " in log and ", expected " in log
    assert f"{damaged / 'state.json'} is damaged" in log and "restore it" not in log, "the run has mended it already"
    assert log.count("The run resumes from step_00000002 and repeats the steps in between") == 2
    assert "The run resumes" not in other, "one process speaks for all"
    assert len(losses(undisturbed)) == 6 and losses(run_dir) == losses(undisturbed)
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    kept = ["damaged-step_00000004", "damaged-step_00000005", "step_00000002", "step_00000006"]
    assert sorted(path.name for path in checkpoints.iterdir()) == kept
    assert (checkpoints / "damaged-step_00000004" / "tensors" / path.name).read_bytes() == bad_bytes


def test_a_run_directory_in_disorder_is_resumed(demo_data: Path, run_dir: Path) -> None:
    """Leftovers of users and crashes: a copy of a checkpoint next to it, a folder instead of the link `best`, truncated files."""
    checkpoints = run_dir / "checkpoints"
    shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_00000002.old")
    shutil.copytree(checkpoints / "step_00000002", checkpoints / "best")
    (checkpoints / "step_00000099").mkdir()
    for name in ("config.json", "roll_backs.jsonl"):
        (run_dir / name).write_bytes(b'{"time": "2026')
    for name in ("metrics.jsonl", "events.jsonl"):
        (run_dir / name).write_bytes((run_dir / name).read_bytes() + b"\x00\xff\xfe\n{")
    ended = run_processes(train_and_log, 2, demo_data, run_dir, 6, {"interval": 2, "keep": 2})[0]
    assert (
        "changes since the previous start cannot be determined" in ended and "line 1 of" in ended and "roll_backs.jsonl is damaged" in ended
    )
    assert [path.name for path in completed_checkpoints(run_dir)] == ["step_00000004", "step_00000006"]
    assert (checkpoints / "step_00000002.old").is_dir() and (checkpoints / "best" / "manifest.json").is_file()
    assert json.loads((run_dir / "config.json").read_text())["train"]["steps"] == 6
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def _unreadable_on_one_process(data: Path, run_dir: Path) -> str:
    if os.environ["RANK"] == "1":

        def refuse(path: Path) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        integrity.checksum_of = refuse
    return train_and_report(data, run_dir, 6)


def test_a_read_error_of_one_process_ends_all(demo_data: Path, run_dir: Path) -> None:
    errors = run_processes(_unreadable_on_one_process, 2, demo_data, run_dir, timeout=240)
    assert all("cannot be read by process 1" in error and "Input/output error" in error for error in errors), errors


def _other_model(data: Path, run_dir: Path) -> str:
    base = small_run(data, steps=6, schedule_steps=20)
    decoder: DecoderConfig = replace(base.model.decoder, ffn_hidden_size=128)
    try:
        start(replace(base, model=replace(base.model, decoder=decoder)), run_dir)
    except ValueError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_another_model_is_refused_with_both_values(demo_data: Path, run_dir: Path) -> None:
    (error,) = run_processes(_other_model, 1, demo_data, run_dir)
    assert "model.decoder.ffn_hidden_size is 96 there and 128 here" in error
    assert "step_00000004" in error
