"""Compare a monolithic model (patches, visual experts) with a modular one (image tower, same decoder) of as many image tokens.

    .venv/bin/python benchmarks/monolithic.py

Measures the forward pass of one document, as before the first token of an answer: tiles of 448 px, 256 tokens each, and a text. The modular
model has a tower of InternViT-300M's shape (24 layers of width 1024, 16 heads, MLP 4096). Its features reach the decoder in the same way,
through pixel-unshuffle and projector, and in the decoder all tokens go through the text experts. Both have the same decoder layers and run
in turn.

`--width-divisor` divides the widths and heads of both models, and `--layers` sets the layers of both (24 in the real ones). The vocabulary
is tiny, because inference needs only the last token's logits. The ratio is measured end to end; "at 24 layers" scales the measured time of
the layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace

import torch

from megatron_mm.config import Experiment, VisionConfig
from megatron_mm.data.batch import PackedBatch, documents_of_images
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig, PatchEmbeddingConfig
from megatron_mm.families.mono_internvl.modality_experts import modality_layout
from megatron_mm.families.mono_internvl.model import MonoInternVLModel
from megatron_mm.families.mono_internvl.patch_embedding import unshuffle
from megatron_mm.families.recipes import get_recipe
from megatron_mm.models.layers import vision_layer_spec
from megatron_mm.models.vision import VisionTower, vision_transformer_config
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import initialize_weights
from megatron_mm.parallel.topology import single_process_groups
from megatron_mm.training.build import build_chunks

LAYERS = 24
"""Number of layers of InternLM2-1.8B and of InternViT-300M."""
TILE_TOKENS = 256
VOCABULARY = 512
INTERNVIT_300M = VisionConfig(
    image_size=448, patch_size=14, hidden_size=1024, num_layers=LAYERS, num_attention_heads=16, ffn_hidden_size=4096, activation="gelu"
)


@dataclass
class Models:
    """The monolithic model, and the modular model's tower; the latter shares the former's projector and decoder."""

    mono: MonoInternVLModel
    tower: VisionTower

    def monolithic(self, batch: PackedBatch) -> dict[str, float]:
        """Run a forward pass of the monolithic model; return the milliseconds of each part."""
        clock = Clock()
        features = self.mono.projector(self.mono.patches(batch.pixels))
        clock.lap("patches, projector")
        self._decode(batch, features, visual=True)
        clock.lap("decoder")
        return clock.parts

    def modular(self, batch: PackedBatch) -> dict[str, float]:
        """Run a forward pass of the modular model; return the milliseconds of each part."""
        clock = Clock()
        assert batch.pixels is not None
        patches_npv = self.tower(batch.pixels)
        clock.lap("tower")
        grid = self.tower.config.grid_size
        features = self.mono.projector(unshuffle(patches_npv.unflatten(1, (grid, grid)), 2))
        clock.lap("projector")
        self._decode(batch, features, visual=False)
        clock.lap("decoder")
        return clock.parts

    def _decode(self, batch: PackedBatch, features: torch.Tensor, *, visual: bool) -> None:
        decoder_input = self.mono.embed(batch, features)
        routed = batch if visual else replace(batch, image_starts=batch.image_starts[:0])
        layout = modality_layout(routed, tokens_per_image=TILE_TOKENS, multiple=1)
        assert layout.visual is not None and layout.visual.count == (batch.num_images * TILE_TOKENS if visual else 0)
        self.mono.decode(batch, decoder_input, layout, with_loss=False)


class Clock:
    """Milliseconds between laps, by name."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.parts[name] = 1e3 * (now - self._last)
        self._last = now


