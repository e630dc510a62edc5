"""Configuration of an MM1 checkpoint for Hugging Face transformers. Part of the checkpoint: imports only transformers."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig


class MM1Config(PretrainedConfig):
    """A CLIP vision tower, a connector and a Llama-like decoder.

    Args:
        vision_config: configuration of the tower: a `CLIPVisionConfig` or a dict of its fields.
        text_config: configuration of the decoder: a `LlamaConfig` or a dict of its fields.
        connector_config: `kind` (average, attention or c_abstractor), `num_tokens` (per image), `hidden_size`, `depth`,
            `num_attention_heads`.
        image_token_id: id of the image token, whose embeddings are replaced by image features; each image has `num_tokens` of them.
        tie_word_embeddings: use the embedding table as the output layer.
    """

    model_type = "mm1"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": LlamaConfig}  # noqa: RUF012 - transformers needs a dict

    def __init__(
        self,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        connector_config: dict[str, Any] | None = None,
        image_token_id: int = 4,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _made(CLIPVisionConfig, vision_config)
        self.text_config = _made(LlamaConfig, text_config)
        self.connector_config = {**_CONNECTOR_DEFAULTS, **(connector_config or {})}
        self.image_token_id = image_token_id
        # Generation and loss read this from the decoder's config, and loading reads it from the whole config.
        self.text_config.tie_word_embeddings = tie_word_embeddings
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """Return the decoder's configuration.

        Exception: to find the class of an `AutoModelForCausalLM`, transformers 4.50 calls this with `decoder=True`. Given the decoder's
        configuration, it would build a plain Llama with random weights, so it gets the whole configuration.
        """
        if _VERSION < (4, 51) and kwargs.get("decoder"):
            return self
        return super().get_text_config(*args, **kwargs)


_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_CONNECTOR_DEFAULTS = {"kind": "c_abstractor", "num_tokens": 144, "hidden_size": 1024, "depth": 3, "num_attention_heads": 16}


def _made(kind: type, config: Any) -> Any:
    if isinstance(config, kind):
        return config
    return kind(**{key: value for key, value in (config or {}).items() if key != "model_type"})


# Makes `save_pretrained` write this file, too, in every version of transformers.
MM1Config.register_for_auto_class()
