"""Configuration of data, optimizer, evaluation, monitoring and profiling, and `Experiment`, which holds the whole configuration of a
run."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_mm.config.blocks import ModelConfig
from megatron_mm.config.checks import require, require_positive
from megatron_mm.config.kernels import KernelConfig
from megatron_mm.config.parallel import ParallelConfig
from megatron_mm.config.precision import PrecisionConfig
from megatron_mm.config.train import CheckpointConfig, TrainConfig
from megatron_mm.platform.local_copies import local_folder

FP8_MULTIPLE = 16
"""In FP8 matrix products, numbers of tokens and widths must be multiples of this."""
FP8_MULTIPLES = {"tensorwise": FP8_MULTIPLE, "delayed": FP8_MULTIPLE, "blockwise": FP8_MULTIPLE, "mxfp8": 32}
"""The required multiple for each `precision.fp8_recipe`; mxfp8 has one scale per 32 values, and these blocks must be complete."""


@dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are packed."""

    path: Path = Path("data")
    """Data set: a directory with a folder for each split (`train`, `heldout`), which contains a folder for each source (`pairs`,
    `interleaved`, `text`, ...) with shards and, after `prepare index`, their index."""
    tokenizer: Path | None = None
    """A SentencePiece model; None uses `tokenizer.model` in `path`."""
    mixture: dict[str, float] = field(default_factory=lambda: {"interleaved": 0.45, "pairs": 0.45, "text": 0.10})
    """Fraction of the sequences that come from each source (folder name); normalised to sum to 1."""
    sequence_length: int = 4096
    """Tokens of a packed sequence, including image tokens."""
    max_images_per_sequence: int = 16
    """Maximum number of images in a packed sequence."""
    max_images_per_document: int | None = None
    """Maximum number of images in a document; a document with more is split into several. None sets no separate limit."""
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """Image decoder; auto uses DALI if its package can be imported, and otherwise Pillow."""
    max_tiles: int | None = None
    """Maximum number of tiles into which an image is cut, not counting the thumbnail, for models that use tiles (Mono-InternVL); None does
    not cut images."""
    min_tiles: int = 1
    """Minimum number of tiles into which an image is cut, if max_tiles is set."""
    low_resolution_demonstrations: float = 0.0
    """Fraction of the images, other than the last one of each document, that are shown at low resolution, only as an overview; for models
    that show images as sub-images (MM1's fine-tuning). train.seed determines which ones."""
    to_rgb: Literal["white", "pillow"] = "white"
    """How other images are converted to 8-bit RGB: white puts transparent images on a white background and keeps the high byte of 16-bit
    values; pillow uses Pillow's `convert("RGB")`, as the released processors of CLIP, InfiMM and Mono-InternVL do
    (`data.image_transform`)."""
    jpeg_quality: tuple[int, int] | None = None
    """Augmentation of training images: each is encoded as a JPEG with a random quality between these two (0 to 100) and decoded again by
    Pillow, before it is resized. If images are cut into tiles, this is done to each tile after cutting, with a quality of its own. None
    does not augment."""
    decode_threads: int = 4
    """Threads that decode images, per process."""
    read_threads: int = 4
    """Threads that read byte ranges of shards, per process."""
    prefetch_steps: int = 2
    """Global batches planned and read ahead."""
    packing_window: int = 4096
    """Number of samples of one source that are packed together; a larger window fills sequences better, but each planning step takes
    longer."""
    chat_template: str | None = None
    """The chat template with which the sources must have been indexed (`prepare index --chat-template`); None accepts any."""
    caption_prompt: str | None = None
    """The prompt for the caption of a pair, with which the sources must have been indexed (`prepare index --caption-prompt`); None accepts
    any."""
    images: Literal["true", "shuffled", "blank"] = "true"
    """Images that the model sees: each sample's own, those of other samples in the same global batch, or blank ones (the mean colour
    everywhere). The last two are baselines with the same data in the same order."""
    preprocessors: tuple[str, ...] = ()
    """Functions that change or drop samples before they are planned. Each takes an opened source and returns one
    (`megatron_mm.data.sources.source.Source`); they are applied in order. Given as FILE.py:NAME or MODULE:NAME."""
    max_bad_fraction: float = 0.01
    """Fraction of the samples read from a source that may be bad; if more are, the run stops."""

    def __post_init__(self) -> None:
        require_positive(
            self, "sequence_length", "max_images_per_sequence", "decode_threads", "read_threads", "prefetch_steps", "packing_window"
        )
        require(
            self.max_images_per_document is None or self.max_images_per_document > 0,
            f"data.max_images_per_document is {self.max_images_per_document}, but must be positive, or None for no limit",
        )
        require(
            self.max_tiles is None or 0 < self.min_tiles <= self.max_tiles,
            f"data.min_tiles {self.min_tiles} and data.max_tiles {self.max_tiles} must be positive, and the first no more than the second",
        )
        require(
            0 <= self.low_resolution_demonstrations <= 1,
            f"data.low_resolution_demonstrations is {self.low_resolution_demonstrations}, but must be between 0 and 1",
        )
        if self.jpeg_quality is not None:
            least, most = self.jpeg_quality
            require(
                0 <= least <= most <= 100,
                f"data.jpeg_quality is {least} {most}, but must be two numbers from 0 to 100, the smaller one first",
            )
        require(
            isinstance(self.mixture, dict) and all(isinstance(weight, numbers.Real) for weight in self.mixture.values()),
            f"data.mixture is {self.mixture!r}, but must be a dict of sources and numbers, for example {{'pairs': 0.5, 'text': 0.5}}",
        )
        require(len(self.mixture) > 0, "data.mixture is empty: name at least one source, for example {'pairs': 1.0}")
        for name, weight in self.mixture.items():
            require(weight >= 0, f"data.mixture gives source {name!r} the weight {weight}, but a weight must be at least 0")
        require(
            sum(self.mixture.values()) > 0, f"data.mixture {self.mixture} has no weight above 0: give at least one source a positive weight"
        )

    @property
    def sources(self) -> list[str]:
        """Names of the sources with a positive weight, in the order in which plans and logs number them."""
        return [name for name, weight in self.mixture.items() if weight > 0]

    @property
    def folder(self) -> Path:
        """The data set's folder on this machine: `path`, or the local copy of the indexes if `path` is an address in an object store."""
        return local_folder(self.path)

    @property
    def tokenizer_path(self) -> Path:
        return self.tokenizer if self.tokenizer is not None else self.folder / "tokenizer.model"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, and the learning-rate schedule."""

    peak_lr: float
    """Learning rate at the end of the warm-up."""
    min_lr: float
    """Learning rate at the end of the schedule (cosine) and after it."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay: each step subtracts lr * weight_decay * weight. Not applied to norms, biases and other vectors."""
    clip_grad_norm: float = 1.0
    """Gradients are scaled down if their global norm exceeds this; 0 disables clipping."""

    def __post_init__(self) -> None:
        require_positive(self, "peak_lr", "epsilon")
        require(0 <= self.min_lr <= self.peak_lr, f"min_lr is {self.min_lr}, but must be between 0 and peak_lr {self.peak_lr}")
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}, but must be at least 0")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the `heldout` split during training."""

    interval: int = 1000
    """Steps between evaluations; there is also one at the end of the run. 0 disables evaluation."""
    batches: int = 4
    """Global batches of held-out data per evaluation."""
    samples: int = 4
    """Number of held-out images that are captioned in each evaluation; 0 for none."""
    max_new_tokens: int = 32
    """Maximum length of a generated caption, tokens."""

    def __post_init__(self) -> None:
        require(
            min(self.interval, self.batches, self.samples, self.max_new_tokens) >= 0,
            f"evaluation settings must be at least 0, but are {self}",
        )


