"""Configuration of a Mono-InternVL checkpoint for Hugging Face transformers. Part of the checkpoint: imports only transformers."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import LlamaConfig, PretrainedConfig


class MonoInternVLConfig(PretrainedConfig):
    """A patch embedding, and one decoder with a visual expert in every layer. Fields have the same names as in the released checkpoints.

    Args:
        llm_config: configuration of the decoder: a `LlamaConfig` or a dict of its fields (InternLM2 is a Llama with other tensor names).
        vision_config: `hidden_size` (of a patch), `patch_size`, `image_size`, which with patch_size gives the grid of learned positions.
        force_image_size: side of a tile, in pixels.
        downsample_ratio: 0.5 turns each square of 2 x 2 patches into one token.
        image_token_id: id of <IMG_CONTEXT>, whose embeddings are replaced by image features.
        kwargs: other fields of released files, which only the authors' own code reads.
    """

    model_type = "internvl_chat"
    sub_configs = {"llm_config": LlamaConfig}  # noqa: RUF012 - transformers needs a dict

    def __init__(
        self,
        llm_config: LlamaConfig | dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        force_image_size: int = 448,
        downsample_ratio: float = 0.5,
        image_token_id: int = 92546,
        **kwargs: Any,
    ) -> None:
        if not isinstance(llm_config, LlamaConfig):
            llm_config = LlamaConfig(**{key: value for key, value in (llm_config or {}).items() if key != "model_type"})
        self.llm_config = llm_config
        self.vision_config = {"hidden_size": 1024, "patch_size": 14, "image_size": 448, **(vision_config or {})}
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.image_token_id = image_token_id
        kwargs["tie_word_embeddings"] = llm_config.tie_word_embeddings
        super().__init__(**kwargs)
        self.tie_word_embeddings = llm_config.tie_word_embeddings

    @property
    def text_config(self) -> PretrainedConfig:
        """Configuration of the decoder, under the name that transformers uses."""
        return self.llm_config

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """Return the decoder's configuration.

        Exception: to find the class of an `AutoModelForCausalLM`, transformers 4.50 calls this with `decoder=True`. Given the decoder's
        configuration, it would build a plain Llama with random weights, so it gets the whole configuration.
        """
        if _VERSION < (4, 51) and kwargs.get("decoder"):
            return self
        return self.llm_config


_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


# Makes `save_pretrained` write this file, too, in every version of transformers.
MonoInternVLConfig.register_for_auto_class()
