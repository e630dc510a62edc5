"""MM1's supervised fine-tuning (arXiv 2403.09611, section 4) on conversations, at 1344 px.

Published: encoder and decoder are both trained; images of 448, 560 or 672 px with interpolated position embeddings; images of 1344 px as
sub-images, an overview of 672 px and four crops of 672 px, 5 x 144 = 720 tokens; up to 1792 px in the same way (sub-images of 896 px:
`--model.vision.image-size 896`); demonstrations at mixed resolution. Reported elsewhere, not checked against the paper: 10k steps of 256
sequences of 2048 tokens, peak learning rate 1e-5, cosine to 0. Derived: at most 14 sub-images per sequence, as many as fit in 2048 tokens.
Chosen by us, because unpublished: AdamW as in pre-training, 300 steps of warm-up, Vicuna's chat template, showing every image as sub-images
whatever its size, half of the demonstrations at low resolution, the layouts, and packing (a batch is a number of sequences, each filled
with whole conversations).

Each recipe starts from a pre-trained run: `--init-from RUN_DIR`. `--model.sub-images None` shows images as one square. See
docs/mm1_fine_tuning.md.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.config import Experiment, OptimizerConfig, ParallelConfig
from megatron_mm.data.sub_images import SubImages
from megatron_mm.families.mm1 import recipes
from megatron_mm.families.mm1.config import MM1Config

STEPS = 10_000


def _fine_tuning(pretrained: Experiment, *, parallel: ParallelConfig, micro_batch_size: int) -> Experiment:
    """Return the fine-tuning experiment of a pre-trained model."""
    assert isinstance(pretrained.model, MM1Config)
    return replace(
        pretrained,
        recipe=f"{pretrained.recipe}_sft",
        model=replace(pretrained.model, vision=replace(pretrained.model.vision, image_size=672), sub_images=SubImages(grid=2)),
        data=replace(
            pretrained.data,
            mixture={"conversations": 1.0},
            sequence_length=2048,
            max_images_per_sequence=14,
            chat_template="vicuna",
            low_resolution_demonstrations=0.5,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-5, min_lr=0.0, warmup_steps=300),
        train=replace(pretrained.train, steps=STEPS, schedule_steps=STEPS, global_batch_size=256, micro_batch_size=micro_batch_size),
        parallel=parallel,
    )


def mm1_3b_sft() -> Experiment:
    """Fine-tuning of `mm1_3b`: 64 GPUs as tensor 2 x data 32.

    Predicted on 64 H100: 1.01 s a step (to 12%), 38% of the bf16 peak, 40 GB; as many A100-80GB: 2.14 s.
    """
    return _fine_tuning(recipes.mm1_3b(), parallel=ParallelConfig(tensor=2), micro_batch_size=2)


def mm1_7b_sft() -> Experiment:
    """Fine-tuning of `mm1_7b`: 64 GPUs as tensor 4 x data 16.

    Predicted on 64 H100: 1.44 s a step (to 12%), 41% of the bf16 peak, 46 GB; as many A100-80GB: 3.26 s.
    """
    return _fine_tuning(recipes.mm1_7b(), parallel=ParallelConfig(tensor=4), micro_batch_size=4)


def mm1_30b_sft() -> Experiment:
    """Fine-tuning of `mm1_30b`: 128 GPUs as tensor 4 x data 32.

    `sbatch examples/mm1_30b_sft.slurm --init-from /scratch/runs/mm1_30b`. Layers of the image tower are recomputed in the backward pass,
    because with 2304 patches per image their activations would not fit in memory. There is no pipeline parallelism, because the first
    stage, which has the tower, would delay the others.

    Predicted on 128 H100: 2.23 s a step (to 12%), 39% of the bf16 peak, 72 GB; as many A100-80GB: 4.97 s.
    """
    layout = ParallelConfig(tensor=4, recompute_encoder="full")
    return _fine_tuning(recipes.mm1_30b(), parallel=layout, micro_batch_size=2)


def mm1_3b_moe_sft() -> Experiment:
    """Fine-tuning of `mm1_3b_moe`: 128 GPUs as tensor 2 x data 64, two experts of each sparse layer on each GPU.

    Predicted on 128 H100: 0.69 s a step (to 20%), 32% of the bf16 peak, 57 GB; as many A100-80GB: 1.36 s.
    """
    return _fine_tuning(recipes.mm1_3b_moe(), parallel=ParallelConfig(tensor=2, expert=32), micro_batch_size=2)


def mm1_7b_moe_sft() -> Experiment:
    """Fine-tuning of `mm1_7b_moe`: 64 GPUs as tensor 2 x data 32, one expert of each sparse layer on each GPU.

    Predicted on 64 H100: 1.57 s a step (to 20%), 41% of the bf16 peak, 72 GB; as many A100-80GB: 3.59 s.
    """
    return _fine_tuning(recipes.mm1_7b_moe(), parallel=ParallelConfig(tensor=2, expert=32), micro_batch_size=2)


def debug_mm1_sft() -> Experiment:
    """Fine-tuning of `debug_mm1` for two CPU cores: an overview and four crops of 48 px, 5 x 16 = 80 tokens per image. All values are ours.

    `python -m megatron_mm train debug_mm1_sft --run-dir runs/sft --data.path data/demo --init-from runs/debug`
    """
    base = recipes.debug_mm1()
    assert isinstance(base.model, MM1Config)
    return replace(
        base,
        recipe="debug_mm1_sft",
        model=replace(base.model, vision=replace(base.model.vision, image_size=48), sub_images=SubImages(grid=2)),
        data=replace(base.data, mixture={"conversations": 1.0}, max_images_per_sequence=15, low_resolution_demonstrations=0.5),
        optimizer=OptimizerConfig(peak_lr=1e-3, min_lr=0.0, warmup_steps=20),
        train=replace(base.train, steps=200, schedule_steps=200),
    )


RECIPES = (debug_mm1_sft, mm1_3b_sft, mm1_7b_sft, mm1_30b_sft, mm1_3b_moe_sft, mm1_7b_moe_sft)
