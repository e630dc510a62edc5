"""InfiMM (arXiv 2403.01487): three language models, each trained in three stages.

Pre-training (`_pt`) and multi-task training (`_mtt`) train the resampler and the gated blocks; instruction fine-tuning (`_ift`) trains what
its freeze policy selects. Each stage starts from the weights of the previous one: `train infimm_zephyr_7b_mtt --init-from RUN_DIR_OF_PT`.
The first stage starts from a language model and a tower imported with `megatron-mm convert from-hf`.

Published (table 7): AdamW's betas and epsilon, peak and minimum learning rates, steps, warm-up, weight decay 0.1, clipping at 1.0, at most
6 images per sample, 64 latents, image sizes, samples of 32 tokens (pairs) and 384 tokens (documents) in PT, 128 in MTT and 512 in IFT, and
batches of 5120, 256 and 64 samples. From the authors' released code: 6 resampler layers, 8 heads of 64, a gated block before every second
layer of Zephyr-7B and every fourth of Vicuna-13B. Every fourth layer of Llama-2-13B is our assumption.

Where the paper and the model card differ, we follow the paper: PT's beta2 is 0.95 (card: 0.999), its schedule is a cosine (card: constant;
the table gives a minimum learning rate equal to the peak, so both are the same), and documents have 384 tokens (card: 792 for the 7B
model). There is one exception: the paper says that IFT trains the language model, but the card says so only for Llama-2. Here we follow the
card; `--train.freeze-policy ift` or `ift_frozen_language` selects the other option.

Chosen by us: the layouts, the mixtures, and packing, where the authors padded. Sequences have the length of the stage's longest samples and
contain whole samples, with at most 12 images. A batch of packed sequences therefore has more samples than a batch of as many padded ones.
PT's 768 sequences, half of them documents and half filled with twelve pairs of about 32 tokens each, contain about 5000 samples; MTT's 256
and IFT's 64 sequences contain at least the published number. Each recipe states the prediction of `megatron-mm plan` for its step; none has
been measured.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.config import (
    DataConfig,
    DecoderConfig,
    EvaConfig,
    Experiment,
    OptimizerConfig,
    ParallelConfig,
    ResamplerConfig,
    TrainConfig,
)
from megatron_mm.config.towers import EVA01_G_14_224, EVA02_BIGE_14_224, EVA02_L_14_336, EVA_TINY
from megatron_mm.families.debug import DEBUG_DECODER, debug_experiment
from megatron_mm.families.infimm.config import GatedConfig, InfiMMConfig

VOCABULARY = 32002
"""Llama's 32000 tokens, <|endofchunk|> and <image>."""

ZEPHYR_7B = DecoderConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=VOCABULARY,
    tied_embeddings=False,
    max_positions=32768,
    attention_window=4096,
)
"""Zephyr-7B-beta (Mistral-7B). Its attention window of 4096 tokens is longer than any sequence here."""

LLAMA_13B = DecoderConfig(
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=13824,
    num_attention_heads=40,
    num_query_groups=40,
    vocab_size=VOCABULARY,
    tied_embeddings=False,
    max_positions=4096,
)
"""Llama-2-13B and Vicuna-13B-v1.5."""


def _pretraining(recipe: str, *, decoder: DecoderConfig, vision: EvaConfig, every_n_layers: int) -> Experiment:
    return Experiment(
        recipe=f"{recipe}_pt",
        model=InfiMMConfig(decoder=decoder, vision=vision, resampler=ResamplerConfig(), gated=GatedConfig(every_n_layers=every_n_layers)),
        data=DataConfig(
            sequence_length=384,
            max_images_per_sequence=12,
            max_images_per_document=6,
            mixture={"interleaved": 0.5, "pairs": 0.5},
            to_rgb="pillow",
        ),
        optimizer=OptimizerConfig(peak_lr=1e-4, min_lr=1e-4, warmup_steps=6000, beta1=0.9, beta2=0.95, epsilon=1e-8),
        train=TrainConfig(steps=285_000, schedule_steps=285_000, global_batch_size=768, micro_batch_size=8, freeze_policy="pt"),
        parallel=ParallelConfig(),
    )


