"""Captures the routers of sparse layers as CUDA graphs (`kernels.router_graph`).

They are captured once the model is loaded and before the loader starts. A replay reads the expert shares of the previous step where they
were at that time; they are always changed in place. Routers in evaluations, generation, and other processes' programs run without graphs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_mm.config import Experiment
from megatron_mm.models.moe import Router, routers
from megatron_mm.models.router_graph import Copy, GraphedRouting, Inputs, Outputs
from megatron_mm.parallel.stages import most_in_flight
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform import cuda_graph

LIMIT = 1e-5
"""Allowed difference of weights, gradients and statistics between a replay and the router, relative to the largest number of each."""


def graph_routers(experiment: Experiment, model: Sequence[DistributedDataParallel], topology: Topology) -> int:
    """Make the routers of this process run as replays of graphs, if the experiment asks for it; return the number of these routers.

    Args:
        model: this process's pipeline chunks.

    Raises ValueError if a router cannot be captured, or gives other results in a replay.
    """
    found = [router for _, router in routers(list(model))] if experiment.kernels.router_graph else []
    if not found:
        return 0
    waiting = most_in_flight(experiment.parallel, pipeline_rank=topology.pipeline_rank)
    copies = min(waiting, experiment.num_micro_batches(topology.data_size))
    rows, stream = most_tokens(experiment), torch.cuda.Stream()
    for router in found:
        try:
            graphed = _graphed(router, rows=rows, copies=copies, stream=stream)
            for copy in graphed.copies:
                _check(router, graphed, copy)
        except RuntimeError as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(_refused(f"the graph of a router fails ({why})")) from error
        router.graphed = graphed
    return len(found)


def most_tokens(experiment: Experiment) -> int:
    """Return the tokens of the largest micro-batch on one process."""
    parallel, multiple = experiment.parallel, experiment.token_multiple
    whole = -(-experiment.train.micro_batch_size * experiment.data.sequence_length // multiple) * multiple
    return whole // (parallel.tensor if parallel.sequence_parallel else 1)


def _graphed(router: Router, *, rows: int, copies: int, stream: torch.cuda.Stream) -> GraphedRouting:
    token_weight = torch.ones((), device=router.weight.device)
    captured = [_captured(router, rows=rows, token_weight=token_weight, stream=stream) for _ in range(copies)]
    return GraphedRouting(captured, token_weight=token_weight, most_choices=None if router.max_load is None else router.most_choices)


def _captured(router: Router, *, rows: int, token_weight: torch.Tensor, stream: torch.cuda.Stream) -> Copy:
    inputs = Inputs.empty(rows=rows, experts=router.shares.numel(), device=router.weight.device)
    latest: dict[
        str, torch.Tensor
    ] = {}  # results of the latest calls; those of the last ones, which are captured, are overwritten by replays

    def forward(logits_ne: torch.Tensor) -> torch.Tensor:
        weights_ne, chosen_ne, latest["kept"] = router.choose(logits_ne, inputs.real, limit=inputs.limit)
        latest["loss"], latest["row"] = router.losses(logits_ne, inputs.real, chosen_ne, latest["kept"], token_weight=token_weight)
        return weights_ne

    def backward(weights_ne: torch.Tensor, gradient_ne: torch.Tensor) -> None:
        gradients = (gradient_ne, inputs.loss_scale)
        (latest["gradient"],) = torch.autograd.grad((weights_ne, latest["loss"]), inputs.logits, gradients)

    passes = cuda_graph.capture_passes(forward, backward, inputs.logits, stream=stream)
    inputs.gradient = passes.gradient
    outputs = Outputs(weights=passes.forward(), kept=latest["kept"], row=latest["row"], gradient=latest["gradient"])
    return Copy(inputs, outputs, passes.forward, passes.backward)


def _check(router: Router, graphed: GraphedRouting, copy: Copy) -> None:
    """Raise ValueError if replays on random logits (of as many tokens as fit, fewer, and as many again) differ from the router."""
    difference = max(
        replay_difference(router, graphed, copy, tokens=tokens) for tokens in (graphed.rows, graphed.rows // 2 + 1, graphed.rows)
    )
    if not difference <= LIMIT:  # also for NaN
        raise ValueError(_refused(f"a replay of a router differs from the router by {difference:.2g} (allowed: {LIMIT:g})"))


def replay_difference(router: Router, graphed: GraphedRouting, copy: Copy, *, tokens: int) -> float:
    """Return the largest difference of weights, gradients and statistics between a replay of this copy and the router, for random logits
    and some padding, relative to the largest number of each; infinity if they choose other experts."""
    generator = torch.Generator().manual_seed(tokens)  # its own: a run draws the same numbers with and without graphs
    device = router.weight.device
    logits, gradient = (torch.randn(tokens, router.shares.numel(), generator=generator).to(device) for _ in range(2))
    real = (torch.rand(tokens, generator=generator) < 0.9).to(device)

    def eager(logits_te: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, chosen, kept = router.choose(logits_te, real)
        loss, row = router.losses(logits_te, real, chosen, kept, token_weight=1.0)
        return *torch.autograd.grad((weights, loss), logits_te, (gradient, torch.ones_like(loss))), weights.detach(), row, kept

    with torch.enable_grad():
        expected = eager(logits.requires_grad_())
    copy.fill(logits, real, most_choices=graphed.most_choices)
    copy.forward()
    copy.inputs.gradient[:tokens].copy_(gradient)
    copy.inputs.loss_scale.fill_(1.0)
    copy.backward()
    outputs = copy.outputs
    found = (outputs.gradient[:tokens], outputs.weights[:tokens], outputs.row, outputs.kept[:tokens])
    if not torch.equal(found[-1], expected[-1]):
        return float("inf")
    pairs = list(zip(found[:-1], expected[:-1], strict=True))
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1e-20)) for one, other in pairs)


def _refused(why: str) -> str:
    return f"kernels.router_graph is True, but {why}: leave it out"
