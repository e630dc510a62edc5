"""Configuration of an InfiMM checkpoint for Hugging Face transformers. Part of the checkpoint: imports only transformers."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig


class InfiMMConfig(PretrainedConfig):
    """An EVA-CLIP tower, a Perceiver resampler, and a Llama or Mistral with gated cross-attention.

    Args:
        visual: configuration of the tower, in the format of EVA-CLIP's authors.
        language: configuration of the decoder: a `LlamaConfig` or `MistralConfig`, or a dict of its fields including `model_type`.
        cross_attn_every_n_layers: n, if there is a gated block before layers n, 2n, 3n ... (counted from 1).
        resampler_config: `num_latents` (per image), `num_layers`, `num_attention_heads`, `head_dim`, `ffn_multiplier`.
        gated_config: `num_attention_heads`, `head_dim`, `ffn_multiplier`.
        image_token_id: id of `<image>`, the second token of an image.
        eoc_token_id: id of `<|endofchunk|>`, the first token of an image.
    """

    model_type = "infimm"
    sub_configs = {"language": AutoConfig}  # noqa: RUF012 - transformers needs a dict

    def __init__(
        self,
        visual: dict[str, Any] | None = None,
        language: PretrainedConfig | dict[str, Any] | None = None,
        cross_attn_every_n_layers: int = 2,
        resampler_config: dict[str, Any] | None = None,
        gated_config: dict[str, Any] | None = None,
        image_token_id: int = 32001,
        eoc_token_id: int = 32000,
        **kwargs: Any,
    ) -> None:
        self.visual = {**_VISUAL, **(visual or {})}
        if not isinstance(language, PretrainedConfig):
            fields = {"model_type": "mistral", **(language or {})}
            language = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.language = language
        self.cross_attn_every_n_layers = cross_attn_every_n_layers
        self.resampler_config = {**_RESAMPLER, **(resampler_config or {})}
        self.gated_config = {**_GATED, **(gated_config or {})}
        self.image_token_id = image_token_id
        self.eoc_token_id = eoc_token_id
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @property
    def text_config(self) -> PretrainedConfig:
        """Configuration of the decoder, under the name that transformers uses."""
        return self.language

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """Return the decoder's configuration.

        Exception: to find the class of an `AutoModelForCausalLM`, transformers 4.50 calls this with `decoder=True`. Given the decoder's
        configuration, it would build a plain language model with random weights, so it gets the whole configuration.
        """
        if _VERSION < (4, 51) and kwargs.get("decoder"):
            return self
        return self.language


_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_VISUAL = {"rope": False, "pt_hw_seq_len": 16, "naiveswiglu": False, "postnorm": False}
_RESAMPLER = {"num_latents": 64, "num_layers": 6, "num_attention_heads": 8, "head_dim": 64, "ffn_multiplier": 4}
_GATED = {"num_attention_heads": 8, "head_dim": 64, "ffn_multiplier": 4}


# Makes `save_pretrained` write this file, too, in every version of transformers.
InfiMMConfig.register_for_auto_class()
