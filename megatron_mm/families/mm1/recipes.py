"""MM1 pre-training (arXiv 2403.09611): dense decoders of 1.2B to 30B parameters, and the paper's ablation variants.

Published: batches of 512 sequences of 4096 tokens with at most 16 images, 200k steps, all parameters trained, 45% interleaved / 45%
image-text pairs / 10% text, the image encoder DFN5B ViT-H at 378 px, 144 image tokens, C-Abstractor, the peak learning rate of equation
(1), and for the ablations ViT-L at 336 px with the 1.2B decoder. From the authors' framework (AXLearn): AdamW with betas 0.9 / 0.95,
epsilon 1e-8, clipping at 1.0, weight decay 0.1. Reported elsewhere, not in the paper's text: 2000 warm-up steps and a cosine to a tenth of
the peak. Chosen by us, because unpublished: the decoders' shapes, the vocabulary of 49152, tied embeddings, the layouts.
"""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_mm.config import (
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    Experiment,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_mm.config.towers import VIT_H_14_224, VIT_H_14_378, VIT_L_14_336, VIT_TINY
from megatron_mm.families.debug import DEBUG_DECODER, debug_experiment
from megatron_mm.families.mm1.config import MM1Config

STEPS = 200_000

DECODER_1B = DecoderConfig(num_layers=24, hidden_size=2048, ffn_hidden_size=5376, num_attention_heads=16, num_query_groups=16)
DECODER_3B = DecoderConfig(num_layers=26, hidden_size=3072, ffn_hidden_size=8064, num_attention_heads=24, num_query_groups=24)
DECODER_7B = DecoderConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=13312, num_attention_heads=32, num_query_groups=16)
DECODER_30B = DecoderConfig(num_layers=56, hidden_size=6656, ffn_hidden_size=17920, num_attention_heads=52, num_query_groups=52)

C_ABSTRACTOR_144 = ConnectorConfig(kind="c_abstractor", num_tokens=144)


def peak_learning_rate(non_embedding_parameters: float) -> float:
    """Equation (1): exp(-0.4214 ln N - 0.5535), where N is the number of the decoder's parameters without embeddings; 2.2e-5 at 30B."""
    return math.exp(-0.4214 * math.log(non_embedding_parameters) - 0.5535)


def non_embedding_parameters(decoder: DecoderConfig) -> int:
    """Parameters of a dense decoder without its embedding table and output layer."""
    width, kv_width = decoder.hidden_size, decoder.num_query_groups * decoder.head_dim
    query_width = decoder.num_attention_heads * decoder.head_dim
    attention = width * (query_width + 2 * kv_width) + query_width * width
    layer = attention + 3 * width * decoder.ffn_hidden_size + 2 * width
    return decoder.num_layers * layer + width


def _pretraining(
    recipe: str,
    *,
    decoder: DecoderConfig,
    vision: VisionConfig,
    connector: ConnectorConfig,
    parallel: ParallelConfig,
    micro_batch_size: int,
) -> Experiment:
    """Return an experiment with the settings that all MM1 pre-training runs share."""
    peak_lr = peak_learning_rate(non_embedding_parameters(decoder))
    return Experiment(
        recipe=recipe,
        model=MM1Config(decoder=decoder, vision=vision, connector=connector),
        data=DataConfig(sequence_length=4096, max_images_per_sequence=16),
        optimizer=OptimizerConfig(peak_lr=peak_lr, min_lr=0.1 * peak_lr, warmup_steps=2000),
        train=TrainConfig(steps=STEPS, schedule_steps=STEPS, global_batch_size=512, micro_batch_size=micro_batch_size, precision="bf16"),
        parallel=parallel,
    )


def mm1_1b() -> Experiment:
    """MM1 1.2B (1.195B without embeddings): one or more nodes of 8 GPUs, data parallel, two sequences per micro-batch.

    `sbatch examples/mm1_1b.slurm`. Peak learning rate 8.6e-5 by equation (1).

    Predicted on 32 H100: 2.40 s a step (to 12%), 44% of the bf16 peak, 57 GB; as many A100-80GB: 5.61 s.
    """
    parallel = ParallelConfig()
    return _pretraining(
        "mm1_1b", decoder=DECODER_1B, vision=VIT_H_14_378, connector=C_ABSTRACTOR_144, parallel=parallel, micro_batch_size=2
    )


def mm1_3b() -> Experiment:
    """MM1 3B (2.914B without embeddings): 64 GPUs, data parallel. `sbatch examples/mm1_3b.slurm`.

    Predicted on 64 H100: 1.95 s a step (to 12%), 45% of the bf16 peak, 55 GB; as many A100-80GB: 4.47 s.
    """
    parallel = ParallelConfig()
    return _pretraining(
        "mm1_3b", decoder=DECODER_3B, vision=VIT_H_14_378, connector=C_ABSTRACTOR_144, parallel=parallel, micro_batch_size=1
    )


