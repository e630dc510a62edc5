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
    """A model family. A family must define the abstract methods; all others have defaults that suit a plain decoder."""

    config: type[Config]
    """The class of its model configurations; `config.family` is the family's name."""
    recipes: tuple[Recipe, ...] = ()
    """Functions that return a complete experiment; a recipe has the name of its function."""
    freeze_policies: ClassVar[Mapping[str, tuple[str, ...]]] = {"all": ("",)}
    """Values of `train.freeze_policy`, each with regular expressions: a parameter is trainable if one matches the beginning of its name."""
    parts: ClassVar[Mapping[str, str]] = {
        "experts": r"language\..*\.experts\.",
        "decoder": r"language\.",
        "tower": r"vision\.",
        "connector": r"connector\.",
    }
    """Parts of the model whose norms are logged, each with a regular expression. A parameter belongs to the first part whose expression
    matches the beginning of its name, otherwise to `rest`."""
    special_tokens: ClassVar[tuple[str, ...]] = ("<pad>", "<image>")
    """Control tokens that the model needs. If the tokenizer lacks some, they get ids after the tokenizer's own, in this order."""
    plain_layers: ClassVar[bool] = False
    """True if decoder layers consist only of attention and MLP, and every token passes through both: user buffers support only such layers
    (`parallel.overlap_tensor`)."""
    takes_tiles: ClassVar[bool] = False
    """True if images may be split into tiles (`data.max_tiles`)."""
    generates_with_cache: ClassVar[bool] = False
    """True if chunks accept `cache` in `forward` (`models.cache.CacheStep`) and then compute only new tokens. Without it, generation
    computes all tokens of a sequence again for each new one."""
    prompt_forms: ClassVar[Mapping[str, str]] = {}
    """Few-shot prompt templates by kind of task, for models without a chat template; they replace those of `evaluation.prompts`. An answer
    follows the prompt without a space, and the next demonstration's image ends it."""
    adapts: ClassVar[tuple[str, ...]] = ()
    """Fields of the model that may differ from those of the weights that a run starts from (`--init-from`): they change how images are
    shown. Learned positions for another image size are interpolated (`training.checkpoint.positions`)."""
    language_mlps: ClassVar[tuple[str, ...]] = ("mlp",)
    """Our names of the modules that a plain language model's feed-forward network becomes: several if experts begin as copies of it."""
    language_extras: ClassVar[tuple[str, ...]] = ()
    """Tensors of the language model that `convert to-hf --part language` leaves out, because a plain language model does not have them:
    regular expressions that match the whole name. All others must be exported."""

    @property
    def name(self) -> str:
        return self.config.family

    def trainable_patterns(self, policy: str) -> tuple[str, ...]:
        """Return the patterns of a freeze policy. Raises ValueError, listing the policies, if the family has none of that name."""
        if policy not in self.freeze_policies:
            raise ValueError(
                f"train.freeze_policy is {policy!r}, but must be one of the policies of {self.name} models: {sorted(self.freeze_policies)}"
            )
        return self.freeze_policies[policy]

    def trainable(self, policy: str) -> Trainable:
        """Return a function that maps a parameter's global name to whether it is trainable under a freeze policy."""
        patterns = [re.compile(pattern) for pattern in self.trainable_patterns(policy)]
        return lambda name: any(pattern.match(name) for pattern in patterns)

    def part_of(self, parameter: str) -> str:
        """Return the part (`parts`) that a parameter belongs to, by its global name."""
        return next((part for part, pattern in self.parts.items() if re.match(pattern, parameter)), "rest")

    # ------------------------------------------------------------------------------------------------------------- model

    @abstractmethod
    def build(self, model: Config, context: ChunkContext) -> MegatronModule:
        """Build one pipeline chunk, with weights allocated but not initialised. It must have `config`, `set_input_tensor`, `pre_process`,
        `post_process`, `share_embeddings_and_output_weights` and `shared_embedding_or_output_weight`; `models.chunk.Chunk` has them all."""

    @property
    def spreads_encoder(self) -> bool:
        """True if the family defines `build_encoder`."""
        return type(self).build_encoder is not Family.build_encoder

    def build_encoder(self, model: Config, context: ChunkContext) -> ImageEncoder:
        """Build the modules between pixels and decoder, for every pipeline rank (`parallel.spread_encoder`).

        Raises ValueError if the family has no encoder that can be separated from the first stage.
        """
        raise ValueError(self._no_encoder())

    def _no_encoder(self) -> str:
        return f"parallel.spread_encoder is True, but {self.name} models have no image encoder to spread: leave it out"

    @abstractmethod
    def image_input(self, model: Config) -> ImageInput:
        """Return how images enter the model: their pixels, and the tokens that represent them."""

    @abstractmethod
    def flops(self, model: Config, trainable: Trainable, work: StepWork) -> float:
        """Return the FLOPs of training on a step's work, given which parameters are trainable, counted as `megatron_mm.flops` defines."""

    def step_flops(self, model: Config, policy: str, work: StepWork) -> float:
        """Return `flops` under a freeze policy. Raises ValueError if the family has no policy of that name."""
        return self.flops(model, self.trainable(policy), work)

    def check_layout(self, model: Config, parallel: ParallelConfig, world_size: int) -> None:
        """Raise ValueError if the model cannot run in a layout on a number of processes."""
        from megatron_mm.models.decoder import check_decoder_layout

        if parallel.spread_encoder and not self.spreads_encoder:
            raise ValueError(self._no_encoder())
        check_decoder_layout(model.decoder, parallel, world_size)

    def pipeline_rows(self, model: Config, parallel: ParallelConfig, num_tokens: int, num_images: int) -> int:
        """Return the number of rows [rows, 1, hidden_size] sent between stages for a micro-batch of this many tokens and at most this many
        images."""
        return num_tokens

    def fp8_sizes(self, model: Config, parallel: ParallelConfig) -> dict[str, tuple[int, int]]:
        """Return sizes of FP8 products other than the decoder's own, by name: (number or width of vectors, number of processes that share
        it)."""
        return {}

    # -------------------------------------------------------------------------------------------------------- conversion

    def table(self, model: Config, *, vocab_rows: int | None = None) -> list[Entry]:
        """Return the mapping between the whole model's tensors and those of its Hugging Face model.

        Args:
            vocab_rows: number of vocabulary rows to write; None writes all.

        Raises ValueError if the family has no Hugging Face model.
        """
        raise ValueError(f"{self.name} models have no Hugging Face counterpart: define Family.table and Family.write_files")

    def check_export(self, model: Config) -> None:
        """Raise ValueError if the modeling code in an export of the whole model does not support this configuration."""

    def constants(self, model: Config) -> dict[str, torch.Tensor]:
        """Return tensors of the Hugging Face model that are not weights but follow from the configuration."""
        return {}

    def write_files(
        self, model: Config, out: Path, *, experiment: Experiment, tokenizer: Path, dtype: str, vocab_rows: int | None = None
    ) -> None:
        """Write all files of the Hugging Face model except its weights: configuration, tokenizer, code.

        Args:
            out: an existing directory.
            experiment: the checkpoint's experiment; `model` is its model.
            tokenizer: the checkpoint's SentencePiece model.
            dtype: type of the weights, by torch's name.
            vocab_rows: number of vocabulary rows to write; None writes all.

        Raises ValueError if the tokenizer cannot be exported or has more ids than the exported embeddings have rows.
        """
        raise ValueError(f"{self.name} models have no Hugging Face counterpart: define Family.table and Family.write_files")

    def card_notes(self, model: Config, out: Path, *, part: str) -> list[str]:
        """Return lines for an export's README.md on how to use it.

        Args:
            out: directory that already contains the export's other files.
            part: whole, language or vision.
        """
        return []

    def formats(self) -> dict[str, AnyFormat]:
        """Return, by name, the formats of whole models of this family that `convert from-hf --whole` reads; formats of shared parts are in
        `hf.formats`."""
        return {}