@dataclass(frozen=True)
class MonitorConfig:
    """Console, Weights & Biases, TensorBoard, Prometheus. `metrics.jsonl` in the run directory is always written."""

    console_interval: int = 10
    """Steps between console lines."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Mode of Weights & Biases."""
    project: str = "megatron_mm"
    """Weights & Biases project."""
    entity: str | None = None
    """Weights & Biases team or user; None uses the account's default."""
    run_name: str | None = None
    """Display name in Weights & Biases; None uses the run directory's name."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for MFU; None uses the table in `megatron_mm.flops` (no MFU on a CPU)."""
    detail_interval: int = 10
    """Steps between measurements that are more expensive: norms by part, balance, time by phase of all processes; 0 disables them."""
    slow_process: float = 0.15
    """A process is reported as slow if its own work in a step takes longer than that of its peers by more than this fraction of the
    step."""
    tensorboard: bool = False
    """Also write TensorBoard event files, to `RUN_DIR/tensorboard` (needs the package tensorboard)."""
    prometheus: int | None = None
    """Port on which the main process serves `/metrics` for Prometheus; 0 chooses a free port, None disables it."""
    prometheus_host: str = "127.0.0.1"
    """Address on which the Prometheus server listens; by default only this machine can connect."""

    def __post_init__(self) -> None:
        require_positive(self, "console_interval")
        require(self.detail_interval >= 0, f"monitor.detail_interval is {self.detail_interval}, but must be at least 0")
        require(self.slow_process > 0, f"monitor.slow_process is {self.slow_process}, but must be above 0")
        require(
            self.prometheus is None or 0 <= self.prometheus < 65536,
            f"monitor.prometheus is {self.prometheus}, but must be a port from 1 to 65535, or 0 for a free one",
        )


