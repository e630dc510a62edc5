"""How a model is cut, fed, optimized, evaluated and watched; and `Experiment`, which is all of it."""

from __future__ import annotations

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
"""FP8 matrix products take numbers of tokens and widths that are multiples of this."""
FP8_MULTIPLES = {"tensorwise": FP8_MULTIPLE, "delayed": FP8_MULTIPLE, "blockwise": FP8_MULTIPLE, "mxfp8": 32}
"""The same by `precision.fp8_recipe`: a scale of 32 values wants whole ones."""


@dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are packed."""

    path: Path = Path("data")
    """A directory with one folder for each split (`train`, `heldout`), each with one folder for each source
    (`pairs`, `interleaved`, `text`, ...) that holds shards and, after `prepare index`, their index."""
    tokenizer: Path | None = None
    """A SentencePiece model; None means `tokenizer.model` inside path."""
    mixture: dict[str, float] = field(default_factory=lambda: {"interleaved": 0.45, "pairs": 0.45, "text": 0.10})
    """Share of the sequences that each source (folder name) gets; normalised to 1."""
    sequence_length: int = 4096
    """Tokens of a packed sequence, image tokens included."""
    max_images_per_sequence: int = 16
    """Images of a packed sequence at most."""
    max_images_per_document: int | None = None
    """Images of a document at most: one that has more is cut into several; None has no limit of its own."""
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """Image decoder; auto takes DALI where its package imports and Pillow elsewhere."""
    max_tiles: int | None = None
    """Tiles that an image is cut into at most, the thumbnail not counted, for models that look at tiles (Mono-InternVL); None cuts none."""
    min_tiles: int = 1
    """Tiles that an image is cut into at least, where max_tiles is given."""
    low_resolution_demonstrations: float = 0.0
    """Share of the images that are shown at low resolution, as an overview alone, of all images that are not the last of their document;
    for models that show images as sub-images (MM1's fine-tuning). Which ones follows from train.seed."""
    to_rgb: Literal["white", "pillow"] = "white"
    """How images that are not 8-bit RGB become it: white lays what is transparent on white and takes the high byte of 16 bits; pillow does
    as Pillow's `convert("RGB")` and with it the released processors of CLIP, InfiMM and Mono-InternVL (`data.image_transform`)."""
    jpeg_quality: tuple[int, int] | None = None
    """Augmentation of training images: each is encoded as JPEG of a random quality from the first to the second of these (0 to 100), and
    decoded again by Pillow, before it is resized; where images are cut into tiles each tile is, after that, with a quality of its own.
    None leaves images as they are."""
    decode_threads: int = 4
    """Threads that decode images, per process."""
    read_threads: int = 4
    """Threads that read byte ranges of shards, per process."""
    prefetch_steps: int = 2
    """Global batches planned and read ahead."""
    packing_window: int = 4096
    """Samples of one source that are packed together; a larger window fills sequences better and makes each planning step longer."""
    chat_template: str | None = None
    """The chat template that the sources' index must have been made with (`prepare index --chat-template`); None takes any."""
    caption_prompt: str | None = None
    """What asks for the caption of a pair: the sources' index must have been made with it (`prepare index --caption-prompt`); None takes
    any."""
    images: Literal["true", "shuffled", "blank"] = "true"
    """Pixels that the model sees: each sample's own, those of other samples in the same global batch, or none (the mean
    colour everywhere). The last two are baselines of the same data in the same order."""
    preprocessors: tuple[str, ...] = ()
    """What changes or drops samples before they are planned: functions of an opened source that return one
    (`megatron_mm.data.sources.source.Source`), applied in order, as FILE.py:NAME or MODULE:NAME."""
    max_bad_fraction: float = 0.01
    """Samples of a source that may fail at run time before the run stops, as a fraction of those read."""

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
            f"data.low_resolution_demonstrations is {self.low_resolution_demonstrations}, but must lie between 0 and 1",
        )
        if self.jpeg_quality is not None:
            least, most = self.jpeg_quality
            require(0 <= least <= most <= 100, f"data.jpeg_quality is {least} {most}, but must rise from 0 to 100 at most")
        require(len(self.mixture) > 0, "data.mixture is empty: name at least one source, for example {'pairs': 1.0}")
        for name, weight in self.mixture.items():
            require(weight >= 0, f"data.mixture gives source {name!r} the weight {weight}, but a weight is at least 0")
        require(sum(self.mixture.values()) > 0, f"data.mixture {self.mixture} has no weight above 0")

    @property
    def sources(self) -> list[str]:
        """Names of the sources that get sequences, in the order in which plans and logs number them."""
        return [name for name, weight in self.mixture.items() if weight > 0]

    @property
    def folder(self) -> Path:
        """The data set's folder on this machine: `path`, or the copy of its indexes where that is the address of an object store."""
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
    """Decoupled: lr * weight_decay of each weight is subtracted at each step; not from norms, biases and other vectors."""
    clip_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 does not clip."""

    def __post_init__(self) -> None:
        require_positive(self, "peak_lr", "epsilon")
        require(0 <= self.min_lr <= self.peak_lr, f"min_lr {self.min_lr} must lie between 0 and peak_lr {self.peak_lr}")
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}, but must be at least 0")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the `heldout` split during training."""

    interval: int = 1000
    """Steps between evaluations; one is always made at the end of the run; 0 never evaluates."""
    batches: int = 4
    """Global batches of held-out data for each evaluation."""
    samples: int = 4
    """Held-out images captioned for the monitor's table; 0 for none."""
    max_new_tokens: int = 32
    """Length limit of a generated caption, tokens."""

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
    """Weights & Biases team or user; None takes the account's default."""
    run_name: str | None = None
    """Display name; None takes the run directory's name."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s for MFU; None takes the table in `megatron_mm.flops` (no MFU on a CPU)."""
    detail_interval: int = 10
    """Steps between looks at what costs more to know: norms by part, balance, the time by phase of all processes; 0 never looks."""
    slow_process: float = 0.15
    """A process is reported as slow where its own work in a step takes longer than its peers' by this part of the step."""
    tensorboard: bool = False
    """Write TensorBoard's event files too, in `RUN_DIR/tensorboard` (needs the package tensorboard)."""
    prometheus: int | None = None
    """Port on which the main process answers Prometheus at `/metrics`; 0 takes a free one, None has no port."""
    prometheus_host: str = "127.0.0.1"
    """Address that it listens on: this machine alone, unless another is given."""

    def __post_init__(self) -> None:
        require_positive(self, "console_interval")
        require(self.detail_interval >= 0, f"monitor.detail_interval is {self.detail_interval}, but must be at least 0")
        require(self.slow_process > 0, f"monitor.slow_process is {self.slow_process}, but must be above 0")
        require(
            self.prometheus is None or 0 <= self.prometheus < 65536,
            f"monitor.prometheus is {self.prometheus}, but a port is from 1 to 65535, or 0 for a free one",
        )


