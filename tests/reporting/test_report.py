"""`megatron-mm report` shows the contents of run directories, whatever the state of their files; a browser shows the page."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.monitors import metrics

from megatron_mm.cli.main import main
from megatron_mm.reporting.charts import MAX_POINTS, NUM_COLOURS, Series, line_chart, nice_ticks
from megatron_mm.reporting.page import STYLE
from megatron_mm.reporting.run_files import Curve, read_lines, read_objects, read_run
from megatron_mm.reporting.run_report import PHASES, report, write_report
from megatron_mm.training.metrics import MetricsFile

CONFIG = {"recipe": "debug_mm1", "train": {"steps": 40, "seed": 1}, "data": {"mixture": {"pairs": 0.5, "text": 0.5}}}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def full_run(run_dir: Path, *, seed: int = 1, steps: int = 30) -> Path:
    """Write a run directory with every file that a report reads."""
    (run_dir / "captions").mkdir(parents=True)
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8)).save(buffer, "PNG")
    (run_dir / "captions" / "a.png").write_bytes(buffer.getvalue())
    (run_dir / "config.json").write_text(json.dumps({**CONFIG, "train": {"steps": 40, "seed": seed}}))
    file = MetricsFile(run_dir / "metrics.jsonl", resume_step=0)
    for step in range(1, steps + 1):
        file.write(
            {
                **vars(metrics(step, experts={"load_imbalance": 1.5, "z_loss": 0.1})),
                "phases": {"data": 0.1, "forward": 0.2, "backward": 0.2},
                "grad_norms": {"decoder": 1.0, "tower": 0.5},
                "param_norms": {"decoder": 10.0, "tower": 5.0},
                "update_ratios": {"decoder": 1e-3, "tower": 1e-3},
                "memory_gb": 1.5,
            }
        )
    file.close()
    write_lines(run_dir / "eval.jsonl", [{"step": s, "heldout/loss": 2 / s, "heldout/loss/pairs": 1 / s} for s in (10, 20, 30)])
    write_lines(run_dir / "plan.jsonl", [{"step": s, "plan/ratio": 1.1} for s in range(1, 20)])
    setting = {"shots": 0, "limit": None, "model": {"step": 30}}
    result = {"task": "vqav2", "title": "VQAv2", "metric": "accuracy", "scores": {"score": 51.25}, "setting": setting, "num_items": 9}
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "step_30_vqav2_0shot.json").write_text(json.dumps(result))
    (run_dir / "evaluation" / "torn.json").write_text('{"task": "coco"')
    slow = {"rank": 3, "phase": "forward", "seconds": 0.9, "others": 0.2}
    write_lines(
        run_dir / "phases.jsonl", [{"step": s, "steps": 10, "stages": [{"forward": 0.2}, {"forward": 0.3}], "slow": slow} for s in (10, 20)]
    )
    write_lines(run_dir / "experts.jsonl", [{"step": 20, "first_step": 1, "layers": [1, 3], "tokens": [[1, 2, 3], [2, 2, 2]]}])
    caption = {"image": "captions/a.png", "true": "a <red> cross", "generated": "a red & blue cross"}
    write_lines(run_dir / "captions.jsonl", [{"step": s, "samples": [caption]} for s in (10, 20)])
    write_lines(
        run_dir / "events.jsonl",
        [
            {"step": 0, "time": 1.7e9, "kind": "start", "text": "on 4 processes"},
            {"step": 12, "time": 1.7e9, "kind": "resume", "text": "on 2 processes"},
            {"step": 20, "time": 1.7e9, "kind": "slow", "text": "rank 3 is slow in forward"},
        ],
    )
    return run_dir


# ------------------------------------------------------------------------------------------------------------- reading files


def test_half_a_line_is_left_out_and_counted_and_of_repeated_steps_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": s, "loss": float(s), "losses": {"pairs": s / 2}} for s in (1, 2, 3, 4, 5)])
    with path.open("a") as file:
        file.write('{"step": 6, "lo\n')  # the process died while writing
        file.write('{"step": 4, "loss": 40.0, "losses": {"pairs": null}}\n[1, 2]\n{"loss": 3}\n{"step": 5, "loss": 50.0}\n')
    found = read_lines(path)
    assert found.steps.tolist() == [1, 2, 3, 4, 5]
    assert found.curve("loss").values.tolist() == [1, 2, 3, 40, 50]
    assert found.curve("losses/pairs").steps.tolist() == [1, 2, 3, 4]
    assert np.isnan(found.curve("losses/pairs").values[-1])
    assert (found.damaged, found.replaced, found.restarts) == (3, 2, [4])


def test_steps_after_a_restart_that_the_run_has_not_reached_again_do_not_count(tmp_path: Path) -> None:
    write_lines(tmp_path / "m.jsonl", [{"step": s, "loss": 1.0} for s in (1, 2, 3, 4, 5, 6, 3)])
    found = read_lines(tmp_path / "m.jsonl")
    assert found.steps.tolist() == [1, 2, 3] and found.replaced == 4


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither metrics"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_run(tmp_path / "gone")


# ------------------------------------------------------------------------------------------------------------------- charts


def test_a_spike_of_one_step_among_many_stays_visible() -> None:
    values = np.ones(100_000)
    values[54_321] = 7.0
    chart = line_chart([Series("loss", Curve(np.arange(1, 100_001), values), 0)], title="Loss")
    assert len(chart) < 80_000 and chart.count("L") < MAX_POINTS + 10
    band = re.search(r'class="band" points="([^"]+)"', chart)
    assert band is not None
    heights = sorted({float(point.split(",")[1]) for point in band[1].split()})
    assert heights[0] < 0.2 * heights[-1], "the band reaches the spike"


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    chart = line_chart([Series("loss", Curve(np.arange(5), np.array([1.0, 2.0, np.nan, 3.0, 4.0])), 0)], title="Loss")
    line = re.search(r'class="line" d="([^"]+)"', chart)
    assert line is not None and line[1].count("M") == 2
    assert line_chart([Series("loss", Curve(np.arange(2), np.array([np.nan, np.nan])), 0)], title="Loss") == ""
    alone = np.where(np.arange(60) % 10, np.nan, 1.0)
    assert line_chart([Series("loss", Curve(np.arange(60), alone), 0)], title="Loss").count("<circle") == 6, "no line would show them"


def test_a_number_of_some_steps_alone_is_a_line(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0, "balance": None if step % 10 else 0.9} for step in range(1, 61)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    chart = report([read_run(tmp_path)]).partition(">Balance <")[2].partition("</figure>")[0]
    line = re.search(r'class="line" d="([^"]+)"', chart)
    assert line is not None and line[1].count("L") == 5


def test_of_a_long_file_some_objects_are_kept(tmp_path: Path) -> None:
    write_lines(tmp_path / "phases.jsonl", [{"step": step} for step in range(1, 36)])
    found = read_objects(tmp_path / "phases.jsonl", replaces=True, most=5)
    assert found.every == 4 and [line["step"] for line in found.lines] == [1, 5, 9, 13, 17, 21, 25, 29, 33, 35]


@pytest.mark.parametrize(("least", "most"), [(0.0, 1.0), (-3.0, 17.0), (1e-9, 2e-9), (5.0, 5.0), (0.0, 1e12)])
def test_ticks_are_few_and_within(least: float, most: float) -> None:
    ticks = nice_ticks(least, most)
    assert 1 <= len(ticks) <= 8 and all(least - 1e-9 * abs(least) <= tick <= most + 1e-9 * abs(most) for tick in ticks)


# --------------------------------------------------------------------------------------------------------------------- page


def test_the_page_has_every_section_of_a_full_run_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    run_dir = full_run(tmp_path / "run")
    main(["report", str(run_dir)])
    page = (run_dir / "report.html").read_text()
    assert 'class="missing"' not in page.replace(".missing", "")
    titles = [
        "Training loss",
        "Held-out loss by source",
        "Main process",
        "pipeline stage 1",
        "Gradient norm by part",
        "Expert load",
        "All ",
    ]
    titles += ["Load imbalance", "Measured / predicted", "Captions at step 20", "rank 3 is slow in forward", "VQAv2</td>", ">51.2<"]
    for title in titles:
        assert title in page, title
    assert "a &lt;red&gt; cross" in page and "a red &amp; blue cross" in page
    assert 'src="data:image/png;base64,' + base64.b64encode((run_dir / "captions" / "a.png").read_bytes()).decode() in page
    assert not re.search(r"<link|<iframe|url\(|@import|https?://", page)
    assert set(re.findall(r'src="([a-z]+:)', page)) == {"data:"}


def test_a_run_of_an_earlier_version_has_a_page_that_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "old"
    run_dir.mkdir()
    write_lines(run_dir / "metrics.jsonl", [{"step": s, "loss": 1.0 / s} for s in (1, 2, 3, 2)])
    main(["report", str(run_dir), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "has no time by phase" in page and "No config.json" in page and "No sparse layers" in page and "resumed after step 1" in page
    assert "2 lines of repeated steps replaced" in capsys.readouterr().out


def test_files_that_are_not_as_they_should_be_cost_their_sections_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = full_run(tmp_path / "run")
    write_lines(run_dir / "captions.jsonl", [{"step": 1, "samples": 4}])
    write_lines(run_dir / "phases.jsonl", [{"step": 1, "stages": 7, "slow": "x", "memory_gb": "y"}])
    write_lines(run_dir / "events.jsonl", [{"step": 1, "time": "x", "kind": 3}])
    (run_dir / "config.json").write_text('{"train": 5}')
    main(["report", str(run_dir)])
    page = (run_dir / "report.html").read_text()
    assert page.count("This section cannot be shown, because a file is not in the format of this version") == 2
    assert "Training loss" in page and "Gradient norm by part" in page and "Expert load" in page
    main(["watch", str(run_dir), "--once"])
    assert "loss     0.0667" in capsys.readouterr().out


def test_two_runs_share_their_charts_and_their_differences_are_listed(tmp_path: Path) -> None:
    first, second = full_run(tmp_path / "a", seed=1), full_run(tmp_path / "b", seed=2, steps=20)
    main(["report", str(first), str(second), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    differences = page[page.index("Differences") : page.index("<details>")]
    assert "train.seed" in differences and "train.steps" not in differences
    chart = page[page.index("Training loss <") :]
    assert re.findall(r"<button[^>]*>([^<]*)</button>", chart[: chart.index("</figure>")]) == ["a", "b"]


def test_no_two_phases_share_a_colour() -> None:
    assert len(PHASES) <= NUM_COLOURS
    assert all(STYLE.count(f"--c{number}:") == 2 for number in range(NUM_COLOURS)), "in light and in dark mode"


def test_supervised_tokens_are_drawn_as_means_of_several_steps(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "source_tokens": {"a": 100 * (s % 2), "b": 100}} for s in range(1, 301)])
    page = report([read_run(tmp_path)])
    chart = page[page.index("Supervised tokens by source") :]
    assert "of a step; mean of 10 steps" in chart
    values = json.loads(html.unescape(page[: page.index("Supervised tokens by source")].rpartition("data-chart='")[2].partition("'")[0]))
    assert set(values["s"][0]["y"]) == {50.0} and set(values["s"][1]["y"]) == {100.0} and values["s"][0]["x"][0] == 10


def test_a_directory_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out .* is a directory: specify the file to write, such as --out .*/report\.html"):
        write_report([full_run(tmp_path / "run")], tmp_path)


def test_an_image_outside_the_run_directory_is_not_shown(tmp_path: Path) -> None:
    run_dir = full_run(tmp_path / "run")
    (tmp_path / "secret.png").write_bytes(b"secret")
    write_lines(run_dir / "captions.jsonl", [{"step": 1, "samples": [{"image": "../secret.png", "true": "", "generated": ""}]}])
    main(["report", str(run_dir)])
    page = (run_dir / "report.html").read_text()
    assert base64.b64encode(b"secret").decode() not in page and "image not in the run directory" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.slow
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_browser_draws_the_page(tmp_path: Path, colours: str) -> None:
    """The background has the style's colour, so the style was applied; there are many colours, so charts were drawn."""
    run_dir = full_run(tmp_path / "run")
    main(["report", str(run_dir)])
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1400", "--virtual-time-budget=2000"]
    dark = ["--blink-settings=preferredColorScheme=0"] if colours == "dark" else ["--blink-settings=preferredColorScheme=1"]
    command = ["chromium", *options, *dark, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    subprocess.run([*command, (run_dir / "report.html").as_uri()], check=True, capture_output=True, timeout=240)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert tuple(pixels[2, 2]) == ((0x14, 0x17, 0x1D) if colours == "dark" else (255, 255, 255))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
