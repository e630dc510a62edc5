"""The second Ctrl-C ends a process at once, even while a step runs; signals that the launcher forwards do not count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from megatron_mm.run import hooks
from megatron_mm.training.trainer import Trainer

PROGRAM = """
import os, signal, time
from megatron_mm.run.interrupts import Interrupts
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
Interrupts(lambda: print("asked", flush=True), launcher=os.getppid())
print("a long step", flush=True)
input()  # meanwhile the launcher forwards the signal twice
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.6)
print("it goes on", flush=True)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


def test_the_second_interrupt_ends_the_process_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "a long step\n"
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
    out, err = process.communicate("\n", timeout=50)
    assert process.returncode == 130 and out == "asked\nit goes on\n"
    assert "interrupted twice" in err


def test_an_interrupt_while_the_hook_is_made_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python runs a handler in the main thread for a signal that any other thread receives, while the main thread blocks it."""
    monkeypatch.setattr(hooks.resource_tracker, "ensure_running", lambda: signal.getsignal(signal.SIGINT)(signal.SIGINT, None))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before = {number: signal.getsignal(number) for number in hooks.Stopping.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            hooks.Stopping(cast(Trainer, SimpleNamespace(run_dir=tmp_path, topology=SimpleNamespace(is_main=True))))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
