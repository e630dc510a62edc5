"""Mono-InternVL-2B (arXiv 2410.08202): endogenous visual pre-training in three stages, then instruction tuning.

Each stage starts from the weights of the previous one (`--init-from`). The first starts from InternLM2-chat-1.8B, whose feed-forward
networks `megatron-mm convert from-hf` also copies to the visual experts. `examples/mono_internvl_2b.slurm` runs all four in a row.

| | S1.1 concepts | S1.2 semantics | S1.3 alignment | S2 instructions |
|---|---|---|---|---|
| trainable | patch embedding, projector, visual experts | the same | attention too | everything |
| samples (paper) | 922M | 258M | 143M | about 5M |
| maximum image tokens (paper) | 1280 | 1792 | 3328 | 6400 |
| maximum tiles, with thumbnail | 5 | 7 | 13 | 25 |

Published: the table above; 2048 samples per batch in S1 (at that size, the steps of its stages add up to the paper's 646k); a constant
learning rate after a warm-up in S1.1 and S1.2, cosine in S1.3 and S2; the tiling rule, tile size and tokens; the data mix of S1.3. From the
released code: the decoder's shape, and 5e-5 as S1.3's peak learning rate. Unverified, chosen by us: the other peak learning rates, warm-up,
AdamW's betas and epsilon, weight decay, clipping, sequence lengths, S2's 512 samples per batch and 14k steps, and that S1.3 trains
attention's four matrices but not the norm before them. Also chosen by us: the layouts, the mixtures' names, and packing. A batch is a
number of sequences with whole samples, not a number of padded samples. If a sequence has room left, it takes another sample, so a batch
contains at least the published number. Each recipe states the prediction of `megatron-mm plan` for its step; none has been measured.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.config import DataConfig, DecoderConfig, Experiment, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_mm.families.debug import DEBUG_DECODER, debug_experiment
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig, PatchEmbeddingConfig

VOCABULARY = 92672
"""InternLM2's 92544 tokens and 9 special ones, padded to a multiple of 128, so that tensor parallelism can split the table."""
PADDING = VOCABULARY - 92544 - 9

INTERNLM2_1_8B = DecoderConfig(
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=16,
    num_query_groups=8,
    vocab_size=VOCABULARY,
    padding_rows=PADDING,
    tied_embeddings=False,
    rotary_base=1e6,
    max_positions=32768,
    rotary_scaling=2.0,
)
"""InternLM2-chat-1.8B."""

CAPTION_PROMPT = "provide a one-sentence caption for the image"

TILES_OF_448 = PatchEmbeddingConfig(image_size=448, patch_size=14, hidden_size=1024)
"""32 x 32 patches of 14 px per tile, 256 tokens."""


def mono_internvl_2b_s1_1() -> Experiment:
    """Concept learning on noisy pairs, with the prompt "provide a one-sentence caption for the image": up to 5 tiles per image.

    256 GPUs, data parallel. `sbatch examples/mono_internvl_2b.slurm` starts here. Index the pairs with that prompt: `megatron-mm prepare
    index DATA --caption-prompt "provide a one-sentence caption for the image"`.

    Predicted on 256 H100: 0.23 s a step (to 12%), 41% of the bf16 peak, 35 GB; as many A100-80GB: 0.52 s.
    """
    return Experiment(
        recipe="mono_internvl_2b_s1_1",
        model=MonoInternVLConfig(decoder=INTERNLM2_1_8B, patches=TILES_OF_448),
        data=DataConfig(
            sequence_length=1424,
            max_images_per_sequence=5,
            mixture={"pairs": 1.0},
            max_tiles=4,
            jpeg_quality=(75, 100),
            to_rgb="pillow",
            caption_prompt=CAPTION_PROMPT,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-4, min_lr=0.0, warmup_steps=2000, decay="constant", beta1=0.9, beta2=0.95, epsilon=1e-8),
        train=TrainConfig(steps=450_000, schedule_steps=450_000, global_batch_size=2048, micro_batch_size=8, freeze_policy="s1_1"),
        parallel=ParallelConfig(),
    )


