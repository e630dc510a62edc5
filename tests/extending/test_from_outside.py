"""A connector, a hook, a preprocessor, a decoder variant, a source format and a whole family from outside the package: the examples of
docs/extending.md train, resume, evaluate and export without a change to the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.small import packed_batch

from megatron_mm.cli.main import main
from megatron_mm.config import ConnectorConfig, Experiment
from megatron_mm.config.references import load_module
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.conversion.reader import CheckpointReader
from megatron_mm.conversion.to_hf import convert_to_hf
from megatron_mm.data.plan.plan import Plan
from megatron_mm.data.sources.index import open_source
from megatron_mm.evaluation.tasks.base import Answered
from megatron_mm.evaluation.tasks.registry import tasks_of
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.registry import family_of, register_family
from megatron_mm.families.serialize import from_dict, load_experiment, to_dict
from megatron_mm.models.chunk import document_bounds
from megatron_mm.models.connectors import connector_of
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.data import make_plan
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import find_checkpoint, load_weights

EXAMPLES = Path(__file__).parents[2] / "examples" / "extending"
PATCHES = f"{EXAMPLES / 'patch_family.py'}:debug_patches"


def train(recipe: str, run_dir: Path, data: Path, *, steps: int, more: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    quick = ["--train.steps", str(steps), "--train.global-batch-size", "4", "--data.sequence-length", "128", "--eval.interval", "0"]
    quick += ["--monitor.wandb", "disabled", "--data.decoder", "pillow", "--data.packing-window", "64"]
    main(["train", recipe, "--run-dir", str(run_dir), "--data.path", str(data), *quick, *more])
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_family_trains_resumes_exports_and_begins_as_what_was_exported(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    hook = f"{EXAMPLES / 'weight_norm_hook.py'}:WeightNorms"
    monkeypatch.chdir(EXAMPLES)  # so that it can be named by its file name alone
    train("patch_family.py:debug_patches", run_dir, demo_data, steps=1, more=("--extra-hooks", "weight_norm_hook.py:WeightNorms"))
    monkeypatch.chdir(tmp_path)
    resumed = train(PATCHES, run_dir, demo_data, steps=2, more=("--extra-hooks", hook))
    assert [line["step"] for line in resumed] == [1, 2] and np.isfinite(resumed[-1]["loss"])
    assert [json.loads(line)["step"] for line in (run_dir / "weight_norms.jsonl").read_text().splitlines()] == [1, 2]
    saved = load_experiment(run_dir / "config.json")
    assert saved.extensions == (str(EXAMPLES / "patch_family.py"),) and saved.extra_hooks == (hook,)
    exported = convert_to_hf(run_dir, tmp_path / "hf")
    assert load_file(tmp_path / "hf" / "model.safetensors")["patch_projection.weight"].shape == (128, 3 * 8 * 8)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "has no modeling code" in card and "from_pretrained" not in card
    imported = convert_from_hf(get_recipe(PATCHES), tmp_path / "again", whole=tmp_path / "hf")
    before, after = (CheckpointReader(path) for path in (run_dir / "checkpoints" / "step_00000002", imported.checkpoint))
    assert exported.num_tensors == 40 and imported.sources == {"whole (patches)": imported.num_parameters}
    assert all(torch.equal(after.read(name, row=None), before.read(name, row=None)) for name in after.names())


def test_a_connector_and_a_preprocessor_and_what_they_change(demo_data: Path, tmp_path: Path) -> None:
    """The preprocessor drops samples before planning, so they are never read."""
    recipe = get_recipe(f"{EXAMPLES / 'pixel_shuffle_connector.py'}:debug_pixel_shuffle")
    assert from_dict(Experiment, to_dict(recipe)) == recipe, "settings of its own come back"
    (tmp_path / "drop.py").write_text(DROP_MANY)
    train(
        f"{EXAMPLES / 'pixel_shuffle_connector.py'}:debug_pixel_shuffle",
        tmp_path / "run",
        demo_data,
        steps=1,
        more=("--data.preprocessors", f"{tmp_path / 'drop.py'}:only_the_first", "--data.mixture", "pairs=1.0"),
    )
    plan = make_plan(load_experiment(tmp_path / "run" / "config.json"), split="train")
    assert [len(index) for index in plan.indexes] == [20]
    with pytest.raises(
        ValueError, match="exported MM1 models have code for the connectors average, attention, c_abstractor, but not for 'pixel_sh"
    ):
        convert_to_hf(tmp_path / "run", tmp_path / "hf")


DROP_MANY = '''
import numpy as np


class First:
    """The first samples of a source."""

    def __init__(self, source, count):
        self.source, self.count = source, count

    def __len__(self):
        return min(self.count, len(self.source))

    def __getattr__(self, name):
        return getattr(self.source, name)


def only_the_first(source):
    return First(source, 20)
'''


@pytest.fixture(scope="module")
def table(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of pictures and a table of their captions, with the demo's tokenizer."""
    root = tmp_path_factory.mktemp("table")
    folder = root / "train" / "pairs"
    folder.mkdir(parents=True)
    (root / "tokenizer.model").write_bytes((demo_data / "tokenizer.model").read_bytes())
    rows = []
    for number in range(40):
        Image.new("RGB", (20 + number, 30), (number * 5, 100, 50)).save(folder / f"{number}.png")
        rows.append(f"{number}.png\t{number} red circles")
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n")
    return root


