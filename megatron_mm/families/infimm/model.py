"""InfiMM (arXiv 2403.01487): EVA-CLIP tower -> Perceiver resampler -> latents, to which a language model's gated blocks attend.

In the sequence, an image is only the two tokens `<|endofchunk|><image>`. Its features are the latents, which every pipeline stage with a
gated block needs. They are sent together with the hidden states (`parallel.stages` explains why and how).

The tower is frozen in every stage of training and runs without gradients. Its features are those of its last block, class token first,
before the final norm.

Shape legend: t packed tokens of a micro-batch, n images, k latents of an image, m = max(1, n) * k, v tower width, h decoder width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.infimm.config import InfiMMConfig, image_input
from megatron_mm.families.infimm.gated_cross_attention import continued_media_layout, gated_layer_spec, last_images, media_layout
from megatron_mm.models.cache import CacheStep
from megatron_mm.models.chunk import Chunk
from megatron_mm.models.context import ChunkContext
from megatron_mm.models.decoder import decoder_transformer_config, layers_of_chunk
from megatron_mm.models.encoder import ImageEncoder
from megatron_mm.models.eva import EvaTower
from megatron_mm.models.layers import decoder_layer_spec, plain_submodules
from megatron_mm.models.resampler import PerceiverResampler
from megatron_mm.parallel.stages import attach, detach_states
from megatron_mm.platform.device import send


class InfiMMModel(Chunk):
    """One pipeline chunk of InfiMM."""

    def __init__(self, config: InfiMMConfig, context: ChunkContext) -> None:
        encoder = InfiMMEncoder(config, context) if context.holds_encoder else None
        gated_layers = config.gated.layers(config.decoder.num_layers)
        specs = []
        for layer in layers_of_chunk(config.decoder, context):
            spec = decoder_layer_spec(context.backend)
            if layer in gated_layers:
                block = plain_submodules(context.backend)
                spec = gated_layer_spec(spec, block=block, gated=config.gated, latent_size=config.vision.hidden_size)
            specs.append(spec)
        super().__init__(config.decoder, context, image=image_input(config), encoders=encoder, layer_specs=specs)
        self.num_latents, self.latent_size = config.resampler.num_latents, config.vision.hidden_size
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: list[torch.Tensor] | torch.Tensor | None) -> None:
        """Store the tensor that the previous stage sent; `forward` splits it into hidden states and latents."""
        self.received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        batch: PackedBatch,
        *,
        pipeline_rows: int = 0,
        encoded: torch.Tensor | None = None,
        with_loss: bool = True,
        cache: CacheStep | None = None,
    ) -> torch.Tensor:
        """Compute hidden states and latents for the next stage, or on the last stage the result.

        Args:
            batch: the micro-batch, with tensors on this process's device (`image_...` on the CPU).
            pipeline_rows: number of rows sent to the next stage (`Family.pipeline_rows`).
            encoded: see `Chunk.image_features`.
            with_loss: the last stage returns losses, otherwise logits.
            cache: in generation, the step that continues the documents. Once the prompts are cached, no latents are sent.

        Returns:
            [pipeline_rows / tensor, 1, h] or [pipeline_rows, 1, h]; on the last stage per-token losses [1, t] in float32, or logits
            [1, t, vocabulary / tensor].
        """
        if cache is not None and cache.cache.filled:
            return self._continue(batch, cache)
        local = self.sharing.local_tokens(batch.num_tokens)
        num_latents = len(self.sharing.local_tokens(max(1, batch.num_images) * self.num_latents))
        decoder_input = None
        if self.pre_process:
            decoder_input = self.embed_text(batch)
            latents_m1v = self._latents(batch, encoded)
        else:
            assert self.received is not None, "a later stage must receive before it runs"
            hidden, latents_m1v = detach_states(self.received, num_hidden=len(local), num_states=num_latents, width=self.latent_size)
            self.language.set_input_tensor(hidden)
        media = media_layout(batch, num_latents=self.num_latents, local=local, dtype=latents_m1v.dtype)
        if cache is not None:
            media.cache = cache
            media.images = send(last_images(batch, num_sequences=cache.cache.num_sequences), batch.token_ids.device)
        out = self.decode(batch, decoder_input, media, context=latents_m1v, with_loss=with_loss)
        return out if self.post_process else attach(out, latents_m1v, rows=len(self.sharing.local_tokens(pipeline_rows)))

    def _continue(self, batch: PackedBatch, cache: CacheStep) -> torch.Tensor:
        """`forward` for tokens that continue cached prompts."""
        decoder_input = self.embed_text(batch) if self.pre_process else None
        if not self.pre_process:
            self.language.set_input_tensor(self.received)
        media = continued_media_layout(
            batch, cache, num_latents=self.num_latents, local=self.sharing.local_tokens(batch.num_tokens), dtype=self.config.params_dtype
        )
        none_01v = torch.empty(0, 1, self.latent_size, dtype=self.config.params_dtype, device=batch.token_ids.device)
        return self.decode(batch, decoder_input, media, context=none_01v, with_loss=False)

    def _latents(self, batch: PackedBatch, encoded: torch.Tensor | None) -> torch.Tensor:
        """Return this process's part of the latents [m, 1, v] of all images of the micro-batch; zeros if it has no image."""
        latents_nkv = self.image_features(batch, encoded)
        if batch.num_images == 0:
            latents_nkv = F.pad(latents_nkv, (0, 0, 0, 0, 0, 1))
        latents_m1v = latents_nkv.flatten(0, 1)[:, None]
        local = self.sharing.local_tokens(latents_m1v.shape[0])
        return latents_m1v[local.start : local.stop]


class InfiMMEncoder(ImageEncoder):
    """The tower, which runs without gradients, followed by the resampler."""

    def __init__(self, config: InfiMMConfig, context: ChunkContext) -> None:
        width = config.vision.hidden_size
        super().__init__(
            decoder_transformer_config(config.decoder, context),
            tokens=config.resampler.num_latents,
            width=width,
            dtype=context.dtype,
            vision=EvaTower(config.vision, dtype=context.dtype, fused=context.kernels.eva_tower),
            resampler=PerceiverResampler(config.resampler, width=width, dtype=context.dtype),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] uint8 -> latents [n, k, v]."""
        with torch.no_grad():
            features_nsv = self.vision(pixels)
        return self.resampler(features_nsv)