def _multi_task(pretraining: Experiment) -> Experiment:
    """The authors recomputed activations in this stage (table 7). That changes no result, and here all of them fit in memory."""
    return replace(
        pretraining,
        recipe=pretraining.recipe.replace("_pt", "_mtt"),
        data=replace(pretraining.data, sequence_length=128, max_images_per_sequence=6, mixture={"tasks": 1.0}),
        optimizer=OptimizerConfig(peak_lr=1e-5, min_lr=1e-6, warmup_steps=500, beta1=0.9, beta2=0.999, epsilon=1e-5),
        train=replace(
            pretraining.train, steps=10_000, schedule_steps=10_000, global_batch_size=256, micro_batch_size=8, freeze_policy="mtt"
        ),
    )


def _instruction(pretraining: Experiment, *, policy: str, chat_template: str) -> Experiment:
    data = pretraining.data
    train = pretraining.train
    return replace(
        pretraining,
        recipe=pretraining.recipe.replace("_pt", "_ift"),
        data=replace(data, sequence_length=512, max_images_per_sequence=6, mixture={"conversations": 1.0}, chat_template=chat_template),
        optimizer=OptimizerConfig(peak_lr=5e-6, min_lr=5e-7, warmup_steps=300, beta1=0.9, beta2=0.999, epsilon=1e-5),
        train=replace(train, steps=6_000, schedule_steps=6_000, global_batch_size=64, micro_batch_size=2, freeze_policy=policy),
    )


def infimm_zephyr_7b_pt() -> Experiment:
    """Zephyr-7B with EVA02-CLIP-L at 336 px (577 tokens), pre-training: the resampler and 16 gated blocks are trainable (2.3B parameters).

    32 GPUs, data parallel. `sbatch examples/infimm_zephyr_7b.slurm`.

    Predicted on 32 H100: 0.85 s a step (to 12%), 48% of the bf16 peak, 49 GB; as many A100-80GB: 2.05 s.
    """
    return _pretraining("infimm_zephyr_7b", decoder=ZEPHYR_7B, vision=EVA02_L_14_336, every_n_layers=2)


def infimm_zephyr_7b_mtt() -> Experiment:
    """Zephyr-7B, multi-task training. `STAGE=mtt sbatch examples/infimm_zephyr_7b.slurm`.

    Predicted on 32 H100: 0.20 s a step (to 12%), 28% of the bf16 peak, 40 GB; as many A100-80GB: 0.38 s.
    """
    return _multi_task(infimm_zephyr_7b_pt())


def infimm_zephyr_7b_ift() -> Experiment:
    """Zephyr-7B, instruction fine-tuning; the language model stays frozen (card). `STAGE=ift sbatch examples/infimm_zephyr_7b.slurm`.

    Predicted on 32 H100: 0.20 s a step (to 12%), 23% of the bf16 peak, 39 GB; as many A100-80GB: 0.34 s.
    """
    return _instruction(infimm_zephyr_7b_pt(), policy="ift_frozen_language", chat_template="zephyr")


def infimm_llama_13b_pt() -> Experiment:
    """Llama-2-13B with EVA01-CLIP-g at 224 px (257 tokens), pre-training: the resampler and 10 gated blocks are trainable.

    32 GPUs, data parallel. `sbatch examples/infimm_llama_13b.slurm`.

    Predicted on 32 H100: 1.21 s a step (to 12%), 50% of the bf16 peak, 65 GB; as many A100-80GB: 2.93 s.
    """
    return _pretraining("infimm_llama_13b", decoder=LLAMA_13B, vision=EVA01_G_14_224, every_n_layers=4)


