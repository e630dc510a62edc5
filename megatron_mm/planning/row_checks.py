"""Whether the columns of a row of measurements go together: GPUs and degrees, heads and experts, batch and data-parallel size."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_mm.planning.cells import UnusableRow, count, word
from megatron_mm.planning.decoder_shape import DecoderShape
from megatron_mm.planning.layout import Layout


def gpus_of(cells: Mapping[str, str]) -> int:
    """Return the number of GPUs; if it is not given, the product of the degrees. Raises UnusableRow if the degrees do not divide it."""
    tensor, pipeline, context = (count(cells, name) or 1 for name in ("tp", "pp", "cp"))
    degrees, data, given = tensor * pipeline * context, count(cells, "dp"), count(cells, "n_gpus")
    fsdp = fsdp_of(cells)
    sharded = count({"dp": fsdp}, "dp") if re.match(r"\d", fsdp) else None
    if given is None:
        return degrees * (data or sharded or 1)
    product = f"tp {tensor} x pp {pipeline} x cp {context} = {degrees}"
    if given % degrees:
        raise UnusableRow(f"n_gpus is {given}, but must be a multiple of {product}")
    if data and given not in (degrees * data, tensor * pipeline * data, degrees * data * (sharded or 1)):
        raise UnusableRow(f"dp is {data}, but {given} GPUs / ({product}) is {given // degrees}")
    return given


def fsdp_of(cells: Mapping[str, str]) -> str:
    """Return how FSDP shards (a number of GPUs or a strategy, in small letters); an empty text if it does not."""
    text = word(cells, "fsdp", r"^\d+(\.0*)?$|full|grad|shard|fsdp|hsdp|zero|ddp|yes|true|no\b|false|off", "a number of GPUs or a strategy")
    if re.search(r"zero[-_ ]?2", text):
        return "shard_grad_op"
    return "" if re.search(r"^0|no[_ ]?shard|^ddp|^no$|false|off|zero[-_ ]?[01]", text) else text


def check(cells: Mapping[str, str], shape: DecoderShape, layout: Layout, batch: int) -> None:
    """Raise UnusableRow, with both numbers, if heads, experts or the batch cannot be divided as the row says."""
    heads, hidden, tensor, expert = shape.heads, shape.hidden_size, layout.tensor, count(cells, "ep") or 1
    if count(cells, "heads") and not count(cells, "head_dim") and hidden % heads:
        raise UnusableRow(f"heads is {heads}, but must divide hidden {hidden} (or give head_dim)")
    if heads % shape.kv_heads:
        raise UnusableRow(f"kv_heads is {shape.kv_heads}, but must divide heads {heads}")
    if count(cells, "heads") and heads % tensor:
        raise UnusableRow(f"tp is {tensor}, but must divide heads {heads}")
    if shape.experts and shape.top_k > shape.experts:
        raise UnusableRow(f"topk is {shape.top_k}, but there are {shape.experts} experts")
    if shape.experts and shape.experts % expert:
        raise UnusableRow(f"ep is {expert}, but must divide experts {shape.experts}")
    if expert > layout.gpus:
        raise UnusableRow(f"ep is {expert}, but there are {layout.gpus} GPUs")
    if batch % layout.data:
        raise UnusableRow(f"gbs is {batch}, but must be a multiple of the data-parallel size {layout.data}")
