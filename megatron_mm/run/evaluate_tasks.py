"""`megatron-mm evaluate`: runs benchmarks on a run's checkpoint or an exported model, in any layout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm.config import Experiment
from megatron_mm.conversion.export_settings import read_export_settings
from megatron_mm.data.text.chat import chat_template
from megatron_mm.evaluation.generation import Generator
from megatron_mm.evaluation.prompts import PromptBuilder, Wording
from megatron_mm.evaluation.results import Result, metric_names, table
from megatron_mm.evaluation.runner import Options, TaskRunner
from megatron_mm.evaluation.settings import suffix
from megatron_mm.evaluation.tasks.base import Task
from megatron_mm.families.registry import family_of
from megatron_mm.families.serialize import load_experiment, to_dict
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.topology import Topology
from megatron_mm.reporting.report_details import flat
from megatron_mm.reporting.run_files import LOCK_FILE
from megatron_mm.reporting.wandb_run import RUN_ID_FILE, WandbRun
from megatron_mm.run.data import image_input, open_tokenizer
from megatron_mm.run.evaluate import agreed
from megatron_mm.training.build import build_chunks, report_layers
from megatron_mm.training.checkpoint import find_checkpoint, load_weights
from megatron_mm.training.checkpoint.names import MANIFEST

logger = logging.getLogger(__name__)

FOLDER = "evaluation"
"""Folder of results, in the run directory or the exported model."""
_DECODE_THREADS = 4


@dataclass(frozen=True)
class Target:
    """A checkpoint or exported model to evaluate."""

    path: Path
    """A run directory, a checkpoint, or an exported model."""
    checkpoint: Path
    is_export: bool
    own: Experiment | None = None
    """The experiment of an exported model before options changed it, or the one that it states; a checkpoint has its own."""

    @property
    def folder(self) -> Path:
        """The run directory or the exported model; for a checkpoint copied out of its run, the folder that contains it."""
        if self.is_export:
            return self.path
        return self.checkpoint.parents[1] if self.checkpoint.parent.name == "checkpoints" else self.checkpoint.parent

    @property
    def step(self) -> int:
        """Training step after which the checkpoint was saved; 0 for an exported model."""
        return 0 if self.is_export else int(json.loads((self.checkpoint / MANIFEST).read_text())["step"])

    @property
    def name(self) -> str:
        """Name of the target in results."""
        return "export" if self.is_export else self.checkpoint.name


def is_export(path: Path) -> bool:
    """Whether a folder is an exported model (written by `convert to-hf`, or released)."""
    return (path / "config.json").is_file() and bool(list(path.glob("*.safetensors*")))


def open_target(path: Path, recipe: Experiment | None, *, out: Path | None, own: Experiment | None = None) -> Target:
    """Open a run, a checkpoint or an exported model. The weights of an exported model are converted once, to a checkpoint below its
    results.

    Args:
        recipe: experiment of an exported model; None for the one that it states.
        own: the same before options changed it, for an exported model that states none.

    Raises ValueError if there is no checkpoint, or if the recipe of an exported model is not known or does not fit.
    """
    if not is_export(path):
        return Target(path, _resolved(find_checkpoint(path)), is_export=False)
    stated = read_export_settings(path)
    recipe = recipe or stated
    if recipe is None:
        raise ValueError(no_recipe(path))
    weights = (out or path / FOLDER) / f"weights_{_digest(recipe)}"  # one copy for each set of settings
    if int(os.environ.get("RANK", "0")) == 0 and not list(weights.glob("checkpoints/step_*/manifest.json")):
        from megatron_mm.conversion.from_hf import convert_from_hf

        logger.info("%s: reading the exported weights into %s", path, weights)
        convert_from_hf(recipe, weights, whole=path, resize_positions=False)
    return Target(path, _wait_for(weights), is_export=True, own=stated or own or recipe)


def no_recipe(path: Path) -> str:
    """The message for an exported model whose recipe is not known."""
    return f"{path} is an exported model that states no recipe of this version: name it, such as --recipe mm1_3b"


def _resolved(checkpoint: Path) -> Path:
    """Resolve a link such as `best` to the checkpoint that it points to."""
    return checkpoint.resolve() if checkpoint.is_symlink() else checkpoint


@contextlib.contextmanager
def _while_it_is_there(checkpoint: Path) -> Iterator[None]:
    """Raise a ValueError that explains the cause if reading fails because training has removed the checkpoint in the meantime."""
    try:
        yield
    except Exception as error:
        if (checkpoint / MANIFEST).is_file():
            raise
        raise ValueError(
            f"{checkpoint} was removed while it was read: its training run keeps only the newest ones (checkpoint.keep). Evaluate the run "
            "directory again, which uses its newest, or train with --checkpoint.keep-every"
        ) from error


def _digest(experiment: Experiment) -> str:
    """Hash of the settings that change answers: the model, its images, the chat template, and the number format."""
    settings = list(_settings(experiment).values())
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _settings(experiment: Experiment) -> dict[str, Any]:
    """Settings that change answers, by their names in the experiment."""
    data = experiment.data
    return {
        "model": to_dict(experiment)["model"],
        "data.to_rgb": data.to_rgb,
        "data.min_tiles": data.min_tiles,
        "data.max_tiles": data.max_tiles,
        "data.chat_template": data.chat_template,
        "train.precision": experiment.train.precision,
    }


def _changed_fields(own: Experiment, given: Experiment) -> dict[str, str]:
    """Return the fields that change answers and whose values options have changed -> their values."""
    before, after = (dict(flat(_settings(experiment))) for experiment in (own, given))
    return {name: after.get(name, "None").strip('"') for name in {**before, **after} if before.get(name) != after.get(name)}


def _tell_unused_form(tasks: Sequence[Task], wordings: Sequence[Wording], form: str | None) -> None:
    """Warn about tasks whose prompts are written in a chat template, so that --form does not change them."""
    unused = [task.name for task, wording in zip(tasks, wordings, strict=True) if not wording.uses_form(task)]
    if form is not None and unused:
        logger.warning(
            "--form is ignored for %s: their prompts are written in the chat template (--data.chat-template None leaves it out)",
            ", ".join(unused),
        )


def _wait_for(weights: Path, *, minutes: float = 120) -> Path:
    """Wait for the checkpoint that the first process converts. Raises ValueError if it does not appear in time."""
    for _ in range(int(60 * minutes)):
        try:
            return find_checkpoint(weights)
        except ValueError:
            time.sleep(1)
    raise ValueError(f"no checkpoint appeared in {weights} within {minutes:.0f} minutes: see the output of the first process")


def for_evaluation(experiment: Experiment, checkpoint: Path) -> Experiment:
    """The experiment as it is evaluated: in bf16 instead of FP8, whose products need rows in multiples of 16; with room for all tokens in
    every expert; with the checkpoint's own tokenizer."""
    train = replace(experiment.train, precision="bf16") if experiment.train.precision == "fp8" else experiment.train
    model, moe = experiment.model, experiment.model.decoder.moe
    if moe is not None and moe.capacity_factor is not None:
        logger.info("every expert accepts all tokens, although training used a capacity factor of %s", moe.capacity_factor)
        model = replace(model, decoder=replace(model.decoder, moe=replace(moe, capacity_factor=None)))
    own = checkpoint / "tokenizer.model"
    data = replace(experiment.data, tokenizer=own) if own.is_file() else experiment.data
    return replace(experiment, train=train, model=model, data=data)