@dataclass(frozen=True)
class ProfileConfig:
    """A look into a few steps with torch's profiler, written to `RUN_DIR/profile`. Steps outside of it are not touched."""

    steps: str | None = None
    """Steps to profile, as FIRST:LAST, both included (10:13), or one; None profiles none."""
    ranks: tuple[int, ...] = (0,)
    """Processes to profile."""
    memory: bool = True
    """Follow memory too: a snapshot on a GPU, the operators' bytes in the trace elsewhere."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            words = self.steps.split(":")
            require(
                len(words) <= 2 and all(word.isdecimal() for word in words) and 0 < int(words[0]) <= int(words[-1]),
                f"profile.steps is {self.steps!r}, but takes FIRST:LAST with 1 <= FIRST <= LAST, for example 10:13",
            )

    @property
    def first(self) -> int | None:
        """The first profiled step."""
        return None if self.steps is None else int(self.steps.split(":")[0])

    @property
    def last(self) -> int | None:
        """The last one."""
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
    """A checkpoint, or the run directory of an earlier stage, whose weights this run begins with, with a fresh optimizer. A run that
    has a checkpoint of its own resumes from it."""
    extensions: tuple[str, ...] = ()
    """Python files (FILE.py) or modules that are run before anything is built: they register families, connectors, decoder variants and
    source formats. A recipe that is named by its file adds that file."""
    extra_hooks: tuple[str, ...] = ()
    """Hooks beside the standard ones: classes like `megatron_mm.training.trainer.Hook`, as FILE.py:CLASS or MODULE:CLASS."""

    @property
    def token_multiple(self) -> int:
        """The tokens of a micro-batch are padded to a multiple of this: each process has an equal part of them under sequence parallelism,
        and FP8 products (16) and 16-bit tensor cores (8) want multiples of their own. With user buffers all have one size."""
        if self.parallel.overlap_tensor and self.parallel.sequence_parallel:
            return self.train.micro_batch_size * self.data.sequence_length
        of_process = {"fp32": 1, "bf16": 8, "fp8": self.fp8_multiple}[self.train.precision]
        return of_process * (self.parallel.tensor if self.parallel.sequence_parallel else 1)

    @property
    def fp8_multiple(self) -> int:
        """What sizes of FP8 products are multiples of."""
        return FP8_MULTIPLES[self.precision.fp8_recipe]

    def num_micro_batches(self, data_parallel_size: int) -> int:
        """Micro-batches of one process in one step; with `train.fewest_micro_batches` the most that a step has.

        Raises ValueError where the batch cannot be cut evenly.
        """
        train = self.train
        per_slot = train.micro_batch_size * data_parallel_size
        require(
            train.global_batch_size % per_slot == 0,
            f"train.global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size {train.micro_batch_size} x "
            f"data-parallel size {data_parallel_size} = {per_slot}: change one of them",
        )
        return train.global_batch_size // per_slot
