"""From an experiment to the chunks that this process trains: build, initialise, wrap for data parallelism."""

from __future__ import annotations

import importlib.util
import logging

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import MegatronModule

from megatron_mm.config import Experiment
from megatron_mm.families.registry import family_of
from megatron_mm.models.context import ChunkContext, Kernels
from megatron_mm.models.layers import Backend
from megatron_mm.parallel.gradients import finalize_model_grads
from megatron_mm.parallel.images import TensorParallelImages
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.parallel.topology import Topology, single_process_groups
from megatron_mm.platform.device import packed_attention_missing
from megatron_mm.training.freezing import check_patterns, freeze, trainable_patterns
from megatron_mm.training.kernels import choose_kernels, fuse_weight_gradients

logger = logging.getLogger(__name__)


def choose_backend(experiment: Experiment, *, on_gpu: bool) -> Backend:
    """The layer backend that `train.layers` asks for; auto takes plain PyTorch, and says so, on a GPU that lacks a kernel for the other.

    Raises ValueError where Transformer Engine is asked for, or FP8 needs it, and it or its attention over packed documents is not here; or
    is asked for in fp32, for which that attention has no kernel.
    """
    train = experiment.train
    has_te = on_gpu and importlib.util.find_spec("transformer_engine") is not None
    missing = packed_attention_missing() if has_te and train.layers != "torch" and train.precision != "fp32" else ""
    if missing and (train.layers == "te" or train.precision == "fp8"):
        raise ValueError(
            f"train.layers is {train.layers} and train.precision {train.precision}, but {missing}: install it, or use "
            "--train.layers torch and --train.precision bf16"
        )
    if missing:
        logger.warning("layers are plain PyTorch's: %s", missing)
        return "torch"
    if train.layers == "te" and not has_te:
        raise ValueError("train.layers is te, but Transformer Engine needs a GPU and its package: install it or use --train.layers torch")
    if train.precision == "fp8" and (not has_te or train.layers == "torch"):
        raise ValueError("train.precision is fp8, which needs a GPU with Transformer Engine: use --train.precision bf16 here")
    if train.layers == "te" and train.precision == "fp32":
        raise ValueError(
            "train.layers is te, but Transformer Engine has no fp32 attention: use --train.precision bf16 or --train.layers torch"
        )
    return "te" if has_te and train.layers != "torch" and train.precision != "fp32" else "torch"


def _choose(experiment: Experiment, topology: Topology) -> tuple[Backend, Kernels]:
    """Layer backend and fused kernels on this process's device; the plainest where only shapes are wanted."""
    if topology.device.type == "meta":
        return "torch", Kernels()
    backend = choose_backend(experiment, on_gpu=topology.device.type == "cuda")
    return backend, choose_kernels(experiment, backend=backend)


def build_chunks(experiment: Experiment, topology: Topology) -> list[MegatronModule]:
    """The pipeline chunks of this process, their weights allocated on its device and not initialised."""
    parallel = experiment.parallel
    on_gpu = topology.device.type == "cuda"
    family = family_of(experiment.model)
    backend, kernels = _choose(experiment, topology)
    chunks = []
    for virtual_stage in range(parallel.virtual):
        context = ChunkContext(
            parallel=parallel,
            precision=experiment.train.precision,
            backend=backend,
            on_gpu=on_gpu,
            sequence_length=experiment.data.sequence_length,
            stage=virtual_stage * parallel.pipeline + topology.pipeline_rank,
            encoder_groups=single_process_groups(),
            sharing=TensorParallelImages(parallel_state.get_tensor_model_parallel_group(), sequence_parallel=parallel.sequence_parallel),
            kernels=kernels,
        )
        with torch.device(topology.device):
            chunks.append(family.build(experiment.model, context))
    return chunks


def build_model(experiment: Experiment, topology: Topology) -> list[DistributedDataParallel]:
    """The chunks of this process with their initial weights, wrapped so that gradients are reduced over data parallelism.

    Raises ValueError, on all processes, where the freeze policy has a pattern that matches nothing.
    """
    parallel = experiment.parallel
    chunks = build_chunks(experiment, topology)
    initialize_weights(chunks, seed=experiment.train.seed)
    check_patterns(experiment, [name for chunk in chunks for name, _ in chunk.named_parameters()])
    for chunk in chunks:
        freeze(chunk, trainable_patterns(experiment))
    on_gpu = topology.device.type == "cuda"
    gather_early = (
        parallel.overlap_param_gather and parallel.distributed_optimizer and on_gpu and (parallel.pipeline == 1 or parallel.virtual > 1)
    )
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=gather_early,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    model = []
    for index, chunk in enumerate(chunks):
        # Later chunks have their whole backward pass to hide one large reduction in; buckets would only add messages.
        model.append(DistributedDataParallel(config=chunk.config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0))
    if _choose(experiment, topology)[1].weight_gradients:
        fuse_weight_gradients(model)
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
    if parallel.overlap_grad_reduce and len(model) > 1:
        config.grad_sync_func = [chunk.start_grad_sync for chunk in model]
    if gather_early and len(model) > 1:
        config.param_sync_func = [chunk.start_param_sync for chunk in model]
    return model
