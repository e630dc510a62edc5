"""Every benchmark that `megatron-mm evaluate` knows: `TASKS` is all of them, `GROUPS` are names for several."""

from __future__ import annotations

from megatron_mm.evaluation.tasks import captions, choices, drawn, text, vqa
from megatron_mm.evaluation.tasks.base import Task

TASKS: dict[str, Task] = {task.name: task for module in (captions, vqa, choices, text, drawn) for task in module.TASKS}

TEXTCORE = tuple(task.name for task in text.TASKS)
GROUPS: dict[str, tuple[str, ...]] = {
    # What MM1's few-shot tables and ablations report.
    "mm1": ("coco_caption", "nocaps", "textcaps", "vqav2", "textvqa", "vizwiz", "okvqa"),
    "infimm": ("coco_caption", "vqav2", "textvqa", "okvqa"),
    "mono_internvl": ("mmmu", "mme", "mmbench", "seed", "textvqa", "scienceqa", "gqa", "pope"),
    "textcore": TEXTCORE,
    "drawn": tuple(task.name for task in drawn.TASKS),
}


def tasks_of(names: list[str]) -> list[Task]:
    """The tasks of names and groups, each once. Raises ValueError that lists the names where there is none of that name."""
    wanted = [one for name in names for one in GROUPS.get(name, (name,))]
    for name in wanted:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}, or one of the groups {', '.join(GROUPS)}")
    return [TASKS[name] for name in dict.fromkeys(wanted)]
