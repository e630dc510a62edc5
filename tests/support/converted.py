"""Checkpoints and Hugging Face models of the same weights: their tensors and their outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, ProcessorMixin

from megatron_mm.config import CheckpointConfig, Experiment, ParallelConfig
from megatron_mm.conversion.reader import CheckpointReader
from megatron_mm.data.batch import PackedBatch
from megatron_mm.parallel import topology as topologies
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import Checkpointer, TrainState, find_checkpoint, load_weights
from megatron_mm.training.optimizer import build_optimizer, initialize_state
from support.distributed import run_processes
from support.hf_models import DECODER, VOCABULARY, make_language, save
from support.trained import DOCUMENTS, scramble

IDS = torch.arange(64).mul(37).remainder(VOCABULARY)


PIXELS = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


@dataclass(frozen=True)
class Computed:
    """Outputs of one process of a layout, computed with a checkpoint's weights."""

    logits: torch.Tensor | None
    """[tokens, vocabulary] of `IDS`, on the last stage."""
    features: torch.Tensor | None
    """[images, patches, width] of `PIXELS`, on the first stage."""
    weights: dict[str, torch.Tensor]


def compute(settings: Experiment, run_dir: Path) -> Computed:
    """Load as training does and run the model; called on all processes of the settings' layout."""
    topology = topologies.initialize(settings.parallel, seed=3)
    model = build_model(settings, topology)
    load_weights(settings, topology, model, find_checkpoint(run_dir))
    batch = PackedBatch(
        token_ids=IDS,
        labels=IDS,
        loss_mask=torch.ones(64),
        is_token=torch.ones(64, dtype=torch.bool),
        position_ids=torch.arange(64),
        source_ids=torch.zeros_like(IDS),
        cu_seqlens=torch.tensor([0, 64], dtype=torch.int32),
        max_seqlen=64,
        image_starts=torch.zeros(0, dtype=torch.int64),
        image_owners=torch.zeros(0, dtype=torch.int64),
        image_documents=torch.zeros(0, dtype=torch.int64),
        pixels=PIXELS[:0] if topology.is_first_stage else None,
    )
    chunk = model[0].module
    with torch.no_grad():
        logits = _logits(model, batch)
        features = chunk.vision(PIXELS) if topology.is_first_stage else None
    weights = {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
    topologies.shutdown()
    return Computed(logits, features, weights)


def _logits(model: list[Any], batch: PackedBatch) -> torch.Tensor | None:
    copies = parallel_state.get_pipeline_model_parallel_world_size() if len(model) > 1 else 1
    batches = [iter([batch] * copies) for _ in model]
    found = get_forward_backward_func()(
        forward_step_func=lambda batches, chunk: (chunk(next(batches), with_loss=False), lambda logits, non_loss_data=True: logits),
        data_iterator=batches if len(model) > 1 else batches[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=copies,
        seq_length=batch.num_tokens,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(found[0]) for _ in range(group.size())]
    dist.all_gather(parts, found[0].contiguous(), group=group)
    return torch.cat(parts, dim=-1)[0]


def hf_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS[None]).logits[0]


def hf_features(folder: Path, settings: Experiment) -> torch.Tensor:
    """Return the input of connectors: the tower's last layer after its final norm, without the class token."""
    model = CLIPVisionModel.from_pretrained(folder)
    tower = getattr(model, "vision_model", model)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.model.vision.mean, settings.model.vision.std))
    with torch.no_grad():
        return tower.post_layernorm(tower((PIXELS / 255 - mean) / std).last_hidden_state)[:, 1:]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(find_checkpoint(run_dir))
    return {name: reader.read(name) for name in reader.all_names()}


def internlm2(folder: Path) -> tuple[Path, Path]:
    """Write one random decoder twice: under InternLM2's names, with wqkv packed as InternLM2 defines it, and under Llama's."""
    model = make_language()
    state, ours = model.state_dict(), {}
    groups, heads, width = DECODER["num_key_value_heads"], DECODER["num_attention_heads"], DECODER["hidden_size"]
    for layer in range(DECODER["num_hidden_layers"]):
        theirs, name = f"model.layers.{layer}", f"model.layers.{layer}"
        packed = torch.empty(groups, heads // groups + 2, DECODER["head_dim"], width)
        for kind, place in (("q", slice(0, -2)), ("k", slice(-2, -1)), ("v", slice(-1, None))):
            packed[:, place] = state[f"{theirs}.self_attn.{kind}_proj.weight"].view(groups, -1, DECODER["head_dim"], width)
        ours |= {
            f"{name}.attention.wqkv.weight": packed.flatten(0, 2),
            f"{name}.attention.wo.weight": state[f"{theirs}.self_attn.o_proj.weight"],
            f"{name}.feed_forward.w1.weight": state[f"{theirs}.mlp.gate_proj.weight"],
            f"{name}.feed_forward.w3.weight": state[f"{theirs}.mlp.up_proj.weight"],
            f"{name}.feed_forward.w2.weight": state[f"{theirs}.mlp.down_proj.weight"],
            f"{name}.attention_norm.weight": state[f"{theirs}.input_layernorm.weight"],
            f"{name}.ffn_norm.weight": state[f"{theirs}.post_attention_layernorm.weight"],
        }
    ours |= {
        "model.tok_embeddings.weight": state["model.embed_tokens.weight"],
        "model.norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    (folder / "internlm2").mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in ours.items()}, folder / "internlm2" / "model.safetensors")
    config = {**DECODER, "model_type": "internlm2", "rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "bias": False}
    config.pop("rope_parameters")
    (folder / "internlm2" / "config.json").write_text(json.dumps(config))
    return folder / "internlm2", save(model, folder / "llama")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def _save_random(settings: Experiment, run_dir: Path) -> None:
    """Save a checkpoint with an optimizer, as training does; on one process its weights are random, unlike any initialisation."""
    topology = topologies.initialize(settings.parallel, seed=5)
    model = build_model(settings, topology)
    if topology.world_size == 1:
        scramble(model[0])
    optimizer = build_optimizer(settings, model)
    initialize_state(optimizer)
    checkpointer = Checkpointer(settings, topology, run_dir, model, optimizer)
    checkpointer.save(TrainState())
    checkpointer.finish()
    topologies.shutdown()


def written(settings: Experiment, run_dir: Path, parallel: dict[str, Any] | None = None, *, world_size: int = 1) -> dict[str, torch.Tensor]:
    """Save a checkpoint of random weights from this layout; return its tensors."""
    settings = replace(settings, parallel=ParallelConfig(**(parallel or {})), checkpoint=CheckpointConfig(asynchronous=False))
    run_processes(_save_random, world_size, settings, run_dir)
    return stored(run_dir)


def stored(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(find_checkpoint(run_dir))
    return {name: reader.read(name) for name in reader.names()}


def to_pillow(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def exported_logits(model: torch.nn.Module, processor: ProcessorMixin, batch: PackedBatch) -> list[torch.Tensor]:
    """Return the logits [tokens, vocabulary] of each of `trained.DOCUMENTS`, computed separately from its text and its images."""
    assert batch.pixels is not None
    logits, images = [], [to_pillow(pixels) for pixels in batch.pixels]
    for num_images, text in DOCUMENTS:
        own, images = images[:num_images], images[num_images:]
        inputs = processor(images=own or None, text="<image>" * num_images + text + "</s>", return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**inputs).logits[0])
    return logits
