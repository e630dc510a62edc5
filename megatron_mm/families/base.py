"""The interface of a model family. Code outside a family uses only this interface and never checks a family's name.

A family is one folder and one object: a subclass of `Family` whose only instance is in `families.registry.FAMILIES`. Its model, tables and
files are imported by the methods that need them, so importing a family is fast: a list of recipes needs neither torch nor megatron-core.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from megatron_mm.config import Experiment, ModelConfig, ParallelConfig
from megatron_mm.data.image_input import ImageInput
from megatron_mm.flops import StepWork, Trainable

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.module import MegatronModule

    from megatron_mm.hf.formats import AnyFormat
    from megatron_mm.hf.mapping import Entry
    from megatron_mm.models.context import ChunkContext
    from megatron_mm.models.encoder import ImageEncoder

Config = TypeVar("Config", bound=ModelConfig)
Recipe = Callable[[], Experiment]


class Family(ABC, Generic[Config]):
    """A model family. Abstract methods are what a family must define; all others have defaults that suit a plain one."""

    config: type[Config]
    """The class of its model configurations; `config.family` is the family's name."""
    recipes: tuple[Recipe, ...] = ()
    """Functions that return a complete experiment, each under the name of its function."""
    freeze_policies: ClassVar[Mapping[str, tuple[str, ...]]] = {"all": ("",)}
    """What `train.freeze_policy` may be, and what is trainable then: regular expressions, one of which matches the beginning of a trainable
    parameter's name."""
    parts: ClassVar[Mapping[str, str]] = {
        "experts": r"language\..*\.experts\.",
        "decoder": r"language\.",
        "tower": r"vision\.",
        "connector": r"connector\.",
    }
    """Parts of the model whose norms are logged, each a regular expression: a parameter is of the first whose expression matches the
    beginning of its name, or of `rest`."""
    special_tokens: ClassVar[tuple[str, ...]] = ("<pad>", "<image>")
    """Control tokens that the model needs, in the order in which they get ids after those of a tokenizer that lacks them."""
    plain_layers: ClassVar[bool] = False
    """Decoder layers are attention and MLP alone, each of which all tokens of a micro-batch go through: user buffers know no others
    (`parallel.overlap_tensor`)."""
    takes_tiles: ClassVar[bool] = False
    """Images may be cut into tiles (`data.max_tiles`)."""
    generates_with_cache: ClassVar[bool] = False
    """Chunks take `cache` in `forward` (`models.cache.CacheStep`) and then compute new tokens alone. Without it generation computes all
    tokens of a sequence for each new one."""
    prompt_forms: ClassVar[Mapping[str, str]] = {}
    """Forms of few-shot prompts by kind of task, for models without a chat template, instead of those of `evaluation.prompts`. An answer
    follows its form without a space, and the next demonstration's image ends it."""
    adapts: ClassVar[tuple[str, ...]] = ()
    """Fields of the model in which a run may differ from the weights that it begins with (`--init-from`): those that change how images
    are shown. Learned positions of another image size are interpolated (`training.checkpoint.positions`)."""
    language_mlps: ClassVar[tuple[str, ...]] = ("mlp",)
    """Our names of what the feed-forward of a plain language model's layer becomes: more than one where experts begin as copies of it."""
    language_extras: ClassVar[tuple[str, ...]] = ()
    """Tensors of the language model that `convert to-hf --part language` leaves out, because a plain one has no such thing: regular
    expressions, each of a whole name. All others must be exported."""

    @property
    def name(self) -> str:
        return self.config.family

    def trainable_patterns(self, policy: str) -> tuple[str, ...]:
        """The patterns of a freeze policy. Raises ValueError that lists the policies if the family has none of that name."""
        if policy not in self.freeze_policies:
            raise ValueError(
                f"train.freeze_policy is {policy!r}, but must be one of those of {self.name} models: {sorted(self.freeze_policies)}"
            )
        return self.freeze_policies[policy]

    def trainable(self, policy: str) -> Trainable:
        """Whether a parameter is trainable under a freeze policy, by its global name."""
        patterns = [re.compile(pattern) for pattern in self.trainable_patterns(policy)]
        return lambda name: any(pattern.match(name) for pattern in patterns)

    def part_of(self, parameter: str) -> str:
        """The part of a parameter by its global name."""
        return next((part for part, pattern in self.parts.items() if re.match(pattern, parameter)), "rest")

    # ------------------------------------------------------------------------------------------------------------- model

    @abstractmethod
    def build(self, model: Config, context: ChunkContext) -> MegatronModule:
        """Make one pipeline chunk. Its weights are allocated, not initialised; it has `config`, `set_input_tensor`, `pre_process`,
        `post_process`, `share_embeddings_and_output_weights`, `shared_embedding_or_output_weight`: `models.chunk.Chunk` brings all."""

    @property
    def spreads_encoder(self) -> bool:
        """`build_encoder` makes one."""
        return type(self).build_encoder is not Family.build_encoder

    def build_encoder(self, model: Config, context: ChunkContext) -> ImageEncoder:
        """Make what lies between pixels and decoder, for every pipeline rank (`parallel.spread_encoder`).

        Raises ValueError if the family has no encoder that could stand apart from its first stage.
        """
        raise ValueError(self._no_encoder())

    def _no_encoder(self) -> str:
        return f"parallel.spread_encoder is True, but {self.name} models have no image encoder to spread: leave it out"

    @abstractmethod
    def image_input(self, model: Config) -> ImageInput:
        """How images enter the model: which pixels, and which tokens stand for them."""

    @abstractmethod
    def flops(self, model: Config, trainable: Trainable, work: StepWork) -> float:
        """FLOPs of training on a step's work where some parameters are trainable, counted as `megatron_mm.flops` says."""

    def step_flops(self, model: Config, policy: str, work: StepWork) -> float:
        """`flops` under a freeze policy. Raises ValueError if the family has no policy of that name."""
        return self.flops(model, self.trainable(policy), work)

    def check_layout(self, model: Config, parallel: ParallelConfig, world_size: int) -> None:
        """Raise ValueError where a layout on a number of processes cannot hold the model."""
        from megatron_mm.models.decoder import check_decoder_layout

        if parallel.spread_encoder and not self.spreads_encoder:
            raise ValueError(self._no_encoder())
        check_decoder_layout(model.decoder, parallel, world_size)

    def pipeline_rows(self, model: Config, parallel: ParallelConfig, num_tokens: int, num_images: int) -> int:
        """Rows [rows, 1, hidden_size] that go from stage to stage for a micro-batch of so many tokens and at most so many images."""
        return num_tokens

    def fp8_sizes(self, model: Config, parallel: ParallelConfig) -> dict[str, tuple[int, int]]:
        """Sizes of FP8 products beside the decoder's own: the number of vectors or their width, and over how many processes it is cut."""
        return {}

    # -------------------------------------------------------------------------------------------------------- conversion

    def table(self, model: Config, *, vocab_rows: int | None = None) -> list[Entry]:
        """The whole model's tensors <-> those of its Hugging Face model.

        Args:
            vocab_rows: rows of the vocabulary that are written; None writes all.

        Raises ValueError if the family has no Hugging Face model.
        """
        raise ValueError(f"{self.name} models have no Hugging Face counterpart: define Family.table and Family.write_files")

    def check_export(self, model: Config) -> None:
        """Raise ValueError where the modeling code that goes with an exported whole model cannot compute this one."""

    def constants(self, model: Config) -> dict[str, torch.Tensor]:
        """Tensors of the Hugging Face model that are no weights, and follow from the configuration."""
        return {}

    def write_files(
        self, model: Config, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None = None
    ) -> None:
        """Write everything but the weights of the Hugging Face model: configuration, tokenizer, code.

        Args:
            out: an existing directory.
            experiment: of the checkpoint; `model` is its model.
            tokenizer: the checkpoint's SentencePiece model.
            dtype: of the weights, by torch's name.
            vocab_rows: rows of the vocabulary that are written; None writes all.

        Raises ValueError if the tokenizer cannot be exported or has more ids than embeddings are written.
        """
        raise ValueError(f"{self.name} models have no Hugging Face counterpart: define Family.table and Family.write_files")

    def card_notes(self, model: Config, out: Path, *, part: str) -> list[str]:
        """Lines of an export's README.md about how to use it.

        Args:
            out: holds the export's other files already.
            part: whole, language or vision.
        """
        return []

    def formats(self) -> dict[str, AnyFormat]:
        """Formats of whole models of this family that `convert from-hf --whole` reads, by name; parts that families share are in
        `hf.formats`."""
        return {}
