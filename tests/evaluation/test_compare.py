"""Pictures of several runs' results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm.conversion.export_settings import write_export_settings
from megatron_mm.evaluation.compare import compare, panels_of, read_run
from megatron_mm.evaluation.results import Result, read_results, table, textcore
from megatron_mm.evaluation.tasks.registry import GROUPS, TASKS, TEXTCORE, tasks_of
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.serialize import save_experiment


def _result(task: str, shots: int, score: float, *, step: int = 10, limit: int | None = None) -> Result:
    model = {"name": "run", "recipe": "mm1_3b", "checkpoint": f"step_{step:08d}", "step": step}
    setting = {"task": task, "shots": shots, "model": model, "limit": limit}
    return Result(task, task, "%", {"score": score}, setting, 5, 0, {}, "", 1.0)


def _run(folder: Path, recipe: str, scores: dict[tuple[str, int], float]) -> Path:
    (folder / "evaluation").mkdir(parents=True)
    save_experiment(get_recipe(recipe), folder / "config.json")
    for (task, shots), score in scores.items():
        _result(task, shots, score).write(folder / "evaluation")
        _result(task, shots, 0.0, step=5).write(folder / "evaluation")
        _result(task, shots, 99.0, limit=3).write(folder / "evaluation")
    return folder


def test_ablations_are_drawn_with_what_they_change(tmp_path: Path) -> None:
    """Results of the newest checkpoint count, those of partial tasks do not; the mean is over the tasks that all runs have."""
    mm1 = {(task, 4): 10.0 for task in GROUPS["mm1"]}
    text = {(task, 0): 50.0 for task in TEXTCORE}
    first = _run(tmp_path / "a", "mm1_ablation_average_64", {**mm1, **text, ("vqav2", 4): 17.0})
    second = _run(tmp_path / "b", "mm1_ablation_attention_144", {**mm1, **text, ("gqa", 4): 1.0})
    out = tmp_path / "figure.png"
    lines = list(compare([first, second], out=out))
    assert out.stat().st_size > 5000
    panels = json.loads(out.with_suffix(".json").read_text())["panels"]
    average, attention = panels["4 shots, MM1's 7 tasks"].items()
    assert average == ("average, tokens 64", 11.0) and attention == ("attention, tokens 144", 10.0)
    assert set(panels["TextCore, 0 shots"].values()) == {50.0}
    assert "average, tokens 64" in lines[1]
    other = _run(tmp_path / "c", "mm1_ablation_mix_66_33_0", mm1)
    mixed = _run(tmp_path / "d", "mm1_ablation_mix_100_0_0", mm1)
    list(compare([other, mixed], out=out))
    assert all("% " in label for label in json.loads(out.with_suffix(".json").read_text())["panels"]["4 shots, MM1's 7 tasks"])


def test_runs_without_results_are_refused(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", "mm1_ablation", {("vqav2", 0): 1.0})
    with pytest.raises(ValueError, match="has no results of whole tasks"):
        list(compare([run, tmp_path], out=tmp_path / "x.png"))
    with pytest.raises(ValueError, match="at least two runs"):
        list(compare([run], out=tmp_path / "x.png"))


def test_unlike_results_are_not_compared(tmp_path: Path) -> None:
    """Partial tasks, and tasks with another wording, are not compared; labels show different steps."""
    runs = [
        _run(tmp_path / name, recipe, {("vqav2", 0): 1.0}) for name, recipe in (("a", "mm1_ablation"), ("b", "mm1_ablation_attention_64"))
    ]
    _result("vqav2", 0, 2.0, step=20).write(runs[1] / "evaluation")
    lines = list(compare(runs, out=tmp_path / "x.png"))
    assert "step 10" in lines[1] and "step 20" in lines[2]
    asked = _result("vqav2", 0, 2.0, step=20)
    asked.setting["wording"] = "{image}Question: {question}"
    asked.write(runs[1] / "evaluation")
    with pytest.raises(
        ValueError, match=r"vqav2 with 0 shots was evaluated with different settings: wording is None in .*a and '{image}Question"
    ):
        list(compare(runs, out=tmp_path / "x.png"))
    for path in (runs[1] / "evaluation").glob("step*shot.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no results of whole tasks .*1 results with --limit 3 are not compared"):
        list(compare(runs, out=tmp_path / "x.png"))


def test_other_settings_and_metrics_have_panels_of_their_own(tmp_path: Path) -> None:
    """Scores of different metrics are averaged only over MM1's tasks, and the axis says so; a task without a common setting is refused."""
    both = [(tmp_path / name, recipe) for name, recipe in (("a", "mm1_ablation"), ("b", "mm1_ablation_attention_64"))]
    runs = [_run(folder, recipe, {}) for folder, recipe in both]
    for task in ("coco_caption", "vqav2", "okvqa", "gqa"):
        for number, run in enumerate(runs):
            result = replace(_result(task, 0, 10.0 * number), metric=TASKS[task].metric)
            result.write(run / "evaluation")
            result.setting["seed"] = 7
            replace(result, scores={"score": 5.0}).write(run / "evaluation")
    lines = "\n".join(compare(runs, out=tmp_path / "x.png"))
    written = json.loads((tmp_path / "x.json").read_text())
    titles = ["0 shots, coco_caption", "0 shots, gqa", "0 shots, 2 tasks in VQA accuracy, %"]
    assert set(written["panels"]) == {*titles, *(f"{title}, --seed 7" for title in titles)}
    assert [written["metrics"][title] for title in titles] == ["CIDEr-D x 100", "accuracy, %", "mean of VQA accuracy, % (2 tasks)"]
    assert list(written["panels"][titles[2]].values()) == [0.0, 10.0]
    assert set(written["panels"][f"{titles[2]}, --seed 7"].values()) == {5.0}
    assert "metric of 0 shots, coco_caption: CIDEr-D x 100" in lines
    for path in (runs[1] / "evaluation").glob("*_gqa_0shot.json"):
        path.unlink()
    for path in (runs[0] / "evaluation").glob("*_gqa_0shot_seed7.json"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"gqa with 0 shots was evaluated with different settings: its own setting in .*a, --seed 7 in .*b"
    ):
        list(compare(runs, out=tmp_path / "x.png"))
    for run in runs:
        for task in GROUPS["mm1"]:
            replace(_result(task, 4, 1.0), metric=TASKS[task].metric).write(run / "evaluation")
    (panel,) = [panel for panel in panels_of([read_run(run) for run in runs]) if panel.title.startswith("4 shots")]
    assert panel.metric == "mean of CIDEr-D x 100 (3 tasks) and VQA accuracy, % (4 tasks)"


