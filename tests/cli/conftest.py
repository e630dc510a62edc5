"""What the tests of commands share."""

from __future__ import annotations

import os

import pytest
from support.command_line import Fails

from megatron_mm.cli import main as cli


class _Left(BaseException):
    """The program ended by os._exit."""


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """See `support.command_line.Fails`."""

    def leave(code: int) -> None:
        assert code == 2
        raise _Left

    monkeypatch.setattr(os, "_exit", leave)

    def run(*arguments: object, prints: bool = False) -> str:
        with pytest.raises(_Left):
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("megatron-mm: error:")]
        assert len(lines) == 1 and (prints or not out)
        return lines[0]

    return run
