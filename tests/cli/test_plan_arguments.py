"""`megatron-mm plan` and other commands check numbers and files before they work, and say which options have no effect."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from support.command_line import Fails

from megatron_mm.cli import main as cli
from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe
from megatron_mm.planning.workload import Workloads

PLAN = ("plan", "debug_mm1", "--num-gpus", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--price", "-1"), "--price: -1 is impossible: give a number that is at least 0"),
        (("--price", "nan"), "--price: nan is impossible"),
        (("--price", "cheap"), "--price: 'cheap' is not a number"),
        (("--host-microseconds", "-5"), "--host-microseconds: -5 is impossible: give a number that is more than 0"),
        (("--search", "--usable-memory", "3"), "--usable-memory: 3 is impossible: give a number that is more than 0 and at most 1"),
        (("--search", "--usable-memory", "-1"), "--usable-memory: -1 is impossible"),
        (("--num-gpus", "0"), "--num-gpus: 0 is too small: give 1 or more"),
        (("--images", "-3"), "--images: -3 is too small: give 0 or more"),
        (("--images", "900"), "images is 900, but must be from 0 to data.max_images_per_sequence = "),
        (("--usable-memory", "0.5"), "--usable-memory has an effect only together with --search: add --search"),
        (("--gpu", "a100", "--train.precision", "fp8"), "train.precision is fp8, but an a100-80g has no FP8: use --train.precision bf16"),
        (("--train.precision", "fp8", "--precision.fp8-recipe", "mxfp8"), "mxfp8, which an h100-sxm does not have: use another one"),
        (("--memory-timeline", "x.png"), "--memory-timeline has an effect only together with --trace: add --trace"),
        (("--every-row",), "--every-row has an effect only together with --measurements"),
        (("--timeline", "x.txt"), "--timeline: x.txt must end in .png, .pdf"),
        (("--chrome-trace", "/nonexistent/x.json"), "--chrome-trace: /nonexistent/x.json cannot be written, because /nonexistent is not a"),
        (("--measurements", "/nonexistent.csv"), "--measurements: /nonexistent.csv is not a file: correct the path"),
    ],
)
def test_impossible_values_and_options_without_effect(fails: Fails, options: tuple[str, ...], message: str) -> None:
    assert message in fails(*PLAN, *options)


def test_files_and_directories_are_checked_first(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    for place in (tmp_path / "new" / "page.html", tmp_path / "file" / "page.html"):
        assert f"--out: {place} cannot be written, because {place.parent} is not a directory" in fails("report", tmp_path, "--out", place)
    assert not (tmp_path / "new").exists()
    assert f"--run-dir: {tmp_path / 'file'} is a file, but must be a directory" in fails(
        "train", "debug_mm1", "--run-dir", tmp_path / "file"
    )


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="megatron_mm"):
        cli.main([*PLAN, "--data.path", str(tmp_path / "nowhere")])
    assert f"there is no data at data.path {tmp_path / 'nowhere'}" in caplog.text


def test_what_measurements_ignore_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rows.csv").write_text("gpu;layers;hidden\n")
    with caplog.at_level(logging.WARNING, logger="megatron_mm"):
        cli.main(["plan", "--measurements", str(tmp_path / "rows.csv"), "--price", "2"])
    assert "ignored, because --measurements plans no run: --price" in caplog.text


def test_a_layout_that_does_not_fit_has_no_days_names_the_search_and_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "mm1_30b", "--num-gpus", "8", "--price", "2", "--train.global-batch-size", "8"])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "fits     NO" in out and "add --search to find one that fits" in out and "GPU-hours" not in out


def test_images_is_the_largest_number_of_a_sequence() -> None:
    experiment: Experiment = get_recipe("mm1_30b")
    assert all(work.images <= 4 for work in Workloads(experiment, images=4)._works)
