"""Compare routing each token through one feed-forward network with computing both networks for all tokens and masking.

    .venv/bin/python benchmarks/routed_experts.py
    python benchmarks/routed_experts.py --device cuda --tokens 4096 --repeats 20

Runs one layer's text and visual experts, by default at Mono-InternVL-2B's width, forward and backward, for several shares of image tokens.
Both ways use the same module's weights and run in turn; their outputs and gradients are compared first. Gather and scatter are timed
separately, with networks that do nothing between them. Prints the ratio, and the share of the routed time that moving tokens takes. The
precision is fp32 on a CPU; on a GPU it is bf16 with plain PyTorch's layers and, if installed, bf16 and FP8 with Transformer Engine's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.fp8_utils import get_fp8_context

from megatron_mm.config import FP8_MULTIPLE, Experiment
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig
from megatron_mm.families.mono_internvl.modality_experts import ModalityExperts, ModalityLayout, rows_of
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.platform.device import local_device
from megatron_mm.training.build import build_chunks

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp8": 2e-1}
"""Allowed norm of the difference between the two ways, over the norm: sums of thousands of terms in another order; bf16 outputs have 8 bits
of mantissa; in FP8, different tokens share a scale."""


@dataclass(frozen=True)
class Case:
    """Layer backend and precision of a part of the table."""

    layers: str
    precision: str


@dataclass(frozen=True)
class Options:
    """What is compared: tokens of a micro-batch, the experts' widths, shares of image tokens, timed passes of each."""

    tokens: int = 512
    hidden_size: int = 2048
    ffn_hidden_size: int = 8192
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 0.94)
    repeats: int = 2


def cases_on(device: torch.device) -> list[Case]:
    """Return the cases that this device can run."""
    if device.type == "cpu":
        return [Case("torch", "fp32")]
    has_te = importlib.util.find_spec("transformer_engine") is not None
    return [Case("torch", "bf16"), *([Case("te", "bf16"), Case("te", "fp8")] if has_te else [])]


def experiment_for(width: int, ffn: int, case: Case) -> Experiment:
    """Return debug_mono_internvl with one decoder layer, whose experts have these widths."""
    base = get_recipe("debug_mono_internvl")
    decoder = replace(base.model.decoder, num_layers=1, hidden_size=width, ffn_hidden_size=ffn)
    assert isinstance(base.model, MonoInternVLConfig)
    train = replace(base.train, layers=case.layers, precision=case.precision)  # type: ignore[arg-type]
    return replace(base, model=replace(base.model, decoder=decoder), train=train)


def layout_of(is_visual_t: torch.Tensor, *, case: Case, device: torch.device) -> ModalityLayout:
    multiple = FP8_MULTIPLE if case.layers == "te" else 1
    text, visual = (rows_of(mask, multiple=multiple, device=device) for mask in (~is_visual_t, is_visual_t))
    return ModalityLayout(text=text, visual=visual)


def image_in_the_middle(num_tokens: int, share: float) -> torch.Tensor:
    """Return [num_tokens] bool: True for the image tokens, a contiguous share in the middle."""
    visual = round(share * num_tokens)
    first = (num_tokens - visual) // 2
    return (torch.arange(num_tokens) >= first) & (torch.arange(num_tokens) < first + visual)


def computed_both(experts: ModalityExperts, hidden_t1h: torch.Tensor, is_visual_t: torch.Tensor) -> torch.Tensor:
    """Compute both networks for every token and keep one of the two results."""
    text_t1h, _ = experts.text(hidden_t1h)
    visual_t1h, _ = experts.visual(hidden_t1h)
    chosen_t11 = is_visual_t[:, None, None].to(hidden_t1h.dtype)
    return text_t1h * (1 - chosen_t11) + visual_t1h * chosen_t11


def run(forward: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, grad: torch.Tensor) -> float:
    """Return the seconds of a forward and backward pass."""
    hidden = hidden.detach().requires_grad_()
    finish(hidden.device)
    began = time.perf_counter()
    forward(hidden).backward(grad)
    finish(hidden.device)
    return time.perf_counter() - began