def mm1_7b() -> Experiment:
    """MM1 7B (6.845B without embeddings): 128 GPUs as tensor 2 x data 64, two sequences per micro-batch. `sbatch examples/mm1_7b.slurm`.

    Predicted on 128 H100: 1.76 s a step (to 12%), 47% of the bf16 peak, 63 GB; as many A100-80GB: 4.11 s.
    """
    parallel = ParallelConfig(tensor=2)
    return _pretraining(
        "mm1_7b", decoder=DECODER_7B, vision=VIT_H_14_378, connector=C_ABSTRACTOR_144, parallel=parallel, micro_batch_size=2
    )


def mm1_30b() -> Experiment:
    """MM1 30B (29.963B without embeddings): 512 GPUs as tensor 4 x pipeline 2 x virtual 2 x data 64.

    `sbatch examples/mm1_30b.slurm`. 52 heads can be divided by 4 but not by 8, which determines the tensor-parallel degree. The first of
    the four stages, which also has the image encoder, has 10 layers, the others 15 or 16. A micro-batch is two sequences, and the encoder's
    layers are recomputed in the backward pass. We chose the layout.

    Predicted on 512 H100: 1.95 s a step (to 12%), 39% of the bf16 peak, 61 GB; as many A100-80GB: 4.44 s. docs/planning.md has faster
    layouts, which leave less memory free or encode on all pipeline ranks.
    """
    parallel = ParallelConfig(tensor=4, pipeline=2, virtual=2, stage_layers=(10, 15, 16, 15), recompute_encoder="full")
    return _pretraining(
        "mm1_30b", decoder=DECODER_30B, vision=VIT_H_14_378, connector=C_ABSTRACTOR_144, parallel=parallel, micro_batch_size=2
    )


# -- Mixture of experts (section 3.4, "scaling via MoE"). Published: number of experts and which layers are sparse, top-2, load-balance loss
# 0.01, router z-loss 0.001, everything else as in the dense backbone, including its learning rate. Ours: the layouts, and no capacity limit
# per expert (the work that the paper builds on uses a factor; --model.decoder.moe.capacity-factor 2.0 sets it). Tokens are dropped only if
# one process would receive more than 8 equal shares of them, for which it would not have the memory.


def _sparse(dense: Experiment, recipe: str, *, moe: MoEConfig, parallel: ParallelConfig) -> Experiment:
    assert isinstance(dense.model, MM1Config)
    model = replace(dense.model, decoder=replace(dense.model.decoder, moe=moe))
    return replace(dense, recipe=recipe, model=model, parallel=parallel)


def mm1_3b_moe() -> Experiment:
    """MM1 3B-MoE, 64B parameters in total and 4.0B active per token: 64 experts in every second layer.

    128 GPUs, data parallel, two experts of each sparse layer on each GPU. Expert-parallel groups of 32 span four nodes of 8 GPUs. With so
    few tokens per step (512 sequences), this sends less over the network than groups of 8 or 16, which have more copies of each expert to
    reduce (`parallel.nodes.expert_traffic`: 16.5 GB per GPU, against 43.5 and 25.5 GB), and it takes less memory.

    `sbatch examples/mm1_3b_moe.slurm`.

    Predicted on 128 H100: 1.42 s a step (to 20%), 37% of the bf16 peak, 71 GB; as many A100-80GB: 3.24 s.
    """
    parallel = ParallelConfig(expert=32, max_expert_load=8.0)
    return _sparse(mm1_3b(), "mm1_3b_moe", moe=MoEConfig(num_experts=64, every_n_layers=2), parallel=parallel)


def mm1_7b_moe() -> Experiment:
    """MM1 7B-MoE, 47B parameters in total and 8.4B active per token: 32 experts in every fourth layer.

    128 GPUs as tensor 2 x data 64, one expert of each sparse layer on each GPU, two sequences per micro-batch. Expert-parallel groups of 32
    span four nodes of 8 GPUs and send 12.3 GB per GPU and step over the network; groups of 8 would send 29.4 GB
    (`parallel.nodes.expert_traffic`). The image encoder's layers are recomputed in the backward pass.

    `sbatch examples/mm1_7b_moe.slurm`.

    Predicted on 128 H100: 2.32 s a step (to 20%), 41% of the bf16 peak, 63 GB; as many A100-80GB: 5.40 s.
    """
    parallel = ParallelConfig(tensor=2, expert=32, max_expert_load=8.0, recompute_encoder="full")
    return _sparse(mm1_7b(), "mm1_7b_moe", moe=MoEConfig(num_experts=32, every_n_layers=4), parallel=parallel)


# -- The ablations (section 3): ViT-L at 336 px, 144 tokens, 1.2B decoder, one change at a time.


def mm1_ablation() -> Experiment:
    """The base of the ablations: 1.2B decoder, CLIP ViT-L/14 at 336 px, C-Abstractor with 144 tokens, 45/45/10 mixture."""
    parallel = ParallelConfig()
    return _pretraining(
        "mm1_ablation", decoder=DECODER_1B, vision=VIT_L_14_336, connector=C_ABSTRACTOR_144, parallel=parallel, micro_batch_size=1
    )


