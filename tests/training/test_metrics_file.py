"""metrics.jsonl after crashes and full disks, and the picture drawn from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mm.training.metrics import MetricsFile, draw_loss_curve, ends_torn, read_metrics


def _lines(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": step, "loss": 1.0, "losses": {"pairs": 1.0}}).encode() + b"\n" for step in steps)


@pytest.mark.parametrize(
    ("content", "resume_step", "kept"),
    [
        (b"", 3, []),
        (_lines(1, 2, 3, 4), 3, [1, 2, 3]),
        (_lines(1, 2, 3), 0, []),
        (_lines(1, 2) + b'{"step": 3, "lo', 3, [1, 2]),
        (_lines(1, 2, 3)[:-1], 3, [1, 2, 3]),
        (_lines(1, 2) + b"\x00\xff\xfe\n\xff", 3, [1, 2]),
        (_lines(1) + b'{"ste\n' + _lines(2, 3), 2, [1, 2]),
        (b'[]\n3\n"x"\n{"step": null}\n' + _lines(1), 5, [1]),
        (b"\x00" * 4096, 5, []),
    ],
    ids=[
        "empty",
        "later steps",
        "from the start",
        "half a line",
        "no last newline",
        "no text",
        "half a line within",
        "other JSON",
        "zeros",
    ],
)
def test_a_resume_keeps_the_steps_before_it_and_drops_what_is_torn(
    content: bytes, resume_step: int, kept: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    file = MetricsFile(path, resume_step=resume_step)
    file.write({"step": resume_step + 1, "loss": 2.0, "losses": {}})
    file.close()
    assert [line["step"] for line in read_metrics(path)] == [*kept, resume_step + 1]
    assert not ends_torn(path)


def test_a_long_run_s_curve_is_drawn_from_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, **options: drawn.append((options["label"], len(x), x[0], y[0])))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(_lines(*range(1, 5002)) + b'{"step": 5002, "loss": null, "losses": {"pairs": null}}\n{"step": 50')
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self: None)
    assert draw_loss_curve(tmp_path).is_file()
    assert drawn == [("pairs", 1667, 2.0, 1.0), ("all", 1667, 2.0, 1.0)]
