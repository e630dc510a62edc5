"""README.md of an exported model: the model, its training data and steps, how to load it and how to write prompts.

It states only what is known from the checkpoint and the run directory; the publisher adds the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_mm.config import Experiment
from megatron_mm.data.text.chat import CHAT_TEMPLATES
from megatron_mm.families.registry import family_of

LICENSE_NOTE = """This directory holds weights and the code that loads them. The code is part of megatron_mm, under the Apache License 2.0.

The publisher of the weights must state their license in this file, in place of this note. It depends on
  - the models whose weights training started from: Llama 2, Vicuna, Zephyr, InternLM2, EVA-CLIP and CLIP each have their own license,
  - the data that they were trained on.
"""
_PACKAGES = ("megatron_mm", "torch", "megatron-core", "transformers")


def write_model_card(out: Path, experiment: Experiment, checkpoint: Path, *, part: str, dtype: str) -> None:
    """Write README.md and LICENSE into an export.

    Args:
        out: directory of the export, which already holds its other files.
        checkpoint: `RUN_DIR/checkpoints/step_...`.
        part: whole, language or vision.
        dtype: torch's name for the type of the weights.
    """
    (out / "README.md").write_text("\n".join(_lines(out, experiment, checkpoint, part=part, dtype=dtype)) + "\n")
    (out / "LICENSE").write_text(LICENSE_NOTE)


def _lines(out: Path, experiment: Experiment, checkpoint: Path, *, part: str, dtype: str) -> Iterator[str]:
    tags = {"whole": "image-text-to-text", "language": "text-generation", "vision": "image-feature-extraction"}
    yield from ("---", "library_name: transformers", f"pipeline_tag: {tags[part]}", "license: other", "---", "")
    what = {"whole": "", "language": ", only the language model", "vision": ", only the image tower"}[part]
    yield from (f"# {experiment.recipe}{what}", "")
    yield f"A model of the family {experiment.model.family}, trained with megatron_mm. The weights are {dtype}."
    yield from ("", "## Use", "", *_use(out, part=part), *family_of(experiment.model).card_notes(experiment.model, out, part=part))
    yield from ("", "## Training", "", "| | |", "|---|---|", *_training(experiment, checkpoint))
    yield from _evaluation(checkpoint)
    if part != "vision":
        yield from ("", "## Prompts", "", *_prompts(experiment))
    yield from ("", "## Made with", "", *(f"- {name} {version}" for name, version in _versions()))
    yield from ("", "## License", "", "See LICENSE: the publisher must state the license of the weights there.")


def _use(out: Path, *, part: str) -> Iterator[str]:
    config = json.loads((out / "config.json").read_text())
    remote = "auto_map" in config
    if part == "whole" and not remote and not _is_in_transformers(config.get("model_type")):
        yield "This model's family has no modeling code, and neither has transformers: the weights and config.json are for code"
        yield "that its authors supply."
        return
    names = {"whole": "AutoModelForCausalLM", "language": "AutoModelForCausalLM", "vision": "CLIPVisionModel"}
    reader = "AutoProcessor" if (out / "processor_config.json").is_file() else "AutoImageProcessor" if part == "vision" else "AutoTokenizer"
    trust = ", trust_remote_code=True" if remote else ""
    yield "```python"
    yield f"from transformers import {names[part]}, {reader}"
    yield ""
    yield f'model = {names[part]}.from_pretrained(".", dtype="auto"{trust})'
    yield f'{"tokenizer" if reader == "AutoTokenizer" else "processor"} = {reader}.from_pretrained("."{trust})'
    yield "```"


def _is_in_transformers(model_type: str | None) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _training(experiment: Experiment, checkpoint: Path) -> Iterator[str]:
    data, train = experiment.data, experiment.train
    step = int(json.loads((checkpoint / "manifest.json").read_text()).get("step", 0))
    shares = ", ".join(f"{name} {weight / sum(data.mixture.values()):.1%}" for name, weight in data.mixture.items())
    yield f"| recipe | `{experiment.recipe}` |"
    yield f"| data (share of sequences) | {shares} |"
    yield f"| steps | {step:,} of {train.steps:,} |"
    yield f"| sequences per step, tokens per sequence | {train.global_batch_size:,} x {data.sequence_length:,} |"
    yield f"| tokens (at most) | {step * train.global_batch_size * data.sequence_length:,} |"
    yield f"| precision | {train.precision} |"
    yield f"| seed | {train.seed} |"


def _evaluation(checkpoint: Path) -> Iterator[str]:
    """Lines with the last held-out losses that the run wrote at or before the checkpoint's step."""
    found = _last_evaluation(checkpoint)
    if not found:
        return
    yield from ("", f"## Held-out data, step {found.get('step', '?')}", "", "| | |", "|---|---|")
    for name, value in found.items():
        if isinstance(value, int | float) and name != "step":
            yield f"| {name} | {value:.4f} |"


def _last_evaluation(checkpoint: Path) -> dict[str, Any]:
    path, last = checkpoint.parent.parent / "eval.jsonl", {}
    step = int(json.loads((checkpoint / "manifest.json").read_text()).get("step", 0))
    for line in path.read_text().splitlines() if path.is_file() else []:
        document = json.loads(line)
        if document.get("step", step + 1) <= step:
            last = document
    return last


def _prompts(experiment: Experiment) -> Iterator[str]:
    name = experiment.data.chat_template
    if name is None:
        yield "The model continues documents; it was not trained with a chat template. Each text is tokenized by itself between images."
        return
    call = "apply_chat_template(messages, add_generation_prompt=True, tokenize=True)"
    yield f"Chats are written with the template `{name}`: `{call}` returns the same tokens as in training."
    yield "Without `tokenize`, it returns text. If this text begins with `<s>`, tokenize it with `add_special_tokens=False`."
    yield f"An answer ends with `{CHAT_TEMPLATES[name].end_of_answer}`."
    if experiment.data.caption_prompt is not None:
        yield f"The prompt for captions was `{experiment.data.caption_prompt}`."


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