def test_a_source_format(table: Path, tmp_path: Path) -> None:
    extension = str(EXAMPLES / "captions_source.py")
    lines = train("debug_mm1", tmp_path / "run", table, steps=1, more=("--extensions", extension, "--data.mixture", "pairs=1.0"))
    assert lines[0]["images"] > 4 and lines[0]["bad_samples"] == {}
    plan: Plan = make_plan(load_experiment(tmp_path / "run" / "config.json"), split="train")
    (source,) = plan.indexes
    assert type(source).__name__ == "CaptionTable" and source.document(7) == b"7 red circles"
    (table / "train" / "pairs" / "captions.tsv").open("a").write("missing.png\tnothing\n")
    with pytest.raises(ValueError, match=r"captions.tsv, line 41: .* is not the name of a file"):
        make_plan(load_experiment(tmp_path / "run" / "config.json"), split="train")


def test_a_variant_of_the_layers(demo_data: Path, tmp_path: Path) -> None:
    """The example's export loads as a Qwen3 in transformers, with the same logits as ours."""
    transformers = pytest.importorskip("transformers")
    train(f"{EXAMPLES / 'qk_norm_decoder.py'}:debug_qk_norm", tmp_path / "run", demo_data, steps=2)
    convert_to_hf(tmp_path / "run", tmp_path / "hf", part="language")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
    assert torch.allclose(_logits(tmp_path / "run", ids), expected, atol=2e-5)
    recipe = get_recipe(f"{EXAMPLES / 'qk_norm_decoder.py'}:debug_qk_norm")
    again = convert_from_hf(recipe, tmp_path / "again", language=tmp_path / "hf")
    assert again.sources["language (llama)"] == sum(p.numel() for p in theirs.parameters())


def test_a_decoder_variant(demo_data: Path, tmp_path: Path) -> None:
    """With the other activation in its config.json, the export has the same logits in transformers."""
    transformers = pytest.importorskip("transformers")
    train(f"{EXAMPLES / 'geglu_decoder.py'}:debug_geglu", tmp_path / "run", demo_data, steps=1)
    convert_to_hf(tmp_path / "run", tmp_path / "hf", part="language")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.config.hidden_act == "gelu"
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
    assert torch.allclose(_logits(tmp_path / "run", ids), expected, atol=2e-5)
    again = convert_from_hf(get_recipe(f"{EXAMPLES / 'geglu_decoder.py'}:debug_geglu"), tmp_path / "again", language=tmp_path / "hf")
    assert again.sources["language (llama)"] == sum(p.numel() for p in theirs.parameters())
    with pytest.raises(ValueError, match=r"variant is geglu there and llama in the recipe"):
        convert_from_hf(get_recipe("debug_mm1"), tmp_path / "other", language=tmp_path / "hf")


