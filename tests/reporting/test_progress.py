"""`megatron-mm watch` follows a run on a terminal and on a pipe, and ends with it."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.monitors import metrics

from megatron_mm.cli.main import main
from megatron_mm.reporting import progress
from megatron_mm.reporting.progress import Follower, Progress, duration, sparkline, watch
from megatron_mm.reporting.run_files import read_run
from megatron_mm.reporting.run_report import report
from megatron_mm.run.hooks import end_of
from megatron_mm.run.lock import LOCK_FILE, Holder, gone_since, held_since
from megatron_mm.training.metrics import MetricsFile


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def new_run(run_dir: Path, *, steps: int) -> Path:
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps({"recipe": "debug_mm1", "train": {"steps": steps}}))
    event(run_dir, 0, "start", "started on 4 processes")
    return run_dir


def event(run_dir: Path, step: int, kind: str, text: str = "", *, at: float | None = None) -> None:
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": at or time.time(), "kind": kind, "text": text}) + "\n")


def write_steps(run_dir: Path, *steps: int, **fields: Any) -> None:
    file = MetricsFile(run_dir / "metrics.jsonl", resume_step=steps[0] - 1)
    for step in steps:
        file.write(metrics(step, time=time.time(), total_tokens=100 * step, phases={"forward": 0.4, "data": 0.1}, **fields))
    file.close()


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_run_is_followed_until_it_ends(tmp_path: Path, stream: type[io.StringIO]) -> None:
    run_dir, out = new_run(tmp_path / "run", steps=40), stream()

    def train() -> None:
        for step in range(1, 40):
            write_steps(run_dir, step)
            time.sleep(0.005)
        event(run_dir, 39, "slow", "rank 3 is slow in forward")
        write_steps(run_dir, 40)
        event(run_dir, 40, "end", "all 40 steps are done")

    thread = threading.Thread(target=train)
    thread.start()
    assert watch(run_dir, interval=0.02, out=out) == "end"
    thread.join()
    text = out.getvalue()
    assert "40 of 40 steps, 100.0%" in text and "rank 3 is slow in forward" in text
    assert ("\x1b[" in text) == isinstance(out, Terminal)


def test_a_run_beyond_its_steps_is_not_done_in_part(tmp_path: Path) -> None:
    """`--train.steps 4` on a run at step 11."""
    run_dir, out = new_run(tmp_path / "run", steps=4), io.StringIO()
    write_steps(run_dir, *range(1, 12))
    assert end_of(4, 4) == ("end", "all 4 steps are done") and end_of(3, 4) == ("stop", "stopped after step 3 of 4")
    event(run_dir, 11, *end_of(11, 4))
    assert watch(run_dir, interval=0.01, out=out) == "end"
    assert "step 11, after the 4 steps of train.steps  loss" in out.getvalue() and "11 of 4" not in out.getvalue()
    assert "step 11 is done, more than the 4 of train.steps" in out.getvalue()
    assert "<b>11</b><span>steps; train.steps is 4</span>" in report([read_run(run_dir)])


def test_a_run_that_fails_ends_with_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = new_run(tmp_path / "run", steps=10)
    write_steps(run_dir, 1, 2)
    event(run_dir, 2, "failed", "RuntimeError: gone")
    with pytest.raises(SystemExit) as left:
        main(["watch", str(run_dir)])
    assert left.value.code == 1 and "failed: RuntimeError: gone" in capsys.readouterr().out


def test_a_resumed_run_goes_on_and_one_of_an_earlier_version_ends_with_its_last_step(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run", steps=10)
    write_steps(run_dir, 1, 2, 3, 4)
    event(run_dir, 4, "failed")
    state = Progress(run_dir)
    state.update()
    assert state.ended == "failed"
    event(run_dir, 2, "resume")
    write_steps(run_dir, 3)  # the file is truncated after step 2 and continued
    state.update()
    assert state.ended is None and [line["step"] for line in state.lines] == [1, 2, 3]
    (run_dir / "events.jsonl").unlink()
    write_steps(run_dir, *range(4, 11))
    old = Progress(run_dir)
    old.update()
    assert old.ended == "end"


def test_the_display_tells_of_a_run_without_news(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run", steps=100)
    write_steps(run_dir, 1, 2, memory_gb=2.0, bad_samples={"pairs": 3})
    state = Progress(run_dir)
    state.update()
    lines = list(state.display(width=120, now=time.time() + 3600))
    assert any("2 of 100 steps, 2.0%" in line and "left" not in line for line in lines)
    assert any("60 min ago  no update" in line for line in lines)
    assert any("forward 80%   data 20%" in line for line in lines) and any("bad 3" in line for line in lines)
    soon = list(state.display(width=120, now=time.time() + 5))
    assert any("2.0%, 49 s left" in line for line in soon) and not any("no update" in line for line in soon)


def test_a_run_whose_processes_are_gone_ends_the_watch_with_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, then = new_run(tmp_path / "run", steps=100), time.time() - 900
    file = MetricsFile(run_dir / "metrics.jsonl", resume_step=0)
    file.write(metrics(1, time=then))
    file.close()
    lock, left_by = run_dir / LOCK_FILE, Holder(pid=2**30, started="1")
    lock.write_text(json.dumps(asdict(left_by)))
    os.utime(lock, (then, then))
    for options in (["--interval", "0.02"], ["--once"]):
        with pytest.raises(SystemExit) as left:
            main(["watch", str(run_dir), *options])
        said = capsys.readouterr().out
        assert left.value.code == 1 and "15 min ago: start the same command again to resume" in said and " left, until" not in said
        assert "no update" not in said
    write_steps(run_dir, 2)
    said_by_steps = io.StringIO()
    assert (
        watch(run_dir, interval=1, out=said_by_steps, gone_since=lambda run_dir: then) == "gone"
        and ", 0 s ago: start" in said_by_steps.getvalue()
    )
    os.utime(lock)
    assert gone_since(run_dir) is None, "it may be restarting"
    os.utime(lock, (then, then))
    lock.write_text(json.dumps(asdict(Holder())))  # this process: it is only slow
    os.utime(lock, (then, then))
    assert gone_since(run_dir) is None
    lock.unlink()
    assert gone_since(run_dir) is None, "its files are new"
    for path in run_dir.iterdir():
        os.utime(path, (then, then))
    assert gone_since(run_dir) == pytest.approx(then, abs=1)


def test_a_run_that_is_started_again_is_waited_for(tmp_path: Path) -> None:
    run_dir, out = new_run(tmp_path / "run", steps=2), io.StringIO()
    write_steps(run_dir, 1)
    ended = time.time() - 100
    event(run_dir, 1, "stop", "SIGTERM", at=ended)
    lock = run_dir / LOCK_FILE
    lock.write_text(json.dumps(asdict(Holder(since=datetime.fromtimestamp(ended - 50, UTC).isoformat()))))
    assert watch(run_dir, interval=1, out=out, held_since=held_since) == "stop", "the lock of the run that has ended"
    lock.write_text(json.dumps(asdict(Holder())))

    def resume() -> None:
        time.sleep(0.05)
        event(run_dir, 1, "resume")
        write_steps(run_dir, 2)
        event(run_dir, 2, "end", "all 2 steps are done")

    thread = threading.Thread(target=resume)
    thread.start()
    assert watch(run_dir, interval=0.01, out=out, gone_since=gone_since, held_since=held_since) == "end"
    thread.join()
    assert out.getvalue().count("the run has been started again") == 1 and "2 of 2 steps" in out.getvalue()


def test_in_a_pipe_a_run_without_news_is_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, out = new_run(tmp_path / "run", steps=100), io.StringIO()
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.05)
    MetricsFile(run_dir / "metrics.jsonl", resume_step=0).write(metrics(1, seconds=1e-4, time=time.time()))
    asked = iter([None] * 8 + [time.time()])
    watch(run_dir, interval=0.05, out=out, gone_since=lambda run_dir: next(asked))
    said = out.getvalue().splitlines()
    assert 2 <= sum("newest step 0 s ago" in line for line in said) <= 5 and said[-1].startswith("the run's processes have been gone")


def test_a_run_that_has_written_nothing_yet_is_waited_for(tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", io.StringIO()

    def train() -> None:
        time.sleep(0.05)
        run_dir.mkdir()
        (run_dir / LOCK_FILE).touch()
        time.sleep(0.05)
        (run_dir / "config.json").write_text(json.dumps({"recipe": "debug_mm1", "train": {"steps": 3}}))
        event(run_dir, 3, "end", "all 3 steps are done")

    thread = threading.Thread(target=train)
    thread.start()
    assert watch(run_dir, interval=0.01, out=out) == "end"
    thread.join()
    assert out.getvalue().startswith(f"{run_dir} does not exist yet: waiting for a run to start (Ctrl-C to end)")
    with pytest.raises(ValueError, match="does not exist: specify the --run-dir"):
        watch(tmp_path / "no" / "run", interval=1)


def test_on_a_pipe_no_line_is_cut_and_no_character_is_a_command(tmp_path: Path) -> None:
    run_dir, out = new_run(tmp_path / "run", steps=100), io.StringIO()
    write_steps(run_dir, 1, loss=float("nan"), losses={}, source_tokens={"pairs": 0, "text": 0}, memory_gb=2.0)
    (run_dir / "phases.jsonl").write_text('{"step": 1, "memory_gb": 1.5, "memory_rank": 3}\n')
    event(run_dir, 1, "warning", "blank image in \x1b]0;owned\x07 " + "x" * 200)
    watch(run_dir, interval=1, once=True, out=out)
    text = out.getvalue()
    assert "x" * 200 in text and "\x1b" not in text and "\x07" not in text
    assert "loss     none (no supervised tokens)" in text
    assert "2 GB on rank 0" in text and "rank 3" not in text, "what was the most some steps ago is not"
    (run_dir / "phases.jsonl").write_text('{"step": 1, "memory_gb": 2.5, "memory_rank": 0}\n')
    watch(run_dir, interval=1, once=True, out=(later := io.StringIO()))
    assert "memory   2.5 GB on rank 0\n" in later.getvalue()


def test_half_a_line_waits_for_its_other_half_and_a_long_file_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_TAIL_BYTES", 100)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1000)) + '{"st')
    follower = Follower(path)
    again, found = follower.new()
    assert not again and 1 < len(found) < 12 and found[-1] == {"step": 999}
    with path.open("a") as file:
        file.write('ep": 1000}\n')
    assert follower.new() == (False, [{"step": 1000}])
    path.write_text('{"step": 7}\nnothing\n')
    assert follower.new() == (True, [{"step": 7}])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"is not a run directory: .* but notes\.txt"):
        watch(tmp_path, interval=1)


def test_a_sparkline_is_of_means_and_a_duration_of_words() -> None:
    assert sparkline([1.0, 1.0, 2.0, 2.0], width=2) == "▁█"
    assert sparkline([None, float("nan")], width=4) == ""
    assert sparkline([3.0] * 5, width=3) == "▁▁▁"
    assert [duration(seconds) for seconds in (75, 600, 7500, 200_000)] == ["75 s", "10 min", "2 h 5 min", "2.3 days"]