def test_an_export_is_compared_with_its_run(tmp_path: Path) -> None:
    """The config.json of an export is Hugging Face's; its own settings are beside it, or nowhere in a released model."""
    run = _run(tmp_path / "run", "mm1_ablation", {("vqav2", 0): 1.0})
    exports = [tmp_path / "export", tmp_path / "released"]
    for export in exports:
        (export / "evaluation").mkdir(parents=True)
        (export / "config.json").write_text('{"model_type": "mm1", "text_config": {}}')
        result = _result("vqav2", 0, 2.0, step=0)
        result.setting["model"]["checkpoint"] = "export"
        result.write(export / "evaluation")
    write_export_settings(exports[0], get_recipe("mm1_ablation"))
    lines = list(compare([run, *exports], out=tmp_path / "x.png"))
    assert [line.split("  ")[0] for line in lines[2:4]] == ["export, export", "released, export"]
    assert lines[1].startswith("run, step 10 ") and lines[1].endswith(" 1.0")
    list(compare([run, exports[0]], out=tmp_path / "x.png"))
    (panel,) = json.loads((tmp_path / "x.json").read_text())["panels"].values()
    assert panel == {"run, step 10": 1.0, "export, export": 2.0}
    with pytest.raises(ValueError, match=r"nowhere does not exist: give run directories or exported models"):
        list(compare([run, tmp_path / "nowhere"], out=tmp_path / "x.png"))


def test_runs_of_different_families_are_labelled_with_what_they_have(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name, name, {("vqav2", 0): 1.0}) for name in ("mm1_ablation", "infimm_zephyr_7b_pt")]
    lines = list(compare(runs, out=tmp_path / "x.png"))
    assert lines[1].startswith("mm1, ") and lines[2].startswith("infimm, ") and "None" not in "".join(lines)


def test_some_of_textcores_tasks_have_a_panel_where_not_all_are_there(tmp_path: Path) -> None:
    few = {("arc_easy", 0): 40.0, ("vqav2", 0): 1.0}
    runs = [_run(tmp_path / "a", "mm1_ablation", few), _run(tmp_path / "b", "mm1_ablation_attention_64", few)]
    list(compare(runs, out=tmp_path / "x.png"))
    panels = json.loads((tmp_path / "x.json").read_text())["panels"]
    assert set(panels) == {"0 shots, vqav2", "0 shots, arc_easy"} and set(panels["0 shots, arc_easy"].values()) == {40.0}
    for run in runs:
        _result(TEXTCORE[-1], 0, 20.0).write(run / "evaluation")
    list(compare(runs, out=tmp_path / "x.png"))
    panels = json.loads((tmp_path / "x.json").read_text())["panels"]
    assert set(panels[f"0 shots, 2 of TextCore's {len(TEXTCORE)} tasks"].values()) == {30.0}


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'arc_esay': did you mean arc_easy\? choose from"):
        tasks_of(["arc_esay"])


def test_the_table_has_published_figures_beside_results() -> None:
    rows = [_result("coco_caption", 8, 100.0), _result("coco_caption", 0, 50.0), _result("gqa", 0, 40.0)]
    lines = list(table(rows, recipe="mm1_3b"))
    assert "50.0" in lines[1] and "100.0" in lines[1]
    assert "published" in lines[2] and "73.5" in lines[2] and "114.6" in lines[2] and "MM1-3B" in lines[2]
    assert any(line.startswith("published: MM1, arXiv 2403.09611") for line in lines)
    assert not any("published" in line for line in table(rows, recipe="debug_mm1"))


def test_textcore_needs_all_of_its_tasks() -> None:
    whole = [_result(task, 0, float(number)) for number, task in enumerate(TEXTCORE)]
    assert textcore(whole) == {0: sum(range(len(TEXTCORE))) / len(TEXTCORE)}
    assert textcore(whole[1:]) == {}


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not a result"):
        read_results(tmp_path)
