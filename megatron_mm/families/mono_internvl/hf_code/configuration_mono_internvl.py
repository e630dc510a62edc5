"""Configuration of a Mono-InternVL checkpoint for Hugging Face transformers. Part of the checkpoint: imports transformers alone."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import LlamaConfig, PretrainedConfig


class MonoInternVLConfig(PretrainedConfig):
    """One decoder with a visual expert in every layer, and a patch embedding. Fields have the released names.

    Args:
        llm_config: of the decoder, as a `LlamaConfig` or its fields: an InternLM2 is a Llama with other names of tensors.
        vision_config: `hidden_size` of a patch, `patch_size`, `image_size` (which with patch_size gives the grid of learned positions).
        force_image_size: side of a tile, pixels.
        downsample_ratio: 0.5 makes one token of a square of 2 x 2 patches.
        image_token_id: <IMG_CONTEXT>, whose embeddings image features replace.
        kwargs: the released file's other fields, which the authors' own code reads.
    """

    model_type = "internvl_chat"
    sub_configs = {"llm_config": LlamaConfig}  # noqa: RUF012 - transformers asks for a dict

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
        """The decoder's, by the name that transformers looks for."""
        return self.llm_config

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The decoder's. transformers 4.50 would go on with it alone where it looks for the class of an `AutoModelForCausalLM`, and make
        a Llama of random weights: there this is asked with `decoder=True`, and the answer is the whole model."""
        if _VERSION < (4, 51) and kwargs.get("decoder"):
            return self
        return self.llm_config


_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


# So that `save_pretrained` writes this file, too, in every version of transformers.
MonoInternVLConfig.register_for_auto_class()