class BareChunk(torch.nn.Module):
    """A pipeline chunk without training's data-parallel wrapper: no gradients, and no memory for them."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.config = module.config
        module.requires_grad_(False)

    def forward(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return self.module(*arguments, **options)


def load_model(experiment: Experiment, topology: Topology, checkpoint: Path) -> list[torch.nn.Module]:
    """Build the chunks of this process with a checkpoint's weights, from any layout.

    Args:
        experiment: the checkpoint's experiment; `for_evaluation` is applied to it here.
    """
    experiment_here = for_evaluation(experiment, checkpoint)
    report_layers(experiment_here, topology)
    chunks = [BareChunk(chunk) for chunk in build_chunks(experiment_here, topology)]
    load_weights(experiment, topology, chunks, checkpoint)
    for chunk in chunks:
        chunk.eval()
    return list(chunks)


def evaluate_tasks(
    experiment: Experiment, target: Target, tasks: Sequence[Task], *, shots: Sequence[int], data: Path, out: Path | None, options: Options
) -> list[Result]:
    """Evaluate a checkpoint on tasks in the layout of the experiment. Results are written to `out` and returned in order of tasks and
    shots.

    Raises ValueError, before the model is built, if a task's files are missing or damaged or the layout does not fit.
    """
    if experiment.data.images != "true":
        raise ValueError(f"data.images is {experiment.data.images}, but benchmarks use only true images: remove data.images")
    if options.low_resolution_demonstrations and image_input(experiment).sub_images is None:
        raise ValueError(
            f"--low-resolution-demonstrations: {experiment.recipe} shows images as they are, not as an overview and crops: remove it"
        )
    family_of(experiment.model).check_layout(experiment.model, experiment.parallel, topologies.world_size())
    template = None if experiment.data.chat_template is None else chat_template(experiment.data.chat_template)
    forms = family_of(experiment.model).prompt_forms
    wordings = [Wording.of(task, template, form=options.form, family_forms=forms) for task in tasks]
    _tell_unused_form(tasks, wordings, options.form)
    shots_of = {task.name: task.possible_shots(shots) for task in tasks}
    for task in tasks:  # report missing files now, not after hours
        task.check_method(options.method)
        task.examples(data)
        if max(shots_of[task.name]) or options.text_demonstrations:
            task.training_examples(data)
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    out, builder = out or target.folder / FOLDER, None
    try:
        target = replace(target, checkpoint=agreed(target.checkpoint))
        with _while_it_is_there(target.checkpoint):
            model = {"name": target.folder.name, "recipe": experiment.recipe, "checkpoint": target.name, "step": target.step}
            built = for_evaluation(experiment, target.checkpoint)
            tokenizer = open_tokenizer(built)
            chunks = load_model(experiment, topology, target.checkpoint)
        builder = PromptBuilder(tokenizer, image_input(built), threads=_DECODE_THREADS, with_pixels=topology.is_first_stage)
        runner = TaskRunner(Generator(built, chunks, topology, pad_id=tokenizer.pad_id), builder, topology, out=out, options=options)
        model["settings"] = _digest(experiment)  # so that answers from other settings are not reused
        own = target.own or load_experiment(target.checkpoint / "experiment.json")
        if changed := _changed_fields(own, experiment):
            model["fields"] = changed
        results = [
            runner.run(task, shots=count, data=data, wording=wording, model=model)
            for task, wording in zip(tasks, wordings, strict=True)
            for count in shots_of[task.name]
        ]
        if topology.is_main and not target.is_export:
            log_to_wandb(experiment, target.folder, results, step=target.step)
        return results
    finally:
        if builder is not None:
            builder.close()
        topologies.shutdown()


def log_to_wandb(experiment: Experiment, run_dir: Path, results: Sequence[Result], *, step: int) -> None:
    """Log scores at the checkpoint's step in the run's own W&B run; while the run is still training, in a separate one."""
    if not (run_dir / RUN_ID_FILE).is_file():
        return  # training did not log there, or the checkpoint is not in its run
    is_training = (run_dir / LOCK_FILE).exists()
    run = WandbRun(experiment, run_dir, world_size=topologies.world_size(), part="evaluation", own_run=is_training)
    if run.is_on and is_training:
        logger.info("the run is training: scores go to a separate W&B run, called %s evaluation", run_dir.name)
    run.attempt("start", run.start)
    run.attempt("log", lambda: run.log(step, metric_names(results)))
    run.attempt("finish", lambda: run.finish(0))


def report(results: Sequence[Result], experiment: Experiment, target: Target, *, out: Path | None) -> Iterator[str]:
    """Lines for the terminal."""
    yield f"{target.checkpoint if not target.is_export else target.path}"
    yield from table(results, recipe=experiment.recipe)
    folder = out or target.folder / FOLDER
    names = {Result.name_of(result.setting): f"{target.name}_TASK_Nshot{suffix(result.setting)}" for result in results}
    if len(names) == 1:
        yield f"results: {folder / next(iter(names))}.json"
    else:
        yield f"results: {len(names)} files, {', '.join(f'{folder / name}.json' for name in dict.fromkeys(names.values()))}"
    yield f"answers: {folder / 'items'}"
