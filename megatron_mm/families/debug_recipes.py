"""Models that learn on two CPU cores in minutes, through the same code as the large ones."""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.config import (
    CheckpointConfig,
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    Experiment,
    MoEConfig,
    MonitorConfig,
    OptimizerConfig,
    ResamplerConfig,
    TrainConfig,
)
from megatron_mm.families.infimm.config import GatedConfig, InfiMMConfig
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig, PatchEmbeddingConfig
from megatron_mm.models.eva import EVA_TINY
from megatron_mm.models.vision import VIT_TINY


def debug_mm1() -> Experiment:
    """A tiny MM1 for `megatron-mm prepare demo` data: every part of the real one, all values ours.

    `python -m megatron_mm train debug_mm1 --run-dir runs/debug --data.path data/demo` on a laptop.
    """
    return Experiment(
        recipe="debug_mm1",
        model=MM1Config(
            decoder=DecoderConfig(
                num_layers=4,
                hidden_size=128,
                ffn_hidden_size=320,
                num_attention_heads=4,
                num_query_groups=4,
                head_dim=32,
                vocab_size=512,
            ),
            vision=VIT_TINY,
            connector=ConnectorConfig(kind="c_abstractor", num_tokens=16, hidden_size=64, depth=1),
        ),
        data=DataConfig(sequence_length=256, decode_threads=2, read_threads=2, packing_window=1024),
        optimizer=OptimizerConfig(peak_lr=2e-3, min_lr=2e-4, warmup_steps=20),
        train=TrainConfig(steps=400, schedule_steps=400, global_batch_size=16, micro_batch_size=4, precision="fp32"),
        checkpoint=CheckpointConfig(interval=200, keep=2),
        eval=EvalConfig(interval=100, batches=4, samples=4, max_new_tokens=16),
        monitor=MonitorConfig(console_interval=10),
    )


def debug_mm1_moe() -> Experiment:
    """`debug_mm1` with 4 experts in every second layer, all values ours.

    `torchrun --nproc-per-node 2 -m megatron_mm train debug_mm1_moe --run-dir runs/moe --data.path data/demo --parallel.expert 2`
    """
    base = debug_mm1()
    assert isinstance(base.model, MM1Config)
    decoder = replace(base.model.decoder, moe=MoEConfig(num_experts=4, every_n_layers=2))
    return replace(base, recipe="debug_mm1_moe", model=replace(base.model, decoder=decoder))


def debug_infimm() -> Experiment:
    """A tiny InfiMM for the same data: every part of the real one, all values ours. All but the tower
    learns, as there is no language model to begin with.

    `python -m megatron_mm train debug_infimm --run-dir runs/infimm --data.path data/demo`
    """
    base = debug_mm1()
    return replace(
        base,
        recipe="debug_infimm",
        model=InfiMMConfig(
            decoder=replace(base.model.decoder, vocab_size=520, tied_embeddings=False),
            vision=EVA_TINY,
            resampler=ResamplerConfig(num_latents=16, num_layers=2, num_attention_heads=4, head_dim=16),
            gated=GatedConfig(every_n_layers=2, num_attention_heads=4, head_dim=32),
        ),
        data=replace(base.data, max_images_per_document=6),
        train=replace(base.train, policy="ift"),
    )


def debug_mono_internvl() -> Experiment:
    """A tiny Mono-InternVL for the same data: every part of the real one, all values ours. Everything learns; an image
    becomes 2 tiles of 16 tokens and a thumbnail at most.

    `python -m megatron_mm train debug_mono_internvl --run-dir runs/mono --data.path data/demo`
    """
    base = debug_mm1()
    return replace(
        base,
        recipe="debug_mono_internvl",
        model=MonoInternVLConfig(
            decoder=replace(base.model.decoder, vocab_size=528, tied_embeddings=False, rotary_base=1e6),
            patches=PatchEmbeddingConfig(image_size=32, patch_size=4, hidden_size=64, position_grid=8),
        ),
        data=replace(base.data, max_tiles=2, jpeg_quality=(75, 100)),
        train=replace(base.train, policy="s2"),
    )


RECIPES = (debug_mm1, debug_mm1_moe, debug_infimm, debug_mono_internvl)
