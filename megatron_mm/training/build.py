"""Builds the model chunks that this process trains, initialises them, and wraps them for data parallelism."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import MegatronModule

from megatron_mm.config import Experiment
from megatron_mm.families.registry import family_of
from megatron_mm.models.context import ChunkContext, Kernels
from megatron_mm.models.encoder import ImageEncoder
from megatron_mm.models.layers import Backend
from megatron_mm.parallel.gradients import finalize_model_grads
from megatron_mm.parallel.images import TensorParallelImages
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.parallel.topology import Topology, replicated_groups, single_process_groups
from megatron_mm.platform import engine
from megatron_mm.platform.multi_tensor import DataParallel
from megatron_mm.training.freezing import check_patterns, freeze, trainable_patterns
from megatron_mm.training.host_memory import check_memory
from megatron_mm.training.kernels import choose_kernels, fuse_weight_gradients
from megatron_mm.training.layer_backend import choose_backend, log_layers
from megatron_mm.training.spread_encoder import SpreadEncoder, wrapped_modules


def _choose(experiment: Experiment, topology: Topology) -> tuple[Backend, Kernels]:
    """Return layer backend and fused kernels for this process's device; on the meta device plain PyTorch without fused kernels."""
    if topology.device.type == "meta":
        return "torch", Kernels()
    backend = choose_backend(experiment, on_gpu=topology.device.type == "cuda")
    return backend, choose_kernels(experiment, backend=backend)


def report_layers(experiment: Experiment, topology: Topology) -> None:
    """Log, on the main process, which layers and fused kernels a model is built with. Training logs it when it checks the machine."""
    if topology.is_main:
        backend, kernels = _choose(experiment, topology)
        log_layers(experiment, backend=backend, kernels=kernels, on_gpu=topology.device.type == "cuda")


def build_chunks(experiment: Experiment, topology: Topology) -> list[MegatronModule]:
    """Build the pipeline chunks of this process, with weights allocated on its device but not initialised."""
    family = family_of(experiment.model)
    chunks = []
    for virtual_stage in range(experiment.parallel.virtual):
        with torch.device(topology.device):
            chunks.append(family.build(experiment.model, _context(experiment, topology, virtual_stage=virtual_stage)))
    return chunks


def _context(experiment: Experiment, topology: Topology, *, virtual_stage: int) -> ChunkContext:
    parallel = experiment.parallel
    backend, kernels = _choose(experiment, topology)
    return ChunkContext(
        parallel=parallel,
        precision=experiment.train.precision,
        backend=backend,
        on_gpu=topology.device.type == "cuda",
        sequence_length=experiment.data.sequence_length,
        stage=virtual_stage * parallel.pipeline + topology.pipeline_rank,
        tensor_rank=topology.tensor_rank,
        encoder_groups=single_process_groups(),
        sharing=TensorParallelImages(parallel_state.get_tensor_model_parallel_group(), sequence_parallel=parallel.sequence_parallel),
        kernels=kernels,
        fp8_recipe=experiment.precision.fp8_recipe,
        fp8_weights=experiment.precision.fp8_weights,
    )


def build_encoder(experiment: Experiment, topology: Topology) -> ImageEncoder | None:
    """Build the image encoder if all pipeline ranks hold it, allocated but not initialised; return None otherwise."""
    if not experiment.parallel.spread_encoder:
        return None
    with torch.device(topology.device):
        return family_of(experiment.model).build_encoder(experiment.model, _context(experiment, topology, virtual_stage=0))


def _built(experiment: Experiment, topology: Topology) -> tuple[list[MegatronModule], ImageEncoder | None, list[torch.nn.Module]]:
    """Build what this process holds: its chunks; the encoder if all pipeline ranks hold it; and both in one list."""
    chunks, encoder = build_chunks(experiment, topology), build_encoder(experiment, topology)
    return chunks, encoder, [*chunks] if encoder is None else [*chunks, encoder]


def _make_user_buffers(experiment: Experiment, topology: Topology) -> None:
    """Create the user buffers that `parallel.overlap_tensor` needs."""
    parallel = experiment.parallel
    if parallel.overlap_tensor and parallel.sequence_parallel and _choose(experiment, topology)[0] == "te":
        engine.make_user_buffers(
            tokens=experiment.token_multiple,
            width=experiment.model.decoder.hidden_size,
            tensor=parallel.tensor,
            fp8=experiment.train.precision == "fp8",
        )


def build_model(experiment: Experiment, topology: Topology, *, optimizer: bool = False) -> list[DistributedDataParallel]:
    """Build the chunks of this process with initial weights, wrapped for data parallelism.

    Args:
        optimizer: an optimizer will be built for the model, so its state must fit into memory, too.

    Raises ValueError, on all processes, if a pattern of the freeze policy matches nothing, or if memory without a GPU is too small.
    """
    parallel = experiment.parallel
    _make_user_buffers(experiment, topology)
    if topology.device.type == "cpu" and _choose(experiment, topology)[0] == "torch":  # on the meta device layers are those, too
        *_, modules = _built(experiment, replace(topology, device=torch.device("meta")))
        check_memory(modules, experiment, topology, optimizer=optimizer)
    chunks, encoder, modules = _built(experiment, topology)
    initialize_weights(modules, seed=experiment.train.seed)
    engine.leave_generators_alone(modules)
    check_patterns(experiment, [name for module in modules for name, _ in module.named_parameters()])
    for module in modules:
        freeze(module, trainable_patterns(experiment))
    on_gpu = topology.device.type == "cuda"
    gather_early = (
        parallel.overlap_param_gather and parallel.distributed_optimizer and on_gpu and (parallel.pipeline == 1 or parallel.virtual > 1)
    )
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=experiment.precision.gradients == "fp32",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=gather_early,
        use_distributed_optimizer=parallel.distributed_optimizer,
        fp8_param_gather=chunks[0].config.fp8_param,
        delay_wgrad_compute=chunks[0].config.delay_wgrad_compute,  # else a delayed gradient is added in the next step
    )
    model: list[DistributedDataParallel] = []
    for index, chunk in enumerate(chunks):
        # The later chunks' backward passes can hide one large reduction; buckets would only add messages.
        model.append(DataParallel(config=chunk.config, ddp_config=ddp, module=chunk, disable_bucketing=index > 0))
    spread = None if encoder is None else _spread(encoder, chunks[0], ddp, topology)
    if _choose(experiment, topology)[1].weight_gradients:
        fuse_weight_gradients(wrapped_modules(model))
    config = chunks[0].config
    config.finalize_model_grads_func = partial(finalize_model_grads, beside=spread)
    if parallel.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
    if parallel.overlap_grad_reduce and len(model) > 1:
        config.grad_sync_func = [chunk.start_grad_sync for chunk in model]
    if gather_early and len(model) > 1:
        config.param_sync_func = [chunk.start_param_sync for chunk in model]
    return model


def _spread(encoder: ImageEncoder, first: MegatronModule, config: DistributedDataParallelConfig, topology: Topology) -> SpreadEncoder:
    """Wrap the encoder for data parallelism over all processes and attach it to the first chunk, which uses it for images that were not
    encoded in advance."""
    config = replace(config, overlap_grad_reduce=False, overlap_param_gather=False)  # its backward pass is the step's last
    wrapped = DataParallel(config=encoder.config, ddp_config=config, module=encoder, pg_collection=replicated_groups())
    spread = SpreadEncoder(wrapped, tensor_rank=topology.tensor_rank)
    first.__dict__.update(encoder=encoder, spread_encoder=spread)
    return spread
