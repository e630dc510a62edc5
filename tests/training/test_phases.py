"""The clock of a step: on the processor, and on a device whose events complete late."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from megatron_mm.training import phases
from megatron_mm.training.phases import OWN_WORK, PHASES, StepClock


def test_phases_of_a_step_sum_to_it_and_megatrons_timers_go_to_their_phase() -> None:
    clock = StepClock(torch.device("cpu"))
    with clock.phase("forward"):
        time.sleep(0.01)  # an evaluation
    clock.begin_step()
    began = time.perf_counter()
    for name in ("forward-compute", "backward-compute", "forward-recv", "backward-send-forward-recv", "forward-backward", "all-grads-sync"):
        timer = clock(name, log_level=2)
        timer.start(barrier=False)
        time.sleep(0.002)
        timer.stop()
    seconds = time.perf_counter() - began
    found = clock.end_step(seconds=seconds + 0.5, data=0.3, share=0.2)
    assert set(found) == set(PHASES) and set(OWN_WORK) < set(PHASES)
    assert sum(found.values()) == pytest.approx(seconds + 0.5)
    assert found["data"] == 0.3 and found["share"] == 0.2 and found["reduce"] == found["optimizer"] == 0.0
    assert 0.002 <= found["forward"] < 0.01 and found["p2p"] >= 0.004 and found["other"] >= 0.004


class Device:
    """A stream whose events are complete up to number `passed`."""

    def __init__(self) -> None:
        self.recorded, self.passed, self.made = 0, 0, 0

    def event(self, **_: Any) -> Any:
        device = self
        device.made += 1

        class Event:
            place = -1

            def record(self) -> None:
                device.recorded += 1
                self.place = device.recorded

            def query(self) -> bool:
                return self.place <= device.passed

            def elapsed_time(self, end: Any) -> float:
                assert self.query() and end.query(), "waits for the device"
                return 1000.0 * (end.place - self.place)

        return Event()


def test_events_are_read_when_the_device_has_passed_them_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(phases.torch.cuda, "Event", device.event)
    clock = StepClock(torch.device("cuda"))
    for step in range(4):
        clock.begin_step()
        for _ in range(3):
            clock("forward-compute").start()
            clock("forward-compute").stop()
        with clock.phase("reduce"):
            device.passed = device.recorded  # the message has arrived: the device is idle
        device.passed = device.recorded
        with clock.phase("optimizer"):
            pass  # still running on the device when the step ends on the processor
        found = clock.end_step(seconds=10.0, data=0.0, share=0.0)
        assert found["forward"] == 3.0 and found["reduce"] == 1.0
        assert found["optimizer"] == (1.0 if step else 0.0), "of the step before"
    assert device.made <= 12
