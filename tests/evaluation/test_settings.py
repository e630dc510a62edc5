"""Results of different settings have files, rows and names of their own; numbers of shots that a task does not have are left out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.small import small_run

from megatron_mm.cli.command import Group, run
from megatron_mm.cli.evaluate import EVALUATE
from megatron_mm.evaluation.results import Result, metric_names, read_results, table
from megatron_mm.evaluation.runner import shorter_prompts
from megatron_mm.evaluation.tasks.registry import TASKS, TEXTCORE
from megatron_mm.reporting.report_details import benchmarks
from megatron_mm.reporting.run_files import read_run
from megatron_mm.run.evaluate_tasks import Target, report

FORM = "{image}Q: {question} A:"
CHANGES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "", ""),
    ({"own_method": "generate", "method": "rank"}, "_rank", "--method rank"),
    ({"form": FORM}, "_form-751f7e", f"--form '{FORM}'"),
    ({"beams": 3}, "_beams3", "--beams 3"),
    ({"seed": 7}, "_seed7", "--seed 7"),
    ({"text_demonstrations": 2}, "_text2", "--text-demonstrations 2"),
    ({"low_resolution_demonstrations": True}, "_low-resolution", "--low-resolution-demonstrations"),
]


def _result(changes: dict[str, Any], *, task: str = "pope", limit: int | None = None, score: float = 50.0, shots: int = 0) -> Result:
    model = {"name": "run", "recipe": "mm1_3b", "checkpoint": "step_00000010", "step": 10, **changes.get("model", {})}
    own = {"task": task, "shots": shots, "seed": 0, "limit": limit, "method": "generate", "beams": 1, "wording": "w"}
    return Result(task, TASKS[task].title, TASKS[task].metric, {"score": score}, {**own, **changes, "model": model}, 6, 0, {}, "", 1.0)


def test_every_setting_has_a_file_a_row_and_a_metric_of_its_own(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"model": {"fields": {"train.precision": "fp32"}}}
    every = [*CHANGES, (fields, "_fields-d43bd9", "--train.precision fp32"), ({**CHANGES[1][0], "beams": 3}, "_rank_beams3", "--beams 3")]
    (tmp_path / "metrics.jsonl").touch()
    (folder := tmp_path / "evaluation").mkdir()
    for number, (changes, suffix, options) in enumerate(every):
        result = _result(changes, score=float(number))
        assert result.write(folder).name == f"step_00000010_pope_0shot{suffix}.json"
        assert metric_names([result]) == {f"evaluation/pope/0shot{suffix}": float(number)}
        assert options in "\n".join(table([result]))
    assert len(read_results(folder)) == len(every)
    page = benchmarks(read_run(tmp_path))
    assert page.count("<tr>") == 1 + len(every) and "--method rank --beams 3" in page and "--train.precision fp32" in page
    assert _result({"beams": 3}, limit=60).write(folder).name == "step_00000010_pope_0shot_limit60_beams3.json"


def test_a_table_says_once_what_all_results_share() -> None:
    rows = [_result({"beams": 3, "text_demonstrations": 2}, task="vqav2"), _result({"beams": 3}, task="vqav2", shots=4)]
    lines = list(table(rows))
    assert "  0 shots with --text-demonstrations 2" in lines and "all with --beams 3 (not the tasks' own setting)" in lines
    assert sum("--beams" in line for line in lines) == 1


def test_printed_paths_are_those_of_the_files(tmp_path: Path) -> None:
    target = Target(tmp_path, tmp_path / "checkpoints" / "step_00000010", is_export=False)

    def printed(results: list[Result]) -> str:
        return next(line for line in report(results, small_run(tmp_path), target, out=None) if line.startswith("results:"))

    folder = tmp_path / "evaluation"
    one, other = _result({"seed": 7}, limit=60), _result({"seed": 7}, limit=60, task="vqav2", shots=4)
    assert printed([one]) == f"results: {folder}/step_00000010_pope_0shot_limit60_seed7.json"
    assert printed([one, other]) == f"results: 2 files, {folder}/step_00000010_TASK_Nshot_limit60_seed7.json"


def test_a_task_without_training_split_is_evaluated_with_0_shots(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert TASKS["vqav2"].possible_shots([0, 4]) == [0, 4] and TASKS["pope"].possible_shots([0]) == [0] and not caplog.text
    assert TASKS["pope"].possible_shots([0, 4, 8, 16]) == [0]
    assert "task pope has no training split: it is evaluated with 0 shots, not with 4, 8 and 16" in caplog.text
    with pytest.raises(ValueError, match=r"task pope has no training split, so it cannot be evaluated with --shots 4 8: add 0, or leave"):
        TASKS["pope"].possible_shots([4, 8])


def test_scores_stand_with_their_standard_errors(tmp_path: Path) -> None:
    """In the table, in W&B, in the report and in TextCore's average; a result of an earlier version has none."""
    one = replace(_result({}), stderr=1.25)
    lines = list(table([one, _result({}, task="vqav2")]))
    assert "50.0 ±1.2" in lines[1] and "±" not in lines[2] and lines[-1].startswith("±: one standard error")
    assert metric_names([one])["evaluation/pope/0shot/stderr"] == 1.25
    (tmp_path / "metrics.jsonl").touch()
    (folder := tmp_path / "evaluation").mkdir()
    path = one.write(folder)
    assert read_results(folder)[0].stderr == 1.25 and "50.0 ±1.2" in benchmarks(read_run(tmp_path))
    document = json.loads(path.read_text())
    del document["stderr"]
    path.write_text(json.dumps(document))
    assert read_results(folder)[0].stderr is None
    texts = [replace(_result({}, task=task), stderr=3.0) for task in TEXTCORE]
    assert "50.0 ±1.0" in "\n".join(table(texts)), "3 / sqrt(9)"


def test_prompts_that_are_too_long_get_advice_that_can_be_followed() -> None:
    assert shorter_prompts(shots=4, may_be_lower=True) == ": use fewer shots or --low-resolution-demonstrations"
    assert shorter_prompts(shots=4, may_be_lower=False) == ": use fewer shots"
    assert shorter_prompts(shots=0, may_be_lower=True) == ""


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("--shots", "-1", 0), ("--batch-size", "0", 1), ("--beams", "-2", 1), ("--limit", "0", 1), ("--text-demonstrations", "-3", 0)],
)
def test_a_number_that_is_too_small_is_named_with_its_option(option: str, value: str, least: int) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: {value} is too small: give {least} or more"):
        run(Group("", {"evaluate": EVALUATE}), ["evaluate", "RUN", "--tasks", "pope", option, value], program="megatron-mm")