def experiment_for(*, divisor: int, layers: int) -> Experiment:
    """Return Mono-InternVL-2B with smaller widths and fewer layers."""
    base = get_recipe("mono_internvl_2b_s2")
    assert isinstance(base.model, MonoInternVLConfig)
    decoder = base.model.decoder
    decoder = replace(
        decoder,
        num_layers=layers,
        hidden_size=decoder.hidden_size // divisor,
        ffn_hidden_size=decoder.ffn_hidden_size // divisor,
        num_attention_heads=decoder.num_attention_heads // divisor,
        num_query_groups=decoder.num_query_groups // divisor,
        vocab_size=VOCABULARY,
    )
    patches = PatchEmbeddingConfig(image_size=448, patch_size=14, hidden_size=base.model.patches.hidden_size // divisor)
    return replace(get_recipe("debug_mono_internvl"), model=MonoInternVLConfig(decoder=decoder, patches=patches))


def build(experiment: Experiment, *, divisor: int) -> Models:
    """Build both models with random weights."""
    topology = topologies.initialize(experiment.parallel, seed=1)
    (chunk,) = build_chunks(experiment, topology)
    initialize_weights([chunk], seed=1)
    assert isinstance(chunk, MonoInternVLModel)
    whole = INTERNVIT_300M
    config = replace(
        whole,
        num_layers=experiment.model.decoder.num_layers,
        hidden_size=whole.hidden_size // divisor,
        num_attention_heads=whole.num_attention_heads // divisor,
        ffn_hidden_size=whole.ffn_hidden_size // divisor,
    )
    tower = VisionTower(
        config,
        layer_spec=vision_layer_spec("torch"),
        transformer_config=vision_transformer_config(config, params_dtype=torch.float32, recompute="none", on_gpu=False),
        pg_collection=single_process_groups(),
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in tower.parameters():
        parameter.data.normal_(0, getattr(parameter, "init_std", 0.0), generator=generator)
        if hasattr(parameter, "init_value"):
            parameter.data.fill_(parameter.init_value)
    return Models(chunk.eval(), tower.eval())


def document(tiles: int, *, text: int) -> PackedBatch:
    """Return one document: an image of `tiles` tiles and `text` text tokens."""
    generator = torch.Generator().manual_seed(tiles)
    total = tiles * TILE_TOKENS + text
    ids = torch.randint(5, VOCABULARY, (total,), generator=generator)
    starts = 2 + TILE_TOKENS * torch.arange(tiles)  # after <s> and <img>
    bounds = torch.tensor([0, total], dtype=torch.int32)
    return PackedBatch(
        token_ids=ids,
        labels=ids,
        loss_mask=torch.zeros(total),
        is_token=torch.ones(total, dtype=torch.bool),
        position_ids=torch.arange(total),
        source_ids=torch.zeros_like(ids),
        cu_seqlens=bounds,
        max_seqlen=total,
        image_starts=starts,
        image_owners=torch.zeros_like(starts),
        image_documents=documents_of_images(starts, cu_seqlens=bounds),
        pixels=torch.randint(0, 256, (tiles, 3, 448, 448), generator=generator, dtype=torch.uint8),
    )


@dataclass
class Comparison:
    """Milliseconds by part, for several passes of both models on one document."""

    monolithic: list[dict[str, float]]
    modular: list[dict[str, float]]

    def ratio(self, *, layers: int | None = None) -> float:
        """Return modular time over monolithic time, the median of the pairs.

        Args:
            layers: number of layers that were run; if given, the layers' time is scaled to `LAYERS` layers.
        """

        def total(parts: dict[str, float]) -> float:
            deeper = LAYERS / layers if layers is not None else 1.0
            return sum(value * (deeper if name in ("tower", "decoder") else 1.0) for name, value in parts.items())

        return statistics.median(total(b) / total(a) for a, b in zip(self.monolithic, self.modular, strict=True))

    def line(self, *, layers: int) -> str:
        """Format medians and ratios."""
        medians = [{name: statistics.median(run[name] for run in runs) for name in runs[0]} for runs in (self.monolithic, self.modular)]
        totals = "".join(f"{sum(parts.values()):9.0f} ms" for parts in medians)
        shown = "; ".join(" + ".join(f"{name} {value:.0f}" for name, value in parts.items()) for parts in medians)
        return f"{totals} {self.ratio():21.2f} {self.ratio(layers=layers):13.2f}   {shown}"


def compare(models: Models, batch: PackedBatch, *, repeats: int) -> Comparison:
    """Time both models in turn, after one warm-up pass each."""
    models.monolithic(batch), models.modular(batch)
    pairs = [(models.monolithic(batch), models.modular(batch)) for _ in range(repeats)]
    return Comparison([mono for mono, _ in pairs], [modular for _, modular in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width-divisor", type=int, choices=[1, 2, 4], default=2, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="of tower and decoder (default: %(default)s)")
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[768, 1792, 3840], help="default: %(default)s")
    parser.add_argument("--text-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=2, help="timed passes of each (default: %(default)s)")
    options = parser.parse_args()
    odd = [count for count in options.image_tokens if count % TILE_TOKENS]
    if odd:
        parser.error(f"--image-tokens {odd[0]} is not a multiple of {TILE_TOKENS}, the tokens of a tile")
    experiment = experiment_for(divisor=options.width_divisor, layers=options.layers)
    models = build(experiment, divisor=options.width_divisor)
    decoder, tower = experiment.model.decoder, models.tower.config
    print(f"decoder: {decoder.num_layers} of {LAYERS} layers, width {decoder.hidden_size} (in truth 2048)")
    print(f"tower:   {tower.num_layers} of {LAYERS} layers, width {tower.hidden_size} (in truth 1024)")
    print(f"fp32, {torch.get_num_threads()} threads, medians of {options.repeats}\n")
    print(f"{'image + text tokens':>19} {'monolithic':>11} {'modular':>11} {'modular / monolithic':>21} {'at 24 layers':>13}   parts, ms")
    with torch.no_grad():
        for count in options.image_tokens:
            found = compare(models, document(count // TILE_TOKENS, text=options.text_tokens), repeats=options.repeats)
            print(f"{count:12} + {options.text_tokens:4}{found.line(layers=options.layers)}", flush=True)
    topologies.shutdown()


if __name__ == "__main__":
    main()
