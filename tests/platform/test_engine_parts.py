"""The parts of megatron-core in use are read from our sources, and parts that an engine lacks are found."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from megatron_mm.platform import engine_parts


def test_the_installed_engine_has_all_that_is_used() -> None:
    assert engine_parts.missing() == []


def test_names_and_arguments_that_are_gone_are_found(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "from megatron.core import dist_checkpointing, parallel_state, gone\n"
        "from megatron.core.moved.away import Something\n"
        "from megatron.core.optimizer import OptimizerConfig as Config\n"
        "from megatron.core.transformer.mlp import MLP\n"
        "import torch\n"
        "def use():\n"
        "    parallel_state.get_data_parallel_group(with_context_parallel=True, with_everything=True)\n"
        "    parallel_state.get_no_such_group(size=1)\n"
        "    dist_checkpointing.save({}, 'x', no_such_argument=1)\n"
        "    Config(lr=1.0, learning=2.0)\n"
        "    torch.nn.Linear(1, 1).no_such_method(argument=1)\n"
        "    return MLP.asked_for if hasattr(MLP, 'asked_for') else None\n"
    )
    assert engine_parts.missing([source]) == [
        "megatron.core.dist_checkpointing.save(no_such_argument=)",
        "megatron.core.gone",
        "megatron.core.moved.away.Something",
        "megatron.core.optimizer.OptimizerConfig(learning=)",
        "megatron.core.parallel_state.get_data_parallel_group(with_everything=)",
        "megatron.core.parallel_state.get_no_such_group",
    ]


def test_methods_that_are_overridden_are_listed() -> None:
    """If upstream renamed one, megatron-core would silently use its own method."""
    found = set()
    for path in engine_parts.PACKAGE.rglob("*.py"):
        if engine_parts.ENGINE in path.read_text():
            module = importlib.import_module(".".join(path.relative_to(engine_parts.PACKAGE.parent).with_suffix("").parts))
            for cls in vars(module).values():
                if inspect.isclass(cls) and cls.__module__ == module.__name__:
                    found |= {name for base in cls.__bases__ for name in _overridden(cls, base)}
    assert found == {f"{engine_parts.ENGINE}.{name}" for name in engine_parts.OVERRIDDEN}


def _overridden(cls: type, base: type) -> set[str]:
    """Return the methods of one of our classes that its megatron-core base also has."""
    if not base.__module__.startswith(engine_parts.ENGINE):
        return set()
    of_engine = {name for ancestor in base.__mro__ if ancestor.__module__.startswith("megatron") for name in vars(ancestor)}
    own = {name for name, value in vars(cls).items() if inspect.isfunction(value) and not name.startswith("__")}
    return {f"{base.__module__}.{base.__name__}.{name}" for name in own & of_engine}