def _variant(recipe: str, *, vision: VisionConfig | None = None, connector: ConnectorConfig | None = None) -> Experiment:
    base = mm1_ablation()
    assert isinstance(base.model, MM1Config)
    model = replace(base.model, vision=vision or base.model.vision, connector=connector or base.model.connector)
    return replace(base, recipe=recipe, model=model)


def mm1_ablation_vit_h_224() -> Experiment:
    """Encoder and resolution: ViT-H/14 at 224 px (16 x 16 patches, pooled to 144 tokens)."""
    return _variant("mm1_ablation_vit_h_224", vision=VIT_H_14_224)


def mm1_ablation_vit_h_378() -> Experiment:
    """Encoder and resolution: ViT-H/14 at 378 px, the encoder of the final models."""
    return _variant("mm1_ablation_vit_h_378", vision=VIT_H_14_378)


def mm1_ablation_average_144() -> Experiment:
    """Connector (figure 4): average pooling and a linear layer, 144 tokens."""
    return _variant("mm1_ablation_average_144", connector=ConnectorConfig(kind="average", num_tokens=144))


def mm1_ablation_average_64() -> Experiment:
    """Connector and tokens (figure 4): average pooling and a linear layer, 64 tokens."""
    return _variant("mm1_ablation_average_64", connector=ConnectorConfig(kind="average", num_tokens=64))


def mm1_ablation_attention_144() -> Experiment:
    """Connector (figure 4): attention pooling with 144 learned queries."""
    return _variant("mm1_ablation_attention_144", connector=ConnectorConfig(kind="attention", num_tokens=144))


def mm1_ablation_attention_64() -> Experiment:
    """Connector and tokens (figure 4): attention pooling with 64 learned queries."""
    return _variant("mm1_ablation_attention_64", connector=ConnectorConfig(kind="attention", num_tokens=64))


def mm1_ablation_c_abstractor_64() -> Experiment:
    """Tokens (figure 4): C-Abstractor with 64 tokens."""
    return _variant("mm1_ablation_c_abstractor_64", connector=ConnectorConfig(kind="c_abstractor", num_tokens=64))


def _mixture(recipe: str, **weights: float) -> Experiment:
    base = mm1_ablation()
    return replace(base, recipe=recipe, data=replace(base.data, mixture=weights))


def mm1_ablation_mix_100_0_0() -> Experiment:
    """Mixture (figure 5a): only image-text pairs."""
    return _mixture("mm1_ablation_mix_100_0_0", pairs=1.0)


def mm1_ablation_mix_66_33_0() -> Experiment:
    """Mixture (figure 5a): two thirds pairs, one third interleaved, no text."""
    return _mixture("mm1_ablation_mix_66_33_0", pairs=2 / 3, interleaved=1 / 3)


def mm1_ablation_mix_50_50_0() -> Experiment:
    """Mixture (figure 5a): half pairs, half interleaved, no text."""
    return _mixture("mm1_ablation_mix_50_50_0", pairs=0.5, interleaved=0.5)


def mm1_ablation_mix_33_66_0() -> Experiment:
    """Mixture (figure 5a): one third pairs, two thirds interleaved, no text."""
    return _mixture("mm1_ablation_mix_33_66_0", pairs=1 / 3, interleaved=2 / 3)


def mm1_ablation_mix_0_100_0() -> Experiment:
    """Mixture (figure 5a): only interleaved documents."""
    return _mixture("mm1_ablation_mix_0_100_0", interleaved=1.0)


# -- For a laptop: every part of the real model, tiny. All values are ours.


def debug_mm1() -> Experiment:
    """A tiny MM1 for `megatron-mm prepare demo` data.

    `python -m megatron_mm train debug_mm1 --run-dir runs/debug --data.path data/demo` on a laptop.
    """
    connector = ConnectorConfig(kind="c_abstractor", num_tokens=16, hidden_size=64, depth=1)
    return debug_experiment("debug_mm1", MM1Config(decoder=DEBUG_DECODER, vision=VIT_TINY, connector=connector))


def debug_mm1_moe() -> Experiment:
    """`debug_mm1` with 4 experts in every second layer.

    `torchrun --nproc-per-node 2 -m megatron_mm train debug_mm1_moe --run-dir runs/moe --data.path data/demo --parallel.expert 2`
    """
    base = debug_mm1()
    return _sparse(base, "debug_mm1_moe", moe=MoEConfig(num_experts=4, every_n_layers=2), parallel=base.parallel)


RECIPES = (
    debug_mm1,
    debug_mm1_moe,
    mm1_1b,
    mm1_3b,
    mm1_7b,
    mm1_30b,
    mm1_3b_moe,
    mm1_7b_moe,
    mm1_ablation,
    mm1_ablation_vit_h_224,
    mm1_ablation_vit_h_378,
    mm1_ablation_average_144,
    mm1_ablation_average_64,
    mm1_ablation_attention_144,
    mm1_ablation_attention_64,
    mm1_ablation_c_abstractor_64,
    mm1_ablation_mix_100_0_0,
    mm1_ablation_mix_66_33_0,
    mm1_ablation_mix_50_50_0,
    mm1_ablation_mix_33_66_0,
    mm1_ablation_mix_0_100_0,
)
