"""The second Ctrl-C ends a process at once, even while a step runs; signals that the launcher forwards do not count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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