def finish(device: torch.device) -> None:
    """Wait for the device to finish its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_equal(
    experts: ModalityExperts,
    routed: Callable[..., Any],
    both: Callable[..., Any],
    hidden: torch.Tensor,
    grad: torch.Tensor,
    *,
    tolerance: float,
) -> None:
    """Check that outputs and the gradients of the input and of every weight agree."""
    found = []
    for forward in (routed, both):
        experts.zero_grad()
        own = hidden.detach().requires_grad_()
        out = forward(own)
        out.backward(grad)
        assert own.grad is not None
        found.append([out.detach(), own.grad, *(p.grad.clone() for p in experts.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for first, second in zip(*found, strict=True):
        difference, size = float((first.float() - second.float()).norm()), float(second.float().norm())
        assert difference <= tolerance * size, f"routing and masking differ by {difference:.1e} of {size:.1e}"


def nothing(hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
    """A network that takes no time."""
    return hidden, None


def compare(options: Options, case: Case) -> Iterator[dict[str, Any]]:
    """Yield a row for each share of image tokens: milliseconds of both ways, their ratio, and the share of moving tokens."""
    experiment = experiment_for(options.hidden_size, options.ffn_hidden_size, case)
    topology = topologies.initialize(experiment.parallel, seed=1)
    chunks, device = build_chunks(experiment, topology), topology.device
    initialize_weights(chunks, seed=1)
    experts = next(module for module in chunks[0].modules() if isinstance(module, ModalityExperts))
    hidden, grad = (
        torch.randn(options.tokens, 1, options.hidden_size, generator=torch.Generator().manual_seed(n)).to(
            device, experts.config.params_dtype
        )
        for n in (1, 2)
    )
    for share in options.shares:
        mask = image_in_the_middle(options.tokens, share)
        layout, is_visual = layout_of(mask, case=case, device=device), mask.to(device)

        def routed(x: torch.Tensor, layout: ModalityLayout = layout) -> torch.Tensor:
            with precision_of(experts):
                return experts(x, layout)

        def both(x: torch.Tensor, is_visual: torch.Tensor = is_visual) -> torch.Tensor:
            with precision_of(experts):
                return computed_both(experts, x, is_visual)

        check_equal(experts, routed, both, hidden, grad, tolerance=TOLERANCE[case.precision])  # this also warms up both
        seconds: dict[str, list[float]] = {"routed": [], "both": [], "moving": []}
        for _ in range(options.repeats):
            seconds["both"].append(run(both, hidden, grad))
            seconds["routed"].append(run(routed, hidden, grad))
        with patch.object(experts.text, "forward", nothing), patch.object(experts.visual, "forward", nothing):
            seconds["moving"] = [run(routed, hidden, grad) for _ in range(options.repeats + 2)][2:]
        median = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = statistics.median(b / r for b, r in zip(seconds["both"], seconds["routed"], strict=True))
        moving = median["moving"] / median["routed"]
        yield {
            "case": f"{case.layers} {case.precision}, {share:.0%} image tokens",
            "both_masked_ms": round(1e3 * median["both"], 3),
            "routed_ms": round(1e3 * median["routed"], 3),
            "times_faster": round(ratio, 3),
            "gather_scatter": round(moving, 4),
        }
    topologies.shutdown()


def line(row: dict[str, Any]) -> str:
    """Return the line of the table for a row."""
    both, routed = row["both_masked_ms"], row["routed_ms"]
    return f"{row['case']:28} {both:10.2f} ms {routed:8.2f} ms {row['times_faster']:13.2f} {row['gather_scatter']:16.2%}"


def precision_of(experts: ModalityExperts) -> contextlib.AbstractContextManager[Any]:
    """Return the precision context in which the decoder runs its layers."""
    return get_fp8_context(experts.config) if experts.config.fp8 else contextlib.nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda fails where no GPU is (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=Options.tokens, help="of a micro-batch (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=Options.hidden_size, help="default: %(default)s")
    parser.add_argument("--ffn-hidden-size", type=int, default=Options.ffn_hidden_size, help="default: %(default)s")
    parser.add_argument("--shares", type=float, nargs="+", default=Options.shares, help="of image tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=Options.repeats, help="timed passes of each (default: %(default)s)")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("routed_experts: error: torch finds no GPU here: run it on a machine with one, or with --device cpu", file=sys.stderr)
        sys.exit(2)
    options = Options(given.tokens, given.hidden_size, given.ffn_hidden_size, tuple(given.shares), given.repeats)
    device = local_device()
    name = torch.cuda.get_device_name(0) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"text and visual experts of width {options.hidden_size}, {options.ffn_hidden_size} inside, {options.tokens} tokens, {name}; "
        f"forward and backward, medians of {options.repeats}"
    )
    columns = f"{'layers, image tokens':28} {'both, masked':>13} {'routed':>11} {'times faster':>13} {'gather, scatter':>16}"
    print(columns)
    for case in cases_on(device):
        for row in compare(options, case):
            print(line(row), flush=True)
    print("times faster: median of the pairs; aim: at least 1.70 (2.00 is possible)")


if __name__ == "__main__":
    main()
