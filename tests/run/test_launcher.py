"""The launcher ends without a traceback of its own."""

from __future__ import annotations

import signal

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from megatron_mm.run import launcher


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line_and_the_exit_code_of_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    def interrupted() -> None:
        raise SignalException(f"Process 1 got signal: {number}", sigval=number)

    monkeypatch.setattr(launcher, "main", interrupted)
    monkeypatch.setattr(launcher, "install", lambda: None)
    with pytest.raises(SystemExit) as ended:
        launcher.launch()
    assert ended.value.code == code and ended.value.__suppress_context__
    assert capsys.readouterr().err == f"launcher: ended by {number.name}, after its processes\n"
