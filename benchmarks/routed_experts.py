"""Routing each token through one feed-forward network against computing both networks for all tokens and masking.

    .venv/bin/python benchmarks/routed_experts.py

One layer's text and visual experts, at Mono-InternVL-2B's width unless told otherwise, forward and backward, for several shares of image
tokens. Both ways use the same module's weights and run in turn; their outputs and gradients are compared first. Gather and scatter are
timed by themselves, with networks that do nothing between them. Prints the ratio and what moving tokens takes of the routed time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch

from megatron_mm.config import Experiment, MonoInternVLConfig
from megatron_mm.models.modality_experts import ModalityExperts, ModalityLayout, Rows
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.recipes import get_recipe

TOLERANCE = 1e-4
"""Between the two ways, relative to the largest value: fp32 sums of thousands of terms in another order."""


def experiment_for(width: int, ffn: int) -> Experiment:
    """One decoder layer with experts of these widths; everything else as small as it gets."""
    base = get_recipe("debug_mono_internvl")
    decoder = replace(base.model.decoder, num_layers=1, hidden_size=width, ffn_hidden_size=ffn)
    assert isinstance(base.model, MonoInternVLConfig)
    return replace(base, model=replace(base.model, decoder=decoder))


def layout_of(num_tokens: int, share: float) -> ModalityLayout:
    """A text of `num_tokens` with an image in the middle."""
    visual = round(share * num_tokens)
    first = (num_tokens - visual) // 2
    rows = torch.arange(num_tokens)
    image, text = rows[first : first + visual], torch.cat([rows[:first], rows[first + visual :]])
    return ModalityLayout(text=Rows(gather=text, count=len(text)), visual=Rows(gather=image, count=len(image)))


def computed_both(experts: ModalityExperts, hidden_t1h: torch.Tensor, is_visual_t: torch.Tensor) -> torch.Tensor:
    """Both networks for every token, one of the two results kept."""
    text_t1h, _ = experts.text(hidden_t1h)
    visual_t1h, _ = experts.visual(hidden_t1h)
    chosen_t11 = is_visual_t[:, None, None].to(hidden_t1h.dtype)
    return text_t1h * (1 - chosen_t11) + visual_t1h * chosen_t11


def run(forward: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, grad: torch.Tensor) -> float:
    """Seconds of a forward and backward pass."""
    hidden = hidden.detach().requires_grad_()
    began = time.perf_counter()
    forward(hidden).backward(grad)
    return time.perf_counter() - began


def check_equal(experts: ModalityExperts, routed: Callable, both: Callable, hidden: torch.Tensor, grad: torch.Tensor) -> None:
    """Outputs, gradients of the input and of every weight agree."""
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
        assert (first - second).abs().max() <= TOLERANCE * second.abs().max(), "routing and masking differ"


def nothing(hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
    """A network that takes no time."""
    return hidden, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--ffn-hidden-size", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.94], help="of image tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="timed passes of each (default: %(default)s)")
    options = parser.parse_args()
    experiment = experiment_for(options.hidden_size, options.ffn_hidden_size)
    topology = topologies.initialize(experiment.parallel, seed=1)
    chunks = build_chunks(experiment, topology)
    initialize_weights(chunks, seed=1)
    experts = next(module for module in chunks[0].modules() if isinstance(module, ModalityExperts))
    hidden, grad = (torch.randn(options.tokens, 1, options.hidden_size, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    print(
        f"text and visual experts of width {options.hidden_size}, {options.ffn_hidden_size} inside, {options.tokens} tokens, fp32, "
        f"{torch.get_num_threads()} threads; forward and backward, medians of {options.repeats}"
    )
    print(f"{'image tokens':>12} {'both, masked':>13} {'routed':>10} {'times faster':>13} {'gather, scatter':>16}")
    for share in options.shares:
        layout = layout_of(options.tokens, share)
        assert layout.visual is not None
        is_visual = torch.zeros(options.tokens).index_fill(0, layout.visual.tokens, 1)

        def routed(x: torch.Tensor, layout: ModalityLayout = layout) -> torch.Tensor:
            return experts(x, layout)

        def both(x: torch.Tensor, is_visual: torch.Tensor = is_visual) -> torch.Tensor:
            return computed_both(experts, x, is_visual)

        check_equal(experts, routed, both, hidden, grad)  # and both are warm
        seconds: dict[str, list[float]] = {"routed": [], "both": [], "moving": []}
        for _ in range(options.repeats):
            seconds["both"].append(run(both, hidden, grad))
            seconds["routed"].append(run(routed, hidden, grad))
        with patch.object(experts.text, "forward", nothing), patch.object(experts.visual, "forward", nothing):
            seconds["moving"] = [run(routed, hidden, grad) for _ in range(options.repeats + 2)][2:]
        median = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = statistics.median(b / r for b, r in zip(seconds["both"], seconds["routed"], strict=True))
        moving = median["moving"] / median["routed"]
        print(f"{share:12.0%} {1e3 * median['both']:10.1f} ms {1e3 * median['routed']:7.1f} ms {ratio:13.2f} {moving:16.2%}", flush=True)
    topologies.shutdown()
    print("times faster: median of the pairs; aim: at least 1.70 (2.00 is possible)")


if __name__ == "__main__":
    main()
