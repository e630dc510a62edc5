"""Models and cases that `gpu_bench.py` times: layer backend, precision, fused kernels, recompute, and graphs; and how long they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_mm.config import DecoderConfig, Experiment, MoEConfig
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.recipes import get_recipe


@dataclass(frozen=True)
class Case:
    """A row of a model's table."""

    layers: str
    precision: str
    recompute: str = "none"
    fp8_recipe: str = ""
    """megatron-core's name of the FP8 scaling recipe; empty: the one used in training."""
    kernels: str = "all"
    """Fused kernels (`config.KernelConfig`): "all" that can run, as in training; the name of one; or "none"."""
    micro_batch_size: int = 1
    """Sequences in a micro-batch."""
    router_graph: bool = False
    """`kernels.router_graph`."""

    def __str__(self) -> str:
        scales = f" {self.fp8_recipe}" if self.fp8_recipe else ""
        kernels = f", {self.kernels.replace('_', ' ')} fused" if self.layers == "te" else ""
        kernels += ", graphs of routers" if self.router_graph else ""
        sequences = f", micro-batches of {self.micro_batch_size}" if self.micro_batch_size > 1 else ""
        return f"{self.layers} {self.precision}{scales}, recompute {self.recompute}{kernels}{sequences}"


BF16, TE, FP8 = Case("torch", "bf16"), Case("te", "bf16"), Case("te", "fp8")
PLAIN_TE = replace(TE, kernels="none")
CASES = [
    BF16,
    PLAIN_TE,
    TE,
    FP8,
    *(replace(case, micro_batch_size=2) for case in (TE, FP8)),
    *(replace(PLAIN_TE, kernels=kernel) for kernel in ("weight_gradients", "cross_entropy")),
    *(replace(TE, recompute=how) for how in ("selective", "full")),
]
SHORT_CASES = [BF16, PLAIN_TE, TE, FP8]
SPARSE_CASES = [BF16, PLAIN_TE, replace(PLAIN_TE, kernels="token_permutation"), TE, replace(TE, router_graph=True), FP8]
FP8_CASES = [BF16, PLAIN_TE, TE, *(replace(FP8, fp8_recipe=recipe) for recipe in ("tensorwise", "blockwise", "delayed"))]
LARGER = [BF16, TE, *(replace(case, micro_batch_size=2) for case in (TE, FP8))]
"""Do Transformer Engine's layers, larger micro-batches, and FP8 in these make steps faster?"""
CPU_CASES = [Case("torch", "fp32", how) for how in ("none", "selective", "full")]


def _decoder(experiment: Experiment, **fields: object) -> Experiment:
    return replace(experiment, model=replace(experiment.model, decoder=replace(experiment.model.decoder, **fields)))  # type: ignore[arg-type, type-var]


def _small_tower(experiment: Experiment) -> Experiment:
    """Replace the tower with the debug recipe's, to measure the decoder alone."""
    small = get_recipe("debug_mm1").model
    assert isinstance(small, MM1Config) and isinstance(experiment.model, MM1Config)
    return replace(experiment, model=replace(experiment.model, vision=small.vision, connector=small.connector))


def _slice_of_30b() -> Experiment:
    """Return the share of MM1 30B that one of four tensor-parallel ranks computes: 13 of 52 heads, a quarter of MLP and vocabulary."""
    whole = _small_tower(get_recipe("mm1_30b"))
    decoder: DecoderConfig = whole.model.decoder
    assert decoder.num_attention_heads == decoder.num_query_groups
    heads, parts = decoder.num_attention_heads // 4, decoder.ffn_hidden_size // 4
    return _decoder(
        whole, num_layers=8, num_attention_heads=heads, num_query_groups=heads, ffn_hidden_size=parts, vocab_size=decoder.vocab_size // 4
    )


def _slice_of_moe() -> Experiment:
    """Return four layers of MM1 3B-MoE with the experts that one of eight expert-parallel ranks would hold, in layers 2 and 4."""
    return _decoder(_small_tower(get_recipe("mm1_3b_moe")), num_layers=4, moe=MoEConfig(num_experts=8, every_n_layers=2))


def _dense_of_moe() -> Experiment:
    return _decoder(_slice_of_moe(), moe=None)


def _shallow(recipe: str, layers: int) -> Experiment:
    return _decoder(get_recipe(recipe), num_layers=layers)


@dataclass(frozen=True)
class Seconds:
    """How long a part takes on one H200, at most: what the files in benchmarks/results have, which a test compares."""

    first: float
    """Until its first row, with the start of the process; of a part without cases, all."""
    case: float = 0.0
    """Each further case."""
    end: float = 5.0
    """From the last row until the process has ended."""

    def of(self, cases: int) -> float:
        """Return the seconds of a part with this many cases."""
        return self.first + self.case * max(0, cases - 1) + self.end


@dataclass(frozen=True)
class Model:
    """A part of the benchmark that trains a model."""

    experiment: Callable[[], Experiment]
    cases: list[Case]
    """All of its cases."""
    first_cases: list[Case]
    """Cases that are timed unless all are asked for."""
    seconds: Seconds


SLOWEST = Seconds(first=31, case=16.5)
"""Of MM1 1.2B, with its whole tower. Also assumed for models that were never timed here."""
MODELS = {
    "mm1_1b": Model(lambda: get_recipe("mm1_1b"), CASES, LARGER, SLOWEST),
    "infimm_zephyr_7b_pt, 8 layers": Model(lambda: _shallow("infimm_zephyr_7b_pt", 8), SHORT_CASES, [BF16, TE], SLOWEST),
    "mono_internvl_2b_s1_3, 12 layers": Model(lambda: _shallow("mono_internvl_2b_s1_3", 12), SHORT_CASES, [BF16, TE], SLOWEST),
    "mm1_3b_moe, 8 experts, 4 layers": Model(
        _slice_of_moe, SPARSE_CASES, [BF16, TE, replace(TE, router_graph=True), FP8], Seconds(first=8, case=9)
    ),
    "mm1_30b, a process of tensor 4, 8 layers": Model(
        _slice_of_30b, FP8_CASES, [BF16, TE, replace(FP8, fp8_recipe="tensorwise")], Seconds(first=20, case=6)
    ),
    "the same without experts": Model(_dense_of_moe, SHORT_CASES, [], Seconds(first=8, case=9)),
    "mm1_7b, 8 layers": Model(lambda: _shallow("mm1_7b", 8), SHORT_CASES, [], SLOWEST),
}
"""In the order of what their rows are worth, as time may run out; "the same without experts" is compared with the model with experts."""
CPU_MODELS = {
    recipe: Model(lambda recipe=recipe: get_recipe(recipe), CPU_CASES, CPU_CASES, Seconds(first=60))
    for recipe in ("debug_mm1", "debug_mm1_moe", "debug_infimm", "debug_mono_internvl")
}
PIECES = {
    "decoding": Seconds(first=25),
    "inside mm1_1b": Seconds(first=30),
    "pieces of mm1_1b": Seconds(first=21),
    "routed experts": Seconds(first=40),
    "tower graph of mm1_1b": Seconds(first=60),
    "tower graph of infimm_zephyr_7b_pt": Seconds(first=42),
}
"""Parts other than models. "decoding", "routed experts" and "tower graph of mm1_1b" were never timed as parts: theirs are guesses."""
FIRST_PIECES = ("decoding", "inside mm1_1b", "pieces of mm1_1b", "routed experts")
"""Those that run unless all are asked for."""