@dataclass(frozen=True)
class ProfileConfig:
    """Profiling of a few steps with torch's profiler, written to `RUN_DIR/profile`. Other steps are not affected."""

    steps: str | None = None
    """Steps to profile: FIRST:LAST, including both (10:13), or a single step; None profiles none."""
    ranks: tuple[int, ...] = (0,)
    """Ranks to profile."""
    memory: bool = True
    """Also record memory: a snapshot on a GPU, elsewhere the bytes of each operator in the trace."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            words = self.steps.split(":")
            require(
                len(words) <= 2 and all(word.isdecimal() for word in words) and 0 < int(words[0]) <= int(words[-1]),
                f"profile.steps is {self.steps!r}, but must be FIRST:LAST with 1 <= FIRST <= LAST, for example 10:13",
            )

    @property
    def first(self) -> int | None:
        """The first profiled step."""
        return None if self.steps is None else int(self.steps.split(":")[0])

    @property
    def last(self) -> int | None:
        """The last profiled step."""
        return None if self.steps is None else int(self.steps.split(":")[-1])


@dataclass(frozen=True)
class Experiment:
    """Everything that determines a run."""

    recipe: str
    """Name of the recipe that this experiment comes from."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    init_from: Path | None = None
    """A checkpoint, or the run directory of an earlier stage, whose weights this run starts with; the optimizer starts afresh. If the run
    already has a checkpoint of its own, it resumes from that one instead."""
    extensions: tuple[str, ...] = ()
    """Python files (FILE.py) or modules that are run before anything is built, to register families, connectors, decoder variants and
    source formats. A recipe given as FILE.py:FUNCTION adds its file."""
    extra_hooks: tuple[str, ...] = ()
    """Hooks in addition to the standard ones: subclasses of `megatron_mm.training.trainer.Hook`, given as FILE.py:CLASS or MODULE:CLASS."""

    @property
    def token_multiple(self) -> int:
        """The tokens of a micro-batch are padded to a multiple of this number: under sequence parallelism each process has an equal part of
        them, and FP8 products (16) and 16-bit tensor cores (8) need multiples of their own. With user buffers, all micro-batches have the
        same size."""
        if self.parallel.overlap_tensor and self.parallel.sequence_parallel:
            return self.train.micro_batch_size * self.data.sequence_length
        of_process = {"fp32": 1, "bf16": 8, "fp8": self.fp8_multiple}[self.train.precision]
        return of_process * (self.parallel.tensor if self.parallel.sequence_parallel else 1)

    @property
    def fp8_multiple(self) -> int:
        """The sizes of FP8 products must be multiples of this."""
        return FP8_MULTIPLES[self.precision.fp8_recipe]

    def num_micro_batches(self, data_parallel_size: int) -> int:
        """Number of micro-batches of one process in one step; with `train.fewest_micro_batches`, the maximum.

        Raises ValueError if the batch cannot be divided evenly.
        """
        train = self.train
        per_slot = train.micro_batch_size * data_parallel_size
        require(
            train.global_batch_size % per_slot == 0,
            f"train.global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size {train.micro_batch_size} x "
            f"data-parallel size {data_parallel_size} = {per_slot}: change one of them",
        )
        return train.global_batch_size // per_slot
