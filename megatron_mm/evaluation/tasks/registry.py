"""All benchmarks that `megatron-mm evaluate` knows: `TASKS` lists them, `GROUPS` names groups of them."""

from __future__ import annotations

from megatron_mm.config.checks import nearest
from megatron_mm.config.references import is_reference, load_object
from megatron_mm.evaluation.tasks import captions, choices, drawn, text, vqa
from megatron_mm.evaluation.tasks.base import Task

TASKS: dict[str, Task] = {task.name: task for module in (captions, vqa, choices, text, drawn) for task in module.TASKS}

TEXTCORE = tuple(task.name for task in text.TASKS)
GROUPS: dict[str, tuple[str, ...]] = {
    # The tasks of MM1's few-shot tables and ablations.
    "mm1": ("coco_caption", "nocaps", "textcaps", "vqav2", "textvqa", "vizwiz", "okvqa"),
    "infimm": ("coco_caption", "vqav2", "textvqa", "okvqa"),
    "mono_internvl": ("mmmu", "mme", "mmbench", "seed", "textvqa", "scienceqa", "gqa", "pope"),
    "textcore": TEXTCORE,
    "drawn": tuple(task.name for task in drawn.TASKS),
}


def tasks_of(names: list[str]) -> list[Task]:
    """Return the tasks for names of tasks and groups and references to the user's own tasks (FILE.py:TASK or MODULE:TASK), each once.

    Raises ValueError if a name is unknown (the message lists the known ones), if a reference is not to a Task, or if two tasks have the
    same name.
    """
    wanted = dict.fromkeys(one for name in names for one in GROUPS.get(name, (name,)))
    found = [_task_of_file(name) if is_reference(name) else _known(name) for name in wanted]
    for task in found:
        if sum(task.name == other.name for other in found) > 1 or TASKS.get(task.name, task) is not task:
            raise ValueError(f"two tasks are called {task.name!r}: choose another name")
    return found


def _known(name: str) -> Task:
    if name not in TASKS:
        meant = nearest(name, [*TASKS, *GROUPS]) or ":"
        raise ValueError(f"unknown task {name!r}{meant} choose from {', '.join(TASKS)}, or one of the groups {', '.join(GROUPS)}")
    return TASKS[name]


def _task_of_file(reference: str) -> Task:
    task = load_object(reference)
    if not isinstance(task, Task):
        raise ValueError(f"{reference} is a {type(task).__name__}, but must be a Task of megatron_mm.evaluation.tasks.base")
    return task
