"""MM1 (arXiv 2403.09611) for Hugging Face transformers. Part of the checkpoint: imports only torch and transformers.

Image -> CLIP tower (final LayerNorm on all patches, class token dropped) -> connector -> image tokens in the decoder's
sequence. As in the training documents, a prompt begins with `<s>`, followed by text and each image's image tokens, in order;
`MM1Processor` builds it.

Shape legend: b sequences, s tokens, n images, g patches along one side, p = g * g patches, v tower width, k tokens of an
image, c inner width of the connector, h decoder width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_mm1 import MM1Config
from .image_tokens import ImageTokens, cache_of

try:  # before transformers 5 the tower is a separate class, with the same parameter names
    from transformers.models.clip.modeling_clip import CLIPVisionTransformer as VisionTower
except ImportError:
    from transformers import CLIPVisionModel as VisionTower


class MM1PreTrainedModel(PreTrainedModel):
    config_class = MM1Config
    base_model_prefix = ""
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer", "MM1RegBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MM1CAbstractor):
            nn.init.normal_(module.position_embedding, std=0.02)
        elif isinstance(module, MM1AttentionConnector):
            nn.init.normal_(module.queries, std=0.02)
        elif "position_ids" in module._buffers:  # in the tower; transformers 5.0 leaves it to the enclosing model to set them
            module.position_ids.copy_(torch.arange(module.position_ids.shape[-1]))


class MM1AverageConnector(nn.Module):
    """Average pooling to a square grid, then a linear layer."""

    def __init__(self, config: MM1Config) -> None:
        super().__init__()
        self.side = math.isqrt(config.connector_config["num_tokens"])
        self.output = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, p, v] -> [n, k, h]."""
        return self.output(_pool(_to_grid(features), self.side).flatten(1, 2))


class MM1AttentionConnector(nn.Module):
    """Attention of learned queries to the patches, then a linear layer."""

    def __init__(self, config: MM1Config) -> None:
        super().__init__()
        connector, vision_size = config.connector_config, config.vision_config.hidden_size
        width = connector["hidden_size"]
        self.num_heads = connector["num_attention_heads"]
        self.queries = nn.Parameter(torch.zeros(connector["num_tokens"], width))
        self.query_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(vision_size)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(vision_size, width, bias=False)
        self.value = nn.Linear(vision_size, width, bias=False)
        self.projection = nn.Linear(width, width)
        self.output = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, p, v] -> [n, k, h]."""
        features = self.feature_norm(features)
        query = self.query(self.query_norm(self.queries)).expand(features.shape[0], -1, -1)
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, self.key(features), self.value(features))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.output(self.queries + self.projection(attended))


class MM1RegBlock(nn.Module):
    """RegNet's bottleneck block with squeeze-and-excitation, channels last: [n, g, g, input] -> [n, g, g, output]."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        squeezed_size = round(input_size / 4)
        self.enter = nn.Linear(input_size, output_size, bias=False)
        self.enter_norm = nn.LayerNorm(output_size)
        self.depthwise = nn.Conv2d(output_size, output_size, 3, padding=1, groups=output_size, bias=False)
        self.depthwise_norm = nn.LayerNorm(output_size)
        self.squeeze = nn.Linear(output_size, squeezed_size)
        self.excite = nn.Linear(squeezed_size, output_size)
        self.leave = nn.Linear(output_size, output_size, bias=False)
        self.leave_norm = nn.LayerNorm(output_size)
        widens = input_size != output_size
        self.shortcut = nn.Linear(input_size, output_size, bias=False) if widens else nn.Identity()
        self.shortcut_norm = nn.LayerNorm(output_size) if widens else nn.Identity()

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.enter_norm(self.enter(grid)))
        x = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = F.silu(self.depthwise_norm(x))
        gate = self.excite(F.silu(self.squeeze(x.mean(dim=(1, 2), keepdim=True))))
        x = self.leave_norm(self.leave(x * gate.sigmoid()))
        return F.silu(x + self.shortcut_norm(self.shortcut(grid)))