def _next(stage: Experiment, *, recipe: str, policy: str, steps: int, sequence_length: int, tiles: int) -> Experiment:
    """Return the stage that follows another one.

    Args:
        tiles: maximum number of tiles, including the thumbnail.
    """
    return replace(
        stage,
        recipe=recipe,
        data=replace(stage.data, sequence_length=sequence_length, max_images_per_sequence=tiles, max_tiles=tiles - 1),
        train=replace(stage.train, steps=steps, schedule_steps=steps, freeze_policy=policy),
    )


def mono_internvl_2b_s1_2() -> Experiment:
    """Semantic learning on synthetic captions: up to 7 tiles per image. 256 GPUs, data parallel.

    Predicted on 256 H100: 0.30 s a step (to 12%), 44% of the bf16 peak, 43 GB; as many A100-80GB: 0.71 s.
    """
    stage = _next(mono_internvl_2b_s1_1(), recipe="mono_internvl_2b_s1_2", policy="s1_2", steps=126_000, sequence_length=1920, tiles=7)
    return replace(stage, data=replace(stage.data, caption_prompt=None))


def mono_internvl_2b_s1_3() -> Experiment:
    """Alignment on captions (53.9%), detection (5.2%) and OCR (40.9%): attention is also trainable; up to 13 tiles per image.

    256 GPUs, data parallel.

    Predicted on 256 H100: 0.71 s a step (to 12%), 46% of the bf16 peak, 49 GB; as many A100-80GB: 1.73 s.
    """
    stage = _next(mono_internvl_2b_s1_2(), recipe="mono_internvl_2b_s1_3", policy="s1_3", steps=70_000, sequence_length=4096, tiles=13)
    return replace(
        stage,
        data=replace(stage.data, mixture={"captions": 0.539, "detection": 0.052, "ocr": 0.409}),
        optimizer=replace(stage.optimizer, peak_lr=5e-5, decay="cosine"),
        train=replace(stage.train, micro_batch_size=4),
    )


def mono_internvl_2b_s2() -> Experiment:
    """Instruction tuning on conversations under InternLM2's chat template: everything is trainable; up to 25 tiles per image.

    256 GPUs, data parallel.

    Predicted on 256 H100: 0.43 s a step (to 12%), 45% of the bf16 peak, 59 GB; as many A100-80GB: 1.07 s.
    """
    stage = _next(mono_internvl_2b_s1_3(), recipe="mono_internvl_2b_s2", policy="s2", steps=14_000, sequence_length=8192, tiles=25)
    return replace(
        stage,
        data=replace(stage.data, mixture={"conversations": 1.0}, chat_template="internlm2"),
        optimizer=replace(stage.optimizer, peak_lr=4e-5, warmup_steps=420),
        train=replace(stage.train, global_batch_size=512, micro_batch_size=2),
    )


# -- For a laptop: every part of the real model, tiny. All values are ours.


def debug_mono_internvl() -> Experiment:
    """A tiny Mono-InternVL for `megatron-mm prepare demo` data. Everything is trainable; an image becomes at most 2 tiles of 16 tokens and
    a thumbnail.

    `python -m megatron_mm train debug_mono_internvl --run-dir runs/mono --data.path data/demo`
    """
    model = MonoInternVLConfig(
        decoder=replace(DEBUG_DECODER, vocab_size=528, tied_embeddings=False, rotary_base=1e6),
        patches=PatchEmbeddingConfig(image_size=32, patch_size=4, hidden_size=64, position_grid=8),
    )
    base = debug_experiment("debug_mono_internvl", model)
    return replace(base, data=replace(base.data, max_tiles=2, jpeg_quality=(75, 100)), train=replace(base.train, freeze_policy="s2"))


RECIPES = (debug_mono_internvl, mono_internvl_2b_s1_1, mono_internvl_2b_s1_2, mono_internvl_2b_s1_3, mono_internvl_2b_s2)