def infimm_llama_13b_mtt() -> Experiment:
    """Llama-2-13B, multi-task training. `STAGE=mtt sbatch examples/infimm_llama_13b.slurm`.

    Predicted on 32 H100: 0.22 s a step (to 12%), 38% of the bf16 peak, 54 GB; as many A100-80GB: 0.48 s.
    """
    return _multi_task(infimm_llama_13b_pt())


def infimm_llama_13b_ift() -> Experiment:
    """Llama-2-13B, instruction fine-tuning; the language model is also trainable (card). 32 GPUs as tensor 2 x data 16.

    `STAGE=ift sbatch examples/infimm_llama_13b.slurm`.

    Predicted on 32 H100: 0.30 s a step (to 12%), 33% of the bf16 peak, 68 GB; as many A100-80GB: 0.59 s.
    """
    stage = _instruction(infimm_llama_13b_pt(), policy="ift", chat_template="llama2")
    return replace(stage, train=replace(stage.train, micro_batch_size=4), parallel=ParallelConfig(tensor=2))


def infimm_vicuna_13b_pt() -> Experiment:
    """Vicuna-13B with EVA02-CLIP-bigE at 224 px (257 tokens), pre-training: the resampler and 10 gated blocks are trainable.

    32 GPUs, data parallel. The tower has 4.35B parameters, 8.7 GB in bf16.
    `sbatch examples/infimm_vicuna_13b.slurm`.

    Predicted on 32 H100: 1.64 s a step (to 12%), 51% of the bf16 peak, 74 GB; as many A100-80GB: 3.96 s.
    """
    return _pretraining("infimm_vicuna_13b", decoder=LLAMA_13B, vision=EVA02_BIGE_14_224, every_n_layers=4)


def infimm_vicuna_13b_mtt() -> Experiment:
    """Vicuna-13B, multi-task training. `STAGE=mtt sbatch examples/infimm_vicuna_13b.slurm`.

    Predicted on 32 H100: 0.36 s a step (to 12%), 43% of the bf16 peak, 62 GB; as many A100-80GB: 0.82 s.
    """
    return _multi_task(infimm_vicuna_13b_pt())


def infimm_vicuna_13b_ift() -> Experiment:
    """Vicuna-13B, instruction fine-tuning; the language model stays frozen (card). `STAGE=ift sbatch examples/infimm_vicuna_13b.slurm`.

    Predicted on 32 H100: 0.21 s a step (to 12%), 42% of the bf16 peak, 61 GB; as many A100-80GB: 0.44 s.
    """
    return _instruction(infimm_vicuna_13b_pt(), policy="ift_frozen_language", chat_template="vicuna")


# -- For a laptop: every part of the real model, tiny. All values are ours.


def debug_infimm() -> Experiment:
    """A tiny InfiMM for `megatron-mm prepare demo` data. Everything except the tower is trainable, because there is no pre-trained language
    model to start from.

    `python -m megatron_mm train debug_infimm --run-dir runs/infimm --data.path data/demo`
    """
    model = InfiMMConfig(
        decoder=replace(DEBUG_DECODER, vocab_size=520, tied_embeddings=False),
        vision=EVA_TINY,
        resampler=ResamplerConfig(num_latents=16, num_layers=2, num_attention_heads=4, head_dim=16),
        gated=GatedConfig(every_n_layers=2, num_attention_heads=4, head_dim=32),
    )
    base = debug_experiment("debug_infimm", model)
    return replace(base, data=replace(base.data, max_images_per_document=6), train=replace(base.train, freeze_policy="ift"))


RECIPES = (
    debug_infimm,
    infimm_zephyr_7b_pt,
    infimm_zephyr_7b_mtt,
    infimm_zephyr_7b_ift,
    infimm_llama_13b_pt,
    infimm_llama_13b_mtt,
    infimm_llama_13b_ift,
    infimm_vicuna_13b_pt,
    infimm_vicuna_13b_mtt,
    infimm_vicuna_13b_ift,
)
