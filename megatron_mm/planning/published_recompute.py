"""Finds what a published run recomputed, from a row's `recompute` column or its source."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_mm.planning.cells import UnusableRow, count, text_of, tidy
from megatron_mm.planning.decoder_shape import Recompute
from megatron_mm.planning.hardware import Gpu, Software
from megatron_mm.planning.published_software import recipe_setting

_MODULES = {
    "norm": "layernorm",
    "act": "moe_act",
    "attn": "core_attn",
    "attention": "core_attn",
    "core_attention": "core_attn",
    "layer_norm": "layernorm",
    "up_proj": "mla_up_proj",
}
"""Other names of modules -> megatron-core's."""
_RECOMPUTED = frozenset({"core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"})
"""Modules whose recomputation the planner knows, by megatron-core's names."""


def recomputed(cells: Mapping[str, str], software: Software, gpu: Gpu) -> list[Recompute]:
    """Return what was recomputed; if the source does not say, what may have been. Raises UnusableRow for words that name
    nothing that can be recomputed."""
    given = cells.get("recompute", "").strip().lower()
    text = tidy(given) or ("none" if given == "none" else "")
    setting = recipe_setting(cells, gpu) if not text and count(cells, "experts") else None
    if setting is not None:
        return [frozenset(setting.recompute)]
    if not text and software.name.startswith("JAX"):  # MaxText's usual policy keeps only some of the products
        return [frozenset({"mlp_half"}), frozenset({"full"})]
    if not text and re.search(r"dgxc|nemo", text_of(cells, "source", "ref")):
        return [frozenset()]
    if not text:
        return [frozenset(), frozenset({"full"})]
    if text.startswith(("none", "no ", "without")) or text in ("no", "0", "false", "off", "disabled", "nothing"):
        return [frozenset()]
    if re.match(r"full|uniform|yes|(activation|gradient) (check|ckpt)", text) or text in (
        "ac",
        "all",
        "block",
        "1",
        "true",
        "on",
        "enabled",
    ):
        return [frozenset({"full"})]
    if "op ac" in text:
        return [frozenset({"mlp_half"})]
    if re.search(r"selective layer|(2nd|second|other) layer", text):  # torchtitan's selective recomputation of layers
        return [frozenset({"every second layer"})]
    if "selective" in text and "moe" not in text:
        return [frozenset({"core_attn"})]
    text = re.sub(r"\b(core|moe|layer|mla|up)[ -](?=attn|attention|act|norm|up|proj)", lambda found: f"{found[1]}_", text)
    modules = frozenset(_MODULES.get(name, name) for name in re.split(r"[+,;&/\s]+|\band\b", re.sub(r"\(.*?\)|:", " ", text)))
    modules -= {"", "selective", "only", "modules"}
    unknown = modules - _RECOMPUTED
    if unknown or not modules:
        raise UnusableRow(f"recompute is {given!r}, but must be none, full, selective or modules ({', '.join(sorted(_RECOMPUTED))})")
    return [modules]
