"""Settings of Megatron-Bridge's performance recipes for mixtures of experts, which its tables of results do not show.

Source: NVIDIA-NeMo/Megatron-Bridge, scripts/performance/configs/*/*_workload_base_configs.py, at the tags of its releases: v0.2.0 (25.11),
v0.3.0 (26.02), v0.3.1 (26.02.01), v0.4.0 (26.04), v0.5.0 (26.06; src/megatron/bridge/perf_recipes of v0.6.0, 26.08, has the same).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatron_mm.planning.hardware import Dispatcher, Software

Release = tuple[int, int, int]

ROUTING_GRAPHED, ATTENTION_GRAPHED, ALL_GRAPHED = 0.35, 0.6, 1.0
"""Fraction of a layer's host time that CUDA graphs save: graphs of the router and the preparation of the exchange; of attention, too; of
the whole step."""
OVERLAPPED = 0.8
"""Fraction of the exchange that runs at the same time as another micro-batch's products, if a recipe overlaps it."""


@dataclass(frozen=True)
class Setting:
    """Settings of recipes."""

    models: str
    """Regular expression for names of models."""
    gpus: str
    """Regular expression for names of GPUs."""
    dispatcher: Dispatcher = "alltoall"
    graphed: float = 0.0
    overlaps: bool = False
    fuses_experts: bool = False
    """`cutedsl_fused_grouped_mlp` in a recipe."""
    fp8_attention: bool = False
    recompute: tuple[str, ...] = ()
    since: Release = (0, 0, 0)
    before: Release = (99, 0, 0)
    precision: str = ""
    """Regular expression for the precision."""
    machines: bool | None = None
    """Applies only if experts are on several machines (True), or only if they are on one (False)."""

    def of(self, stack: Software) -> Software:
        """Apply the settings to a stack."""
        return replace(
            stack,
            dispatcher=self.dispatcher,
            graphed=self.graphed,
            hides_expert_messages=OVERLAPPED if self.overlaps else 0.0,
            fuses_experts=self.fuses_experts,
            fp8_attention=self.fp8_attention,
        )


_LATENT, _QWEN, _SMALL_QWEN, _GPT_OSS = r"deepseek|kimi", r"qwen.*(235|2[0-9]\db)", r"qwen.*30b", r"gpt.?oss"
_GRACE, _EIGHT, _ANY = "gb[23]00", "^b[23]00", ""
_UP, _UP_MLP, _NORM_ACT = ("mla_up_proj",), ("mla_up_proj", "mlp"), ("layernorm", "moe_act")
_26_02, _26_02_01, _26_04, _26_04_01, _26_06 = (26, 2, 0), (26, 2, 1), (26, 4, 0), (26, 4, 1), (26, 6, 0)
_FULL = Setting(_ANY, _GRACE, "hybridep", ALL_GRAPHED, True, True, True, since=_26_06, precision="mx")

SETTINGS: tuple[Setting, ...] = (
    replace(_FULL, models="deepseek", gpus="gb200", fp8_attention=False, recompute=_UP),
    replace(_FULL, models=f"deepseek|{_QWEN}|{_SMALL_QWEN}|{_GPT_OSS}"),
    replace(_FULL, models=_SMALL_QWEN, gpus="b300"),
    Setting("kimi", "h100", recompute=_UP_MLP),
    Setting("kimi", _EIGHT, recompute=_UP),
    Setting("kimi", "gb300", "hybridep", recompute=_UP),
    Setting("kimi", "gb200", "hybridep", ROUTING_GRAPHED, recompute=_UP),
    Setting(_LATENT, "h100", "deepep", overlaps=True, recompute=_UP_MLP, before=_26_02),
    Setting(_LATENT, "h100", "hybridep", recompute=_UP_MLP),
    Setting(_LATENT, "b200", "deepep", ATTENTION_GRAPHED, True, recompute=_UP_MLP, since=_26_04_01, machines=True),
    Setting(_LATENT, _EIGHT, recompute=_UP, before=_26_02),
    Setting(_LATENT, "b300", "hybridep", ATTENTION_GRAPHED, recompute=_UP, since=_26_04_01),
    Setting(_LATENT, _EIGHT, "hybridep", recompute=_UP),
    Setting(_LATENT, "gb300", "hybridep", ATTENTION_GRAPHED, recompute=("moe_act",), before=_26_02),
    Setting(_LATENT, "gb300", "hybridep", recompute=_UP),
    Setting(_LATENT, "gb200", "hybridep", ROUTING_GRAPHED, recompute=_UP, before=_26_02),
    Setting(_LATENT, "gb200", "hybridep", ATTENTION_GRAPHED, recompute=("mlp",), since=_26_04),
    Setting(_LATENT, "gb200", "hybridep", ATTENTION_GRAPHED, recompute=_UP),
    Setting(_QWEN, _GRACE, "hybridep", ATTENTION_GRAPHED),
    Setting(_QWEN, _EIGHT, "deepep", since=_26_02_01, before=_26_04),
    Setting(_QWEN, "b300", "hybridep", since=_26_04_01),
    Setting(_QWEN, "b300", overlaps=True, before=_26_02_01),
    Setting(_QWEN, "b200", overlaps=True, before=_26_02),
    Setting(_QWEN, "h100", "deepep", overlaps=True, since=_26_02_01, before=_26_04),
    Setting(_QWEN, "h100", overlaps=True),
    Setting(_SMALL_QWEN, "b200", "alltoall", ROUTING_GRAPHED, before=_26_02_01),
    Setting(_SMALL_QWEN, "b200", "hybridep", ATTENTION_GRAPHED),
    Setting(_SMALL_QWEN, "gb[23]00|b300", "hybridep", ROUTING_GRAPHED),
    Setting(_SMALL_QWEN, "h100", overlaps=True, before=_26_02),
    Setting(_SMALL_QWEN, "h100", "deepep", overlaps=True, before=_26_02_01),
    Setting(_SMALL_QWEN, "h100", "hybridep"),
    Setting(_GPT_OSS, "b300", "hybridep", ATTENTION_GRAPHED, machines=False),
    Setting(_GPT_OSS, "gb300|b300", "alltoall", ATTENTION_GRAPHED),
    Setting(_GPT_OSS, "b200", "hybridep", recompute=_NORM_ACT, since=_26_02_01, machines=False),
    Setting(_GPT_OSS, "gb200", "hybridep", overlaps=True, recompute=_NORM_ACT, since=_26_04),
    Setting(_GPT_OSS, _ANY, recompute=_NORM_ACT),
    replace(_FULL, fp8_attention=False),
    Setting(_ANY, _GRACE, "hybridep", ROUTING_GRAPHED),
)
"""The first setting that matches is used; the last two are those of most recipes for a rack of 72 GPUs."""
_OTHERWISE = Setting(_ANY, _ANY)


def setting_of(*, model: str, gpu: str, precision: str, release: Release, on_machines: bool) -> Setting:
    """Return the setting of the recipe for a model on a kind of GPU in a release.

    Args:
        on_machines: its experts are on several machines.
    """
    for setting in SETTINGS:
        if (
            re.search(setting.models, model.lower())
            and re.search(setting.gpus, gpu)
            and setting.since <= release < setting.before
            and re.search(setting.precision, precision.lower())
            and setting.machines in (None, on_machines)
        ):
            return setting
    return _OTHERWISE
