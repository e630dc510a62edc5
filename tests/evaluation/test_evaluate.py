"""`megatron-mm evaluate` end to end: prompts, batches, resumes, bad images, every family, layouts and exports."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.distributed import run_processes
from support.published_files import write_all
from support.small import small_run
from support.small_infimm import infimm_run
from support.small_mono import mono_run

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.data.text.chat import chat_template
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.evaluation.passes import own_images
from megatron_mm.evaluation.prompts import BadImage, PromptBuilder, Wording
from megatron_mm.evaluation.results import Result, read_results, table
from megatron_mm.evaluation.runner import Options, _Items
from megatron_mm.evaluation.tasks.base import ImageSource
from megatron_mm.evaluation.tasks.registry import TASKS
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.registry import family_of
from megatron_mm.families.serialize import load_experiment
from megatron_mm.parallel.topology import Topology
from megatron_mm.run.evaluate_tasks import evaluate_tasks, open_target
from megatron_mm.run.start import start

RUNS: dict[str, Callable[..., Experiment]] = {"mm1": small_run, "infimm": infimm_run, "mono_internvl": mono_run}


def _train(family: str, data: Path, run_dir: Path) -> None:
    start(RUNS[family](data, steps=2, schedule_steps=4), run_dir)


def _evaluate(path: Path, files: Path, out: Path, tasks: list[str], shots: list[int], parallel: dict[str, Any]) -> list[Result]:
    target = open_target(path, None, out=out)
    experiment = replace(load_experiment(target.checkpoint / "experiment.json"), parallel=ParallelConfig(**parallel))
    options = Options(batch_size=3)
    return evaluate_tasks(experiment, target, [TASKS[name] for name in tasks], shots=shots, data=files, out=out, options=options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_all(data := tmp_path_factory.mktemp("tasks") / "data")
    return data


@pytest.fixture(scope="module")
def mm1(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_processes(_train, 1, "mm1", demo_data, run_dir := tmp_path_factory.mktemp("mm1") / "run")
    return run_dir


def _lines(out: Path) -> list[dict[str, Any]]:
    """Return the complete lines of all items."""
    texts = [line for path in sorted(out.glob("items/*/rank_*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in texts if line.endswith("}")]


def test_an_evaluation_resumes_and_a_bad_image_costs_an_item(mm1: Path, files: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(files, tmp_path / "data"))
    (data / "vqav2" / "val2014" / "COCO_val2014_000000000001.jpg").write_bytes(b"no image")
    tasks = ["vqav2", "scienceqa"]
    out = tmp_path / "results"
    ((result, choice),) = run_processes(_evaluate, 1, mm1, data, out, tasks, [1], {})
    assert (result.num_items, result.bad_items, choice.num_items) == (2, 1, 2)
    assert set(result.demonstrations) == {"0", "1", "2"} and all(len(shown) == 1 for shown in result.demonstrations.values())
    assert result.example_prompt == (
        f"<image>Question: What colour is square {result.demonstrations['0'][0]}? Short answer: red\n"
        "<image>Question: What colour is square 0? Short answer:"
    )
    assert choice.example_prompt.endswith("<image>Look.\nQuestion: Which?\nA. cat\nB. dog\nAnswer:")
    written = read_results(out)
    assert {one.task: one.scores for one in written} == {"vqav2": result.scores, "scienceqa": choice.scores}
    assert any("1 items of vqav2 were left out" in line for line in table(written, recipe="mm1_3b"))
    # Simulate an interruption: half a line of one task is left. Only items without a complete line are answered again.
    kept = next(out.glob("items/*vqav2*/rank_0.jsonl"))
    first, *_ = kept.read_text().splitlines()
    kept.write_text(first + "\n" + '{"key": "2", "ans')
    lines = len(_lines(out))
    ((again, _),) = run_processes(_evaluate, 1, mm1, data, out, tasks, [1], {})
    assert len(_lines(out)) == lines + 2, "only the items without a whole line are answered again"
    assert again.scores == result.scores and again.demonstrations == result.demonstrations


def _evaluate_in_settings(run_dir: Path, files: Path, out: Path) -> None:
    target = open_target(run_dir, None, out=out)
    experiment = load_experiment(target.checkpoint / "experiment.json")
    other = replace(experiment, data=replace(experiment.data, to_rgb="pillow"))
    form = "{image}Q: {question} A:"
    for options, given in ((Options(), experiment), (Options(method="rank", form=form), experiment), (Options(), other)):
        evaluate_tasks(given, target, [TASKS["pope"]], shots=[0, 4], data=files, out=out, options=options)


def test_other_settings_leave_the_result_of_the_tasks_own_setting_alone(mm1: Path, files: Path, tmp_path: Path) -> None:
    """Each setting has a file and answers of its own; a task without training split is evaluated with 0 shots alone."""
    run_processes(_evaluate_in_settings, 1, mm1, files, tmp_path)
    own, fields, form = sorted(tmp_path.glob("*.json"), key=lambda path: path.name.replace(".json", ""))
    assert (own.name, form.name) == ("step_00000002_pope_0shot.json", "step_00000002_pope_0shot_rank_form-751f7e.json")
    assert fields.name.startswith("step_00000002_pope_0shot_fields-")
    assert json.loads(fields.read_text())["setting"]["model"]["fields"] == {"data.to_rgb": "pillow"}
    assert len(list((tmp_path / "items").iterdir())) == 3


def test_prompts_of_chats_are_those_of_training(files: Path, demo_data: Path) -> None:
    """Demonstrations are turns with the wording of multi-task training; the prompt ends where the answer begins."""
    experiment = infimm_run(demo_data)
    family = family_of(experiment.model)
    image = family.image_input(experiment.model)
    tokenizer = Tokenizer.open(demo_data / "tokenizer.model", special=family.special_tokens)
    builder = PromptBuilder(tokenizer, image, threads=1, with_pixels=True)
    task = TASKS["vizwiz"]
    shown, asked = task.training_examples(files)[0], task.examples(files)[0]
    wording = Wording.of(task, chat_template("vicuna"))
    prompt = builder.build(wording, [shown, asked])
    text = tokenizer.decode(prompt.ids)
    sentence = (
        "When the provided information is insufficient, respond with 'Unanswerable'. Answer the question using a single word or phrase."
    )
    assert text.count(sentence) == 2 and "ASSISTANT: red" in text and text.endswith("ASSISTANT:")
    assert len(prompt.image_starts) == 2 and prompt.pixels is not None and len(prompt.pixels) == 2
    assert prompt.ids[prompt.image_starts[1] - 1 : prompt.image_starts[1] + 1] == image.ids(tokenizer.special_id, tiles=1)
    assert tokenizer.eos_id in builder.end_ids(wording) and image.ids(tokenizer.special_id, tiles=1)[0] in builder.end_ids(wording)
    base = builder.build(Wording.of(task, None), [asked])
    (yes, no) = builder.choice_ids(Wording.of(task, None), [asked], ["yes", "no"])
    whole = tokenizer.decode([*base.ids, *yes])
    assert whole.endswith("Short answer: yes") and yes != no
    flamingo = Wording.of(task, None, family_forms=family.prompt_forms)
    few = tokenizer.decode(builder.build(flamingo, [shown, asked]).ids)
    assert few.count("Question:What is it? Short answer:") == 2 and "Short answer:red" in few, "OpenFlamingo's form"
    ((letter,),) = [builder.choice_ids(wording, [asked], ["A"])]
    one = builder.build(wording, [asked])
    assert tokenizer.decode([*one.ids, *letter]).endswith("ASSISTANT: A"), "the template has a space before its answers"
    builder.close()


def test_demonstrations_may_be_shown_as_overviews_alone(files: Path, demo_data: Path) -> None:
    """MM1's mixed resolution: the question's image has an overview and four crops, the demonstrations' only overviews."""
    experiment = get_recipe("debug_mm1_sft")
    family = family_of(experiment.model)
    image = family.image_input(experiment.model)
    tokenizer = Tokenizer.open(demo_data / "tokenizer.model", special=family.special_tokens)
    builder = PromptBuilder(tokenizer, image, threads=1, with_pixels=True)
    task = TASKS["vqav2"]
    examples = [*task.training_examples(files)[:2], task.examples(files)[0]]
    high, low = (builder.write(Wording.of(task, None), examples, low_resolution=mixed) for mixed in (False, True))
    assert (len(high.prompt.image_starts), len(low.prompt.image_starts)) == (15, 7)
    assert len(high.prompt.ids) - len(low.prompt.ids) == 8 * image.tokens
    prompt, bad = builder.with_images(low, range(7))
    whole, _ = builder.with_images(high, range(15))
    assert not bad and prompt.pixels is not None and whole.pixels is not None
    assert torch.equal(prompt.pixels, whole.pixels[[0, 5, 10, 11, 12, 13, 14]])
    builder.close()