def _logits(run_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return our logits of the decoder alone: [1, tokens, vocabulary]."""
    no_images = torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    experiment = load_experiment(run_dir / "config.json")
    topology = topologies.initialize(experiment.parallel, seed=1)
    try:
        model = build_model(experiment, topology)
        load_weights(experiment, topology, model, find_checkpoint(run_dir))
        chunk, batch = (
            model[0].module,
            packed_batch(ids[0], bounds=[0, len(ids[0])], starts=[], masked_id=0, pixels=no_images),
        )
        embedded = chunk.language.embedding(input_ids=ids, position_ids=batch.position_ids[None])
        return chunk.decode(batch, embedded, document_bounds(batch), with_loss=False).detach().float()
    finally:
        topologies.shutdown()


def test_names_are_taken_once() -> None:
    family = family_of(get_recipe(PATCHES).model)
    register_family(family)  # again, which changes nothing
    with pytest.raises(ValueError, match="a family 'patches' is already registered"):
        register_family(type(family)())


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere.py:recipe", r"there is no file .*nowhere.py: correct the path"),
        ("no.such.module:recipe", "there is no module 'no.such.module': install its package or put its folder on PYTHONPATH"),
        (f"{EXAMPLES / 'patch_family.py'}:debug_patch", "defines no 'debug_patch': did you mean debug_patches?"),
        (f"{EXAMPLES / 'patch_family.py'}:MEAN", "is not a recipe: it returns tuple instead of an Experiment"),
        (":recipe", "':recipe' is not a reference: write FILE.py:NAME or MODULE:NAME"),
    ],
)
def test_a_wrong_reference_says_what_is_wrong(reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_recipe(reference)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("train=replace(base.train, steps=2e3)", "broken: train.steps is 2000.0, but must be an integer"),
        ("train=replace(base.train, precision='fp16')", "broken: train.precision is 'fp16', but must be one of 'fp32', 'bf16', 'fp8'"),
        ("optimizer=None", "broken: optimizer is None, but must be an OptimizerConfig"),
        ("data=replace(base.data, mixture={'pairs': '1'})", "broken failed, line 6: data.mixture is {'pairs': '1'}, but must be a dict"),
        ("train={'steps': 3}", "broken: train is {'steps': 3}, but must be a TrainConfig"),
        ("init_from='runs/first'", "broken: init_from is 'runs/first', but must be a pathlib.Path or None"),
        ("train=replace(base.train, steps='9')", "broken failed, line 6: steps is '9', but must be a positive number"),
        (
            "train=replace(base.train, step=9)",
            "broken failed, line 6: TypeError: TrainConfig.__init__() got an unexpected keyword argument",
        ),
    ],
)
def test_a_wrong_value_in_a_recipe_is_named(tmp_path: Path, changes: str, message: str) -> None:
    lines = ["from dataclasses import replace", "from megatron_mm.families.recipes import get_recipe", "def broken():"]
    lines += ["    base = get_recipe('debug_mm1')", "    return replace(base,", f"        {changes})"]
    (tmp_path / "own.py").write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        get_recipe(f"{tmp_path / 'own.py'}:broken")
    assert str(error.value).startswith(f"recipe {tmp_path / 'own.py'}:{message}")


def test_a_list_may_stand_for_a_tuple(tmp_path: Path) -> None:
    lines = ["from dataclasses import replace", "from megatron_mm.families.recipes import get_recipe", "def own():"]
    lines += ["    base = get_recipe('debug_mm1')", "    layout = replace(base.parallel, pipeline=2, stage_layers=[2, 2])"]
    (tmp_path / "own.py").write_text("\n".join([*lines, "    return replace(base, parallel=layout)"]))
    assert list(get_recipe(f"{tmp_path / 'own.py'}:own").parallel.stage_layers) == [2, 2]


def test_the_documented_recipe_trains(demo_data: Path, tmp_path: Path) -> None:
    (line,) = train(f"{EXAMPLES / 'own_recipe.py'}:wide_mm1", tmp_path / "run", demo_data, steps=1)
    assert set(line["losses"]) <= {"pairs", "text"} and load_experiment(tmp_path / "run" / "config.json").recipe == "wide_mm1"


def test_a_kind_of_connector_needs_its_configuration() -> None:
    load_module(str(EXAMPLES / "pixel_shuffle_connector.py"))
    with pytest.raises(
        ValueError, match=r"'pixel_shuffle' is configured by PixelShuffleConfig, but model.connector is a ConnectorConfig: set"
    ):
        connector_of(ConnectorConfig(kind="pixel_shuffle", num_tokens=16))
    with pytest.raises(
        ValueError, match=r"connector.kind is 'strips', but must be one of .*: to use your own, add its file to `extensions`"
    ):
        connector_of(ConnectorConfig(kind="strips", num_tokens=16))


def test_what_a_file_raises_is_said_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import a_module_that_nobody_has\n")
    with pytest.raises(ValueError, match=r"extension .*broken.py failed, line 1: ModuleNotFoundError: .*a_module_that_nobody_has"):
        load_module(str(tmp_path / "broken.py"))


def test_a_lost_extension_is_named(tmp_path: Path) -> None:
    values = {**to_dict(get_recipe(PATCHES)), "extensions": [str(tmp_path / "mine" / "gone.py")]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"extensions of .*experiment.json: there is no file .*gone.py: correct the path"):
        load_experiment(tmp_path / "run" / "experiment.json")


def test_the_documentation_quotes_the_files() -> None:
    text = (EXAMPLES.parents[1] / "docs" / "extending.md").read_text()
    files = [path.read_text() for path in EXAMPLES.glob("*.py")]
    quoted = [block.partition("\n```")[0] for block in text.split("```python\n")[1:]]
    assert len(quoted) >= 8
    for block in quoted:
        assert any(block in file for file in files), f"docs/extending.md quotes what no file has:\n{block}"


def test_the_documented_preprocessor(demo_data: Path) -> None:
    preprocessor = load_module(str(EXAMPLES / "large_images.py")).large_images
    source = open_source(demo_data / "train" / "pairs")
    sizes = source.image_sizes(slice(None))
    kept = preprocessor(source)
    assert len(kept) == (np.minimum(sizes.widths, sizes.heights) >= 100).sum()
    assert 0 < len(kept) < len(source)
    assert kept.document(0) == source.document(int(kept.rows[0])) and kept.kind == "pairs"


def test_a_benchmark_is_read_from_its_files(tmp_path: Path) -> None:
    place = f"{EXAMPLES / 'colour_task.py'}:COLOURS"
    (task, known) = tasks_of([place, "vqav2"])
    assert (task.name, known.name) == ("colours", "vqav2")
    folder = tmp_path / "colours"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "images" / "1.png")
    (folder / "test.jsonl").write_text('{"image": "1.png", "colour": "red"}\n')
    (example,) = task.examples(tmp_path)
    assert example.answer == "red" and task.score([Answered(example, "Red.")])["score"] == 100
    (folder / "test.jsonl").write_text('{"image": "1.png"}\n')
    with pytest.raises(ValueError, match=r"task colours: .*test\.jsonl is not in its published format: an entry lacks 'colour'"):
        task.examples(tmp_path)
    with pytest.raises(ValueError, match=r"colour_task\.py:read is a function, but must be a Task"):
        tasks_of([f"{EXAMPLES / 'colour_task.py'}:read"])
