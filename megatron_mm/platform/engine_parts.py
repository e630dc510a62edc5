"""Finds what this package uses of megatron-core, from its own sources, and which of these parts an installed version lacks.

This is for untested versions. What breaks in them is mostly a name that moved or an argument that was removed, and both can be found before
a run starts, instead of an hour into the queue. What is checked:

    from megatron.core.distributed import DistributedDataParallel    the module, and the name in it
    parallel_state.get_tensor_model_parallel_group()                 an attribute of an imported module or class
    dist_checkpointing.save(state, path, validate_access_integrity=False)    that it takes these arguments by name

Worked example: if `save` no longer takes the argument, `missing()` returns
["megatron.core.dist_checkpointing.save(validate_access_integrity=)"].

Parts that the sources do not show are listed below: methods that subclasses override and names that `platform/` replaces, because without
them our code would never be called, and no error would say so; and methods of objects that megatron-core makes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
ENGINE = "megatron.core"
OVERRIDDEN = (
    "dist_checkpointing.strategies.torch.TorchDistLoadShardedStrategy.load_sharded_metadata",
    "distributed.distributed_data_parallel.DistributedDataParallel._make_backward_post_hook",
    "distributed.distributed_data_parallel.DistributedDataParallel.zero_grad_buffer",
    "pipeline_parallel.p2p_communication.P2PCommunicator._communicate_shapes",
    "transformer.module.MegatronModule.sharded_state_dict",
    "transformer.moe.router.TopKRouter.forward",
    "transformer.moe.router.TopKRouter.gating",
    "transformer.transformer_layer.TransformerLayer._forward_attention",
    "transformer.transformer_layer.TransformerLayer.forward",
)
"""Methods that our subclasses override (a test compares this with the classes)."""
REPLACED = (
    "models.common.language_module.language_module.te_parallel_cross_entropy",
    "optimizer.Adam",
    "optimizer.USING_PYTORCH_OPTIMIZER",
    "optimizer.distrib_optimizer.Adam",
    "optimizer.distrib_optimizer.DistributedOptimizer._copy_main_params_to_model_params",
    "optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
    "optimizer.distrib_optimizer.USING_APEX_OPTIMIZER",
    "tensor_parallel.random.CheckpointWithoutOutput.__init__",
    "tensor_parallel.random._set_cuda_rng_state",
    "transformer.mlp.MLP.forward",
    "transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher.preprocess",
    "transformer.moe.token_dispatcher._DeepepManager.setup_metadata",
    "transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
)
"""Names that modules of `platform/` replace."""
OF_OBJECTS = (
    "optimizer.distrib_optimizer.DistributedOptimizer._copy_main_params_to_model_params",
    "optimizer.distrib_optimizer.DistributedOptimizer._get_main_param_and_optimizer_states",
    "optimizer.distrib_optimizer.DistributedOptimizer.step_with_ready_grads",
    "distributed.DistributedDataParallel.start_param_sync",
    "distributed.param_and_grad_buffer._ParamAndGradBucketGroup.finish_param_sync",
)
"""Methods called on objects that megatron-core makes, which have no public name or had another one in earlier versions."""


def missing(sources: Iterable[Path] | None = None) -> list[str]:
    """The parts in use that the installed megatron-core lacks, sorted by name; empty if nothing is missing. Imports most of
    megatron-core."""
    uses = {use for path in (PACKAGE.rglob("*.py") if sources is None else sources) for use in _uses(path)}
    if sources is None:
        uses.update(f"{ENGINE}.{name}" for name in (*OVERRIDDEN, *REPLACED, *OF_OBJECTS))
    return sorted(use for use in uses if not _is_there(use))


def _uses(path: Path) -> Iterator[str]:
    """The parts that one file uses, such as "megatron.core.utils.get_model_config" and, for an argument,
    "megatron.core.dist_checkpointing.save(x=)"."""
    text = path.read_text()
    if ENGINE not in text:
        return
    tree = ast.parse(text)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and f"{node.module}.".startswith(f"{ENGINE}."):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    yield from names.values()
    guarded = {id(inner) for node in ast.walk(tree) if _is_guard(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and (whole := _dotted(node, names)):
            yield whole
        if isinstance(node, ast.Call) and (called := _dotted(node.func, names)):
            yield from (f"{called}({keyword.arg}=)" for keyword in node.keywords if keyword.arg is not None)


def _is_guard(node: ast.AST) -> bool:
    """Whether code checks for a part before it uses it: an `if` with `getattr(holder, name, None)` or `hasattr(holder, name)` in its
    condition."""
    return isinstance(node, ast.IfExp | ast.If) and any(
        isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id in ("hasattr", "getattr")
        for inner in ast.walk(node.test)
    )


def _dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """The full name of an expression that begins with an imported name; None for any other."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value, names)):
        return f"{before}.{node.attr}"
    return None


def _is_there(use: str) -> bool:
    name, _, argument = use.partition("(")
    try:
        found = _find(name)
    except (ImportError, AttributeError):
        return bool(argument)  # the name itself is reported as missing
    return not argument or _takes(found, argument.removesuffix("=)"))


def _find(name: str) -> Any:
    """A module, or an attribute of a module or class. Raises ImportError or AttributeError."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or not ".".join(parts[:length]).startswith(error.name):
                raise  # a dependency of the module is missing
            continue
        for part in parts[length:]:
            if part not in getattr(found, "__dataclass_fields__", ()):  # fields without a default are not class attributes
                found = getattr(found, part)
        return found
    raise ModuleNotFoundError(f"no module named {name}", name=name)


def _takes(function: Any, argument: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not a Python function
        return True
    return any(parameter.name == argument or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