def test_each_image_is_decoded_by_one_process() -> None:
    counts, size = [1, 3, 0, 2, 5], 3
    shares = [own_images(counts, rank=rank, size=size) for rank in range(size)]
    for number, count in enumerate(counts):
        assert sorted(image for of_rank in shares for image in of_rank[number]) == list(range(count))
    assert [sum(map(len, of_rank)) for of_rank in shares] == [4, 4, 3]


def test_an_image_that_does_not_decode_is_named(files: Path, demo_data: Path, tmp_path: Path) -> None:
    """Whether its header or its pixels are damaged, and whether it is a file or bytes in a table."""
    experiment = infimm_run(demo_data)
    family = family_of(experiment.model)
    tokenizer = Tokenizer.open(demo_data / "tokenizer.model", special=family.special_tokens)
    builder = PromptBuilder(tokenizer, family.image_input(experiment.model), threads=1, with_pixels=True)
    wording = Wording.of(task := TASKS["vqav2"], None)
    example = task.examples(files)[0]
    whole = example.images[0].read()
    for number, data in enumerate((b"no image", whole[: len(whole) // 2])):
        (path := tmp_path / f"{number}.jpg").write_bytes(data)
        for source, name in ((ImageSource(path), str(path)), (ImageSource(data=data), f"image 1 of example {example.key}")):
            with pytest.raises(BadImage, match=f"^{name} does not decode$"):
                builder.build(wording, [replace(example, images=(source,))])
    with pytest.raises(BadImage, match=r"gone\.jpg cannot be read \(No such file or directory\)"):
        builder.build(wording, [replace(example, images=(ImageSource(tmp_path / "gone.jpg"),))])
    builder.close()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("{imge}Q", r"has the unknown field {imge}: did you mean {image}\? A form may have {image}, {question}, {context} and {choices}"),
        ("{picture}", r"has the unknown field {picture}: A form may have"),
        ("{}", r"has the unknown field {}: A form may have"),
        ("{image.x}", r"has the unknown field {image\.x}"),
        ("{image}}", r"cannot be read \(Single '}' .*\): write {{ and }} for braces"),
    ],
)
def test_a_wrong_form_is_refused_by_what_is_wrong(form: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--form '{re.escape(form)}' {message}"):
        Wording.of(TASKS["vqav2"], None, form=form)


def test_a_form_counts_as_given_where_it_changes_the_prompt() -> None:
    """It is not used in a chat template, except for tasks without images, and the task's own form is no difference."""
    forms = family_of(get_recipe("infimm_zephyr_7b_pt").model).prompt_forms
    other = "{image}Q: {question} A:"
    assert Wording.of(TASKS["vqav2"], None, form=other).given_form == other
    own = Wording.of(TASKS["vqav2"], None, family_forms=forms)
    assert Wording.of(TASKS["vqav2"], None, form=own.form, family_forms=forms) == own
    assert Wording.of(TASKS["vqav2"], chat_template("vicuna"), form=other).given_form is None
    assert Wording.of(TASKS["webqs"], chat_template("vicuna"), form="{question}?").given_form == "{question}?"


def _train_on_chats(family: str, data: Path, run_dir: Path) -> None:
    experiment = RUNS[family](data, steps=2, schedule_steps=4)
    start(replace(experiment, data=replace(experiment.data, mixture={"conversations": 1.0})), run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["infimm", "mono_internvl"])
def test_fine_tuned_stages_are_asked_in_their_chat_template(family: str, demo_data: Path, files: Path, tmp_path: Path) -> None:
    """For instruction tuning of InfiMM and Mono-InternVL, the template is that of the index of the run's data."""
    run_processes(_train_on_chats, 1, family, demo_data, run_dir := tmp_path / "run")
    tasks = ["vqav2", "scienceqa", "pope"]
    vqa, science, pope = run_processes(_evaluate, 1, run_dir, files, tmp_path / "results", tasks, [0], {})[0]
    assert vqa.setting["wording"] == "chat template, task vqa"
    assert vqa.example_prompt == "<image>What colour is square 0?\nAnswer the question using a single word or phrase.\n"
    assert science.example_prompt.endswith("A. cat\nB. dog\nAnswer with the option's letter from the given choices directly.\n")
    assert pope.num_items == 6 and set(pope.scores) >= {"score", "accuracy", "adversarial"}


@pytest.mark.slow
@pytest.mark.parametrize("family", RUNS)
def test_every_family_is_evaluated_alike_in_every_layout(family: str, demo_data: Path, tmp_path: Path) -> None:
    run_processes(_train, 1, family, demo_data, run_dir := tmp_path / "run")
    tasks = ["drawn_vqa", "drawn_caption"]
    expected = run_processes(_evaluate, 1, run_dir, demo_data, tmp_path / "one", tasks, [0, 2], {})[0]
    for number, (size, parallel) in enumerate([(4, {"tensor": 2, "pipeline": 2}), (2, {})]):
        found = run_processes(_evaluate, size, run_dir, demo_data, tmp_path / f"{number}", tasks, [0, 2], parallel, timeout=240)
        assert [one.scores for one in found[0]] == [one.scores for one in expected]
        assert _answers(tmp_path / f"{number}") == _answers(tmp_path / "one")


def _answers(out: Path) -> dict[str, Any]:
    return {
        f"{path.parent.name}/{row['key']}": row["answer"]
        for path in out.glob("items/*/rank_*.jsonl")
        for row in map(json.loads, path.open())
    }


def _export(run_dir: Path, out: Path) -> None:
    from megatron_mm.conversion.to_hf import convert_to_hf

    convert_to_hf(run_dir, out, dtype="float32")


@pytest.mark.slow
def test_an_exported_model_gives_what_its_run_gives(mm1: Path, demo_data: Path, tmp_path: Path) -> None:
    run_processes(_export, 1, mm1, export := tmp_path / "export")
    tasks = ["drawn_vqa"]
    (expected,) = run_processes(_evaluate, 1, mm1, demo_data, tmp_path / "run_results", tasks, [2], {})[0]
    (found,) = run_processes(_evaluate, 1, export, demo_data, tmp_path / "export_results", tasks, [2], {})[0]
    assert found.scores == expected.scores and found.setting["model"]["checkpoint"] == "export"


def _with_lmms_eval(run_dir: Path) -> tuple[list[str], list[tuple[float, bool]]]:
    from lmms_eval.api.instance import Instance
    from PIL import Image

    from megatron_mm.run.lmms_eval_model import MegatronMM

    model = MegatronMM(str(run_dir), batch_size=2)
    documents = [{"image": Image.new("RGB", (20, 30), colour)} for colour in ("red", "blue", "green")]
    model.task_dict = {"task": {"test": documents}}
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}

    def visuals(document: dict[str, Any]) -> list[Any]:
        return [document["image"]]

    asked = [("what colour? <image>", {"max_new_tokens": 4, "until": ["\n"]}, visuals, number, "task", "test") for number in range(3)]
    ranked = [(text, target, visuals, 0, "task", "test") for text in ("what colour?",) for target in (" red", " blue")]
    return (
        model.generate_until([Instance("generate_until", one, number, metadata) for number, one in enumerate(asked)]),
        model.loglikelihood([Instance("loglikelihood", one, number, metadata) for number, one in enumerate(ranked)]),
    )


@pytest.mark.slow
def test_lmms_eval_asks_a_run(mm1: Path) -> None:
    pytest.importorskip("lmms_eval")
    ((answers, likelihoods),) = run_processes(_with_lmms_eval, 1, mm1)
    assert len(answers) == 3 and all(value < 0 for value, _ in likelihoods)


def test_a_folder_that_cannot_be_written_is_named_with_the_option_for_another(tmp_path: Path) -> None:
    (tmp_path / "evaluation").touch()
    setting = {"model": {"checkpoint": "step_00000002"}, "task": "drawn_vqa", "shots": 0, "limit": 4}
    with pytest.raises(ValueError, match=r"evaluation/items/step_00000002_drawn_vqa_0shot.*: Not a directory: choose .* with --out FOLDER"):
        _Items(tmp_path / "evaluation", setting, cast(Topology, SimpleNamespace(is_main=True)))
