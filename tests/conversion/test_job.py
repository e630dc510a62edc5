"""Conversions: interruption, resuming, parallelism, and the memory bound."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.hf_models import experiment, make_language, save
from support.trained import Trained

from megatron_mm.conversion import job
from megatron_mm.conversion.checksums import combine
from megatron_mm.conversion.files import TensorInfo, safetensors_header
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.job import PROGRESS, Lane, Task, cut, finish, partial_directory, run_lanes, write_archives, write_values
from megatron_mm.conversion.reader import CheckpointReader
from megatron_mm.conversion.to_hf import convert_to_hf
from megatron_mm.platform.files import checksum_of


def make(calls: list[int], number: int, size: int = 1000) -> Sequence[torch.Tensor]:
    calls.append(number)
    return [torch.full((size,), float(number))]


def lanes(calls: list[int], *, tasks: int = 6, archives: bool = False) -> list[Lane]:
    """Return two lanes of one safetensors file, or of two files of archives."""
    infos = {str(number): TensorInfo((1000,), torch.float32) for number in range(2 * tasks)}
    header, begins = safetensors_header(infos)
    found = []
    for lane in range(2):
        numbers = range(lane * tasks, (lane + 1) * tasks)
        work = tuple(Task(str(n), 4000, 4000, partial(make, calls, n)) for n in numbers)
        if archives:
            found.append(Lane(f"tensors/{lane}.distcp", work, write_archives))
        else:
            found.append(Lane("x.safetensors", work, write_values, begins[str(numbers[0])], header, len(header) + 4000 * 2 * tasks))
    return found


def run(folder: Path, calls: list[int], *, archives: bool = False, name: str = "a", threads: int = 2) -> None:
    work = lanes(calls, archives=archives)
    with partial_directory(folder / ".partial", fingerprint={"name": name}) as directory:
        run_lanes(work, directory, threads=threads, memory=10**9)
        finish(directory, folder / "out")


def stop_after(calls: list[int], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the journal fail after `count` lines, as on a full disk."""
    add = job._Journal.add

    def failing(self: job._Journal, written: job.Written) -> None:
        if len(calls) > count:
            raise OSError("no space left on device")
        add(self, written)

    monkeypatch.setattr(job._Journal, "add", failing)


@pytest.mark.parametrize("archives", [False, True])
def test_an_interrupted_conversion_goes_on_where_it_stopped(archives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "reference", [], archives=archives)
    first: list[int] = []
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        stop_after(first, 5, patch)
        run(tmp_path, first, archives=archives, threads=1)
    assert not (tmp_path / "out").exists() and len(first) == 6
    second: list[int] = []
    run(tmp_path, second, archives=archives, threads=1)
    assert second == list(range(5, 12)), "five tasks were done, the sixth was not written down"
    assert contents(tmp_path / "out") == contents(tmp_path / "reference" / "out")
    assert not (tmp_path / ".partial").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, *, archives: bool = False) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError):
        calls: list[int] = []
        stop_after(calls, 5, patch)
        run(folder, calls, archives=archives, threads=1)


@pytest.mark.parametrize("archives", [False, True])
def test_what_was_written_is_read_again_before_it_is_believed(
    archives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, monkeypatch, archives=archives)
    (file,) = [path for path in (tmp_path / ".partial").rglob("*") if path.suffix in (".safetensors", ".distcp") and path.stat().st_size][
        :1
    ]
    line = json.loads((tmp_path / ".partial" / PROGRESS).read_text().splitlines()[3])
    data = bytearray(file.read_bytes())
    data[line["offset"] + line["length"] // 2] ^= 1
    file.write_bytes(data)
    calls: list[int] = []
    run(tmp_path, calls, archives=archives, threads=1)
    assert calls[:4] == [2, 3, 4, 5] and "the rest is written again" in caplog.text
    run(tmp_path / "reference", [], archives=archives)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference" / "out")


def test_a_line_that_was_cut_off_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch)
    journal = tmp_path / ".partial" / PROGRESS
    journal.write_text(journal.read_text()[:-20])
    calls: list[int] = []
    run(tmp_path, calls, threads=1)
    assert calls[0] == 4 and load_file(tmp_path / "out" / "x.safetensors")["4"].eq(4).all()


def test_another_conversion_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(tmp_path, monkeypatch)
    calls: list[int] = []
    with caplog.at_level(logging.INFO, logger="megatron_mm"):
        run(tmp_path, calls, name="b")
    assert sorted(calls) == list(range(12)) and "left over from a conversion with other files or options" in caplog.text