class MM1CAbstractor(nn.Module):
    """Honeybee's C-Abstractor (arXiv 2312.06742): convolutions before and after pooling to a square grid."""

    def __init__(self, config: MM1Config) -> None:
        super().__init__()
        connector, vision = config.connector_config, config.vision_config
        width, depth, output_size = connector["hidden_size"], connector["depth"], config.text_config.hidden_size
        num_patches = (vision.image_size // vision.patch_size) ** 2
        self.side = math.isqrt(connector["num_tokens"])
        self.position_embedding = nn.Parameter(torch.zeros(num_patches, vision.hidden_size))
        sizes = [vision.hidden_size] + [width] * (depth - 1)
        self.before = nn.Sequential(*(MM1RegBlock(size, width) for size in sizes))
        self.after = nn.Sequential(*(MM1RegBlock(width, width) for _ in range(depth)))
        self.hidden = nn.Linear(width, output_size)
        self.output = nn.Linear(output_size, output_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[n, p, v] -> [n, k, h]."""
        grid = self.before(_to_grid(features + self.position_embedding))
        tokens = self.after(_pool(grid, self.side)).flatten(1, 2)
        return self.output(F.silu(self.hidden(tokens)))


def _to_grid(features: torch.Tensor) -> torch.Tensor:
    side = math.isqrt(features.shape[1])
    return features.unflatten(1, (side, side))


def _pool(grid: torch.Tensor, side: int) -> torch.Tensor:
    """[n, g, g, c] -> [n, side, side, c]."""
    return F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)


class MM1SparseMLP(nn.Module):
    """A mixture of experts that replaces a Llama layer's MLP. Each token goes to its `top_k` most probable experts, whose outputs are
    weighted by a softmax over these experts; no token is dropped."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.num_local_experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]."""
        tokens = hidden_states.flatten(0, -2)
        logits = F.linear(tokens.float(), self.gate.weight.float())
        best, chosen = logits.topk(self.top_k, dim=-1)
        weights = best.softmax(dim=-1).to(tokens.dtype)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            if rows.numel():
                out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, places, None])
        return out.view_as(hidden_states)


CONNECTORS = {"average": MM1AverageConnector, "attention": MM1AttentionConnector, "c_abstractor": MM1CAbstractor}


class MM1ForConditionalGeneration(ImageTokens, MM1PreTrainedModel, GenerationMixin):
    """MM1 with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MM1Config) -> None:
        super().__init__(config)
        if getattr(config.vision_config, "_attn_implementation", None) is None:  # transformers 4.52 to 4.57 sets it only for whole models
            config.vision_config._attn_implementation = config._attn_implementation
        self.vision = VisionTower(config.vision_config)
        self.connector = CONNECTORS[config.connector_config["kind"]](config)
        self.language_model = LlamaModel(config.text_config)
        for number in getattr(config.text_config, "sparse_layers", None) or []:
            self.language_model.layers[number].mlp = MM1SparseMLP(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.language_model

    @property
    def tokens_per_square(self) -> int:
        return self.config.connector_config["num_tokens"]

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images: normalised pixels [n, 3, H, W] -> image tokens [n, k, h]."""
        hidden = self.vision(
            pixel_values.to(self.vision.post_layernorm.weight)
        ).last_hidden_state  # before the final norm, class token first
        return self.connector(self.vision.post_layernorm(hidden)[:, 1:])

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if labels are given.

        Args:
            input_ids: [b, s], with `num_tokens` consecutive image tokens for each image, or for each of its sub-images if it has some.
            pixel_values: normalised pixels, as returned by `MM1Processor`: [b, maximum images of a sequence, 3, H, W], each sequence's
                images followed by padding; or [n, 3, H, W], the images of all sequences in order. Here each sub-image is an image.
            labels: [b, s], not shifted; -100 for tokens without a loss.
        """
        kwargs.pop("return_dict", None)
        if past_key_values is not None:  # newer versions of transformers name it `cache`, and it is among kwargs
            kwargs["past_key_values"] = past_key_values
        if inputs_embeds is None:
            inputs_embeds = self.embed_with_images(input_ids, pixel_values)
        elif pixel_values is not None:
            raise ValueError("pixel_values need input_ids to locate the images: pass input_ids, not inputs_embeds")
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cache_of(outputs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Makes `save_pretrained` write this file, too, in every version of transformers.
MM1ForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
