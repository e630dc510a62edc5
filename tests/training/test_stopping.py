"""A signal ends a run after the same step on all processes, with a complete checkpoint, from which the next start resumes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.run.hooks import STOPPED_FILE
from megatron_mm.run.start import start
from megatron_mm.training.checkpoint import completed_checkpoints

MANY = 500


def _train(data: Path, run_dir: Path, steps: int, send: Callable[[], None] | None) -> tuple[int, list[bool]]:
    """Train, calling `send` repeatedly once a save is in progress; return the last step, and True for each signal setting restored."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # as examples/launch.sh does, for signals that arrive before or after training
    resource_tracker._resource_tracker._fd = None  # as if none were running yet, as in a process that torchrun starts
    ended = threading.Event()

    def keep_sending() -> None:
        while not ended.is_set() and not list(run_dir.glob("checkpoints/.partial-*")):
            ended.wait(0.001)
        while send is not None and not ended.is_set():
            send()
            ended.wait(0.02)

    sender = threading.Thread(target=keep_sending)
    sender.start()
    experiment = small_run(data, steps=steps, schedule_steps=MANY)
    experiment = replace(
        experiment,
        checkpoint=replace(experiment.checkpoint, interval=1),
        eval=replace(experiment.eval, interval=MANY, batches=1, samples=0),
    )
    step = start(experiment, run_dir).step
    ended.set()
    sender.join()
    restored = [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGUSR1, signal.SIGTERM)]
    return step, [*restored, not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGUSR1, signal.SIGTERM}]


def _both_to_everything() -> None:
    """Signal this process and all its children, including the checkpoint writers, as Slurm does."""
    os.killpg(0, signal.SIGUSR1)
    os.killpg(0, signal.SIGTERM)


def _term_to_the_second() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


def _interrupt_once() -> None:
    """Send Ctrl-C's signal once; a second one would end the run at once."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler and "INTERRUPTED" not in os.environ:
        os.environ["INTERRUPTED"] = "1"
        os.kill(os.getpid(), signal.SIGINT)


def _launcher_dies() -> None:
    os.getppid = lambda: 1  # as the system reports after the launcher's death


def _train_under_a_launcher(data: Path, run_dir: Path) -> tuple[int, list[bool]]:
    os.environ["TORCHELASTIC_RUN_ID"] = "one"
    return _train(data, run_dir, MANY, _launcher_dies)


def test_the_end_of_the_launcher_stops_with_a_checkpoint(demo_data: Path, tmp_path: Path) -> None:
    ((step, _),) = run_processes(_train_under_a_launcher, 1, demo_data, tmp_path)
    assert step < MANY and completed_checkpoints(tmp_path)[-1].name == f"step_{step:08d}"
    assert (tmp_path / STOPPED_FILE).read_text() == f"stopped after step {step} of {MANY} on the end of its launcher\n"


@pytest.mark.slow
def test_signals_to_everything_break_no_save_and_the_next_start_goes_on(demo_data: Path, tmp_path: Path) -> None:
    stopped = run_processes(_train, 2, demo_data, tmp_path, MANY, _both_to_everything)
    step = stopped[0][0]
    assert stopped == [(step, [True] * 3)] * 2 and step < MANY
    assert completed_checkpoints(tmp_path)[-1].name == f"step_{step:08d}"
    assert (tmp_path / STOPPED_FILE).read_text() in [f"stopped after step {step} of {MANY} on SIG{name}\n" for name in ("USR1", "TERM")]
    assert (tmp_path / "eval.jsonl").read_text() == "", "there is no time to evaluate"

    assert run_processes(_train, 2, demo_data, tmp_path, step + 2, None)[0][0] == step + 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, step + 3))
    assert not (tmp_path / STOPPED_FILE).exists()
    assert (tmp_path / "eval.jsonl").read_text() != ""


def test_a_signal_to_one_process_stops_all_after_the_same_step(demo_data: Path, tmp_path: Path) -> None:
    stopped = run_processes(_train, 2, demo_data, tmp_path, MANY, _term_to_the_second)
    assert stopped == [(stopped[0][0], [True] * 3)] * 2 and stopped[0][0] < MANY
    assert (tmp_path / STOPPED_FILE).exists()


def test_an_interrupt_stops_with_a_checkpoint(demo_data: Path, tmp_path: Path) -> None:
    ((step, _),) = run_processes(_train, 1, demo_data, tmp_path, MANY, _interrupt_once)
    assert step < MANY and completed_checkpoints(tmp_path)[-1].name == f"step_{step:08d}"
    assert (tmp_path / STOPPED_FILE).read_text() == f"stopped after step {step} of {MANY} on SIGINT\n"