def test_two_conversions_do_not_write_to_the_same_place(tmp_path: Path) -> None:
    with (
        partial_directory(tmp_path / ".partial", fingerprint={}),
        pytest.raises(ValueError, match="another conversion is writing to"),
        partial_directory(tmp_path / ".partial", fingerprint={}),
    ):
        pass


def test_memory_stays_under_its_bound_and_a_large_task_is_alone(tmp_path: Path) -> None:
    held, most, lock = [0], [0], threading.Lock()

    def hold(size: int) -> Sequence[torch.Tensor]:
        with lock:
            held[0] += size
            most[0] = max(most[0], held[0])
        time.sleep(0.002)
        with lock:
            held[0] -= size
        return [torch.zeros(10)]

    sizes = [30, 30, 30, 50, 1000, 10, 40, 60, 20, 100]
    work = [Lane(f"{i}", tuple(Task("", 40, size, partial(hold, size)) for size in sizes), write_values) for i in range(4)]
    (tmp_path / PROGRESS).write_text("{}\n")
    run_lanes(work, tmp_path, threads=4, memory=100)
    assert most[0] == 1000, "larger than the bound: alone"
    small = [Lane(f"s{i}", tuple(Task("", 40, size, partial(hold, size)) for size in sizes if size <= 100), write_values) for i in range(4)]
    most[0] = 0
    (tmp_path / PROGRESS).write_text("{}\n")
    run_lanes(small, tmp_path, threads=4, memory=100)
    assert 60 < most[0] <= 100


def test_progress_is_told_with_bytes_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(job, "_LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="megatron_mm"):
        run(tmp_path, [])
    told = [message for message in caplog.messages if "s left" in message]
    assert len(told) == 12 and all(re.fullmatch(r"\d+ kB of 48 kB, [\d.e+]+ .?B/s, about \d+ s left", message) for message in told)
    assert told[-1].endswith("about 0 s left")


def test_a_full_disk_is_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage._replace(free=40_000))
    calls: list[int] = []
    with pytest.raises(ValueError, match=r"has 40 kB of free space, but 48 kB will be written: free some space"):
        run(tmp_path, calls)
    assert calls == [] and not (tmp_path / ".partial").exists()
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage._replace(free=48_000))
    run(tmp_path, calls)


def test_checksums_of_parts_make_the_files() -> None:
    data = os.urandom(70_001)
    for place in (0, 1, 4096, 70_000, 70_001):
        first, second = data[:place], data[place:]
        assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(data)


def test_items_are_cut_by_bytes() -> None:
    tasks = [Task(str(size), size, 0, list) for size in (3, 3, 3, 9, 1, 1)]
    assert [[task.num_bytes for task in group] for group in cut(tasks, limit=6)] == [[3, 3], [3], [9], [1, 1]]


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_mm.conversion import job
add, count = job._Journal.add, [0]
def counting(self, written):
    add(self, written)
    count[0] += 1
    if count[0] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
job._Journal.add = counting
"""


def test_a_killed_export_is_finished_by_the_same_command(trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = KILLED + (
        "from megatron_mm.conversion.to_hf import convert_to_hf\n"
        "convert_to_hf(Path(sys.argv[2]), Path(sys.argv[3]), shard_size='500KB', threads=2)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, "20", str(trained.checkpoint), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial" / PROGRESS).is_file()
    with caplog.at_level(logging.INFO, logger="megatron_mm"):
        convert_to_hf(trained.checkpoint, tmp_path / "out", shard_size="500KB", threads=2)
    assert "B were already written" in caplog.text
    convert_to_hf(trained.checkpoint, tmp_path / "reference", shard_size="500KB")
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_a_killed_import_is_finished_by_the_same_command(tmp_path: Path) -> None:
    source = save(make_language(), tmp_path / "llama")
    program = KILLED + (
        "from megatron_mm.conversion.from_hf import convert_from_hf\n"
        "from support.hf_models import experiment\n"
        "convert_from_hf(experiment(), Path(sys.argv[3]), language=Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, "30", str(source), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    made = convert_from_hf(experiment(), tmp_path / "run", language=source)
    convert_from_hf(experiment(), tmp_path / "reference", language=source)
    left, right = (CheckpointReader(folder / "checkpoints" / made.checkpoint.name) for folder in (tmp_path / "run", tmp_path / "reference"))
    assert left.files.keys() == right.files.keys()
    assert all(torch.equal(left.read(name), right.read(name)) for name in right.all_names())
    for name, (_, checksum) in left.files.items():
        assert checksum_of(left.path / name) == checksum
