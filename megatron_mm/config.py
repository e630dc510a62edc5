"""The configuration of a run: one dataclass, `Experiment`, made of one part for each concern.

A recipe (`megatron_mm.recipes`) is a function that returns a complete `Experiment`; the command line overrides its
fields (`--train.steps 100`); the resolved result is written to the run directory as JSON and can be read back.
Every part checks itself once, when it is made, so that a wrong value is reported before anything is started.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Precision = Literal["fp32", "bf16", "fp8"]

FP8_MULTIPLE = 16
"""FP8 matrix products take numbers of tokens and widths that are multiples of this."""


def _require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: the one way a config part rejects a value."""
    if not condition:
        raise ValueError(message)


def _require_positive(part: object, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        _require(value > 0, f"{name} is {value}, but must be positive")


# --------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class MoEConfig:
    """Sparse feed-forward layers: every token goes to top_k of num_experts experts, each as large as the dense layer's MLP."""

    num_experts: int
    """Experts of a sparse layer."""
    every_n_layers: int
    """Layers n, 2n, 3n ... (counted from 1) are sparse, the others dense."""
    top_k: int = 2
    """Experts that a token goes to; their weights are a softmax over the chosen ones."""
    load_balance_loss: float = 0.01
    """Coefficient of the load-balance loss (GShard)."""
    z_loss: float = 0.001
    """Coefficient of the router's z-loss (ST-MoE)."""
    capacity_factor: float | None = None
    """An expert takes at most capacity_factor * tokens * top_k / num_experts tokens of a process and drops the rest, least likely first;
    None drops nothing."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_experts", "every_n_layers", "top_k")
        _require(self.top_k <= self.num_experts, f"moe.top_k {self.top_k} is more than moe.num_experts {self.num_experts}")
        _require(min(self.load_balance_loss, self.z_loss) >= 0, "moe loss coefficients must be at least 0")
        _require(
            self.capacity_factor is None or self.capacity_factor > 0, f"moe.capacity_factor is {self.capacity_factor}, must be positive"
        )

    def sparse_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the sparse layers, from 0: (1, 3) for every second of 4."""
        return tuple(layer for layer in range(num_layers) if (layer + 1) % self.every_n_layers == 0)


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-style decoder: RMSNorm before attention and MLP, SwiGLU, rotary positions, no biases."""

    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of one of the two SwiGLU branches."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads; equal to the query heads without grouped-query attention."""
    head_dim: int = 128
    """Width of one attention head."""
    vocab_size: int = 49152
    """Rows of the embedding table, special tokens and padding rows included."""
    tied_embeddings: bool = True
    """Use the embedding table as the output layer."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_epsilon: float = 1e-5
    """Added to the mean square inside every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; output projections use init_std / sqrt(2 * num_layers)."""
    moe: MoEConfig | None = None
    """Sparse layers; None for a dense model."""

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts, from 0."""
        return self.moe.sparse_layers(self.num_layers) if self.moe is not None else ()

    def __post_init__(self) -> None:
        _require_positive(
            self, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "vocab_size"
        )
        _require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}: "
            "every key/value head serves the same number of query heads",
        )
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, but rotary positions turn pairs: use an even one")


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer: patch convolution, class token, learned positions, pre-LN layers."""

    image_size: int
    """Side of the square input image, pixels."""
    patch_size: int
    """Side of a patch, pixels; what does not fill a patch at the right and bottom edges is dropped, as in CLIP."""
    hidden_size: int
    """Width of the tower."""
    num_layers: int
    """Transformer layers."""
    num_attention_heads: int
    """Attention heads; their width is hidden_size / num_attention_heads."""
    ffn_hidden_size: int
    """Width of the MLP."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of the MLP; quick_gelu is x * sigmoid(1.702 x)."""
    norm_epsilon: float = 1e-5
    """Added to the variance inside every LayerNorm."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Per-channel mean subtracted from pixels in [0, 1] (OpenAI CLIP)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Per-channel standard deviation that pixels are divided by (OpenAI CLIP)."""

    def __post_init__(self) -> None:
        _require_positive(self, "image_size", "patch_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size")
        _require(
            self.image_size >= self.patch_size,
            f"image_size {self.image_size} is smaller than one patch of {self.patch_size} pixels",
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vision hidden_size {self.hidden_size} is not a multiple of its num_attention_heads {self.num_attention_heads}",
        )

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image, the class token not counted."""
        return self.grid_size**2


@dataclass(frozen=True)
class ConnectorConfig:
    """Turns the patch features of an image into a fixed number of decoder tokens (MM1, section 3.2)."""

    kind: Literal["average", "attention", "c_abstractor"]
    """Average pooling + linear; learned queries that attend to the patches; Honeybee's C-Abstractor."""
    num_tokens: int
    """Tokens that one image becomes in the decoder's sequence; a square number for average and c_abstractor."""
    hidden_size: int = 1024
    """Inner width of the C-Abstractor (1024 in Honeybee) and of the attention pooling; unused by average pooling."""
    depth: int = 3
    """Bottleneck blocks before and after the C-Abstractor's pooling (3 in Honeybee)."""
    num_attention_heads: int = 16
    """Heads of the attention pooling."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_tokens", "hidden_size", "depth", "num_attention_heads")
        if self.kind != "attention":
            _require(
                math.isqrt(self.num_tokens) ** 2 == self.num_tokens,
                f"the {self.kind} connector pools to a square grid, but num_tokens is {self.num_tokens}: use 64 or 144, for example",
            )
        else:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                f"connector hidden_size {self.hidden_size} is not a multiple of its num_attention_heads {self.num_attention_heads}",
            )


@dataclass(frozen=True)
class ModelConfig:
    """What every model family has; `family` names the entry of `megatron_mm.models.FAMILIES` that builds it."""

    family: ClassVar[str]


@dataclass(frozen=True)
class MM1Config(ModelConfig):
    """MM1 (arXiv 2403.09611): a CLIP tower, a connector, and a decoder whose sequence holds the image tokens."""

    family: ClassVar[str] = "mm1"
    decoder: DecoderConfig
    vision: VisionConfig
    connector: ConnectorConfig

    def __post_init__(self) -> None:
        if self.connector.kind != "attention":
            side = math.isqrt(self.connector.num_tokens)
            _require(
                side <= self.vision.grid_size,
                f"connector num_tokens {self.connector.num_tokens} needs a {side}x{side} grid, but the tower gives only "
                f"{self.vision.grid_size}x{self.vision.grid_size} patches",
            )


# ------------------------------------------------------------------------------------------------------------- the rest


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is cut over the processes; the data-parallel size is what is left of the world size."""

    tensor: int = 1
    """Tensor-parallel degree: processes that share every layer."""
    pipeline: int = 1
    """Pipeline-parallel degree: stages of consecutive layers."""
    virtual: int = 1
    """Model chunks on each pipeline stage (interleaved schedule); 1 is plain 1F1B."""
    expert: int = 1
    """Expert-parallel degree, taken out of the data-parallel size; 1 for a dense model."""
    expert_tensor: int = 1
    """Tensor-parallel degree inside each expert, a divisor of tensor; 1 keeps experts whole. More than 1 needs GPUs."""
    sequence: bool | None = None
    """Split activations between the tensor-parallel processes along the sequence; None means: where tensor > 1."""
    stage_layers: tuple[int, ...] | None = None
    """Decoder layers of each stage in pipeline order (pipeline * virtual numbers); None splits as evenly as possible,
    the first and last stages getting the smaller shares."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel processes (ZeRO-1)."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = True
    """Gather updated parameters while the next forward pass already runs; needs distributed_optimizer, CUDA and pipeline 1
    or virtual > 1, and is ignored elsewhere."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, the attention core, or whole layers."""
    collective_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run instead of hanging it."""

    def __post_init__(self) -> None:
        _require_positive(self, "tensor", "pipeline", "virtual", "expert", "expert_tensor", "collective_timeout_minutes")
        _require(
            self.virtual == 1 or self.pipeline > 1,
            f"parallel.virtual is {self.virtual}, but interleaving needs parallel.pipeline > 1: set one of them",
        )
        _require(
            self.tensor % self.expert_tensor == 0,
            f"parallel.expert_tensor {self.expert_tensor} does not divide parallel.tensor {self.tensor}: use a divisor of it, or 1",
        )
        if self.stage_layers is not None:
            stages = self.pipeline * self.virtual
            _require(
                len(self.stage_layers) == stages,
                f"parallel.stage_layers has {len(self.stage_layers)} numbers, but pipeline {self.pipeline} x virtual {self.virtual} "
                f"makes {stages} stages: give one number for each",
            )

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence and self.tensor > 1

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in world_size processes. Raises ValueError where the degrees do not divide it."""
        _require(
            world_size % self.model_parallel_size == 0,
            f"{world_size} processes cannot be cut into tensor {self.tensor} x pipeline {self.pipeline} = {self.model_parallel_size}: "
            f"start a multiple of {self.model_parallel_size} processes or change --parallel.tensor / --parallel.pipeline",
        )
        data = world_size // self.model_parallel_size
        _require(
            data % self.expert == 0,
            f"parallel.expert {self.expert} does not divide the data-parallel size {data} ({world_size} processes / tensor {self.tensor} / "
            f"pipeline {self.pipeline}): use one of {[degree for degree in range(1, data + 1) if data % degree == 0]}",
        )
        return data


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
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """Image decoder; auto takes DALI where its package imports and Pillow elsewhere."""
    decode_threads: int = 4
    """Threads that decode images, per process."""
    read_threads: int = 4
    """Threads that read byte ranges of shards, per process."""
    prefetch_steps: int = 2
    """Global batches planned and read ahead."""
    packing_window: int = 4096
    """Samples of one source that are packed together; a larger window fills better and plans in larger bites."""
    images: Literal["true", "shuffled", "blank"] = "true"
    """Pixels that the model sees: each sample's own, those of other samples in the same global batch, or none (the mean
    colour everywhere). The last two are baselines of the same data in the same order."""
    max_bad_fraction: float = 0.01
    """Samples of a source that may fail at run time before the run stops, as a fraction of those read."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "sequence_length", "max_images_per_sequence", "decode_threads", "read_threads", "prefetch_steps", "packing_window"
        )
        _require(len(self.mixture) > 0, "data.mixture is empty: name at least one source, for example {'pairs': 1.0}")
        for name, weight in self.mixture.items():
            _require(weight >= 0, f"data.mixture gives source {name!r} the weight {weight}, but a weight is at least 0")
        _require(sum(self.mixture.values()) > 0, f"data.mixture {self.mixture} has no weight above 0")

    @property
    def sources(self) -> list[str]:
        """Names of the sources that get sequences, in the order in which plans and logs number them."""
        return [name for name, weight in self.mixture.items() if weight > 0]

    @property
    def tokenizer_path(self) -> Path:
        return self.tokenizer if self.tokenizer is not None else self.path / "tokenizer.model"


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
    """Decoupled: lr * weight_decay of each weight is taken off at each step; not from norms, biases and other vectors."""
    clip_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 does not clip."""

    def __post_init__(self) -> None:
        _require_positive(self, "peak_lr", "epsilon")
        _require(0 <= self.min_lr <= self.peak_lr, f"min_lr {self.min_lr} must lie between 0 and peak_lr {self.peak_lr}")
        _require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}, but must be at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """How long, in which batches and in which precision."""

    steps: int
    """Optimizer steps after which the run ends, counted from the beginning of training (not from a resume)."""
    schedule_steps: int
    """Length of the learning-rate schedule, steps; a length of its own, so that stopping early does not bend it."""
    global_batch_size: int
    """Sequences of one optimizer step, over all processes."""
    micro_batch_size: int = 1
    """Sequences that one process handles at once."""
    precision: Precision = "bf16"
    """fp32; bf16 with fp32 master weights and gradients; fp8 is bf16 with FP8 matrix products (Transformer Engine)."""
    seed: int = 1234
    """Seed of the initial weights, the sample order and everything else that is random."""
    layers: Literal["auto", "te", "torch"] = "auto"
    """Layer backend: Transformer Engine or plain PyTorch; auto takes te on a GPU where its package is, except in fp32."""
    deterministic: bool = False
    """Use deterministic algorithms where PyTorch has them; bit-identical reruns on a GPU, slower."""

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "schedule_steps", "global_batch_size", "micro_batch_size")
        _require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size {self.global_batch_size} is not a multiple of train.micro_batch_size {self.micro_batch_size}",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    interval: int = 1000
    """Steps between checkpoints; one is always written at the end of the run."""
    keep: int = 3
    """Newest complete checkpoints that stay."""
    asynchronous: bool = True
    """Write in a process of its own while training goes on."""
    timeout_minutes: float = 30.0
    """An asynchronous save that takes longer is given up with an error in the log; training goes on."""

    def __post_init__(self) -> None:
        _require_positive(self, "interval", "keep", "timeout_minutes")


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
        _require(
            min(self.interval, self.batches, self.samples, self.max_new_tokens) >= 0,
            f"evaluation settings must be at least 0, but are {self}",
        )


@dataclass(frozen=True)
class MonitorConfig:
    """Console and Weights & Biases. `metrics.jsonl` in the run directory is always written."""

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
    """Peak of one device in TFLOP/s for MFU; None takes the table in `megatron_mm.planning.flops` (no MFU on a CPU)."""

    def __post_init__(self) -> None:
        _require_positive(self, "console_interval")


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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def num_micro_batches(self, data_parallel_size: int) -> int:
        """Micro-batches of one process in one step. Raises ValueError where the batch cannot be cut evenly."""
        train = self.train
        per_slot = train.micro_batch_size * data_parallel_size
        _require(
            train.global_batch_size % per_slot == 0,
            f"train.global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size {train.micro_batch_size} x "
            f"data-parallel size {data_parallel_size} = {per_slot}: change one of them",
        )
        return train.global_batch_size // per_slot


# --------------------------------------------------------------------------------------------------------- dump and load

_MODELS: dict[str, type[ModelConfig]] = {config.family: config for config in (MM1Config,)}


def to_dict(value: Any) -> Any:
    """A config part as plain JSON values: a model carries its `family`, paths are strings, tuples are lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"family": value.family, **result} if isinstance(value, ModelConfig) else result
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(kind: type, values: dict[str, Any], *, where: str = "config") -> Any:
    """The config part `kind` from plain values, the inverse of `to_dict`.

    Raises ValueError that names an unknown or missing field, or an unknown model family.
    """
    if kind is ModelConfig:
        family = values.get("family")
        if family not in _MODELS:
            raise ValueError(f"{where} has the model family {family!r}, but this version knows {sorted(_MODELS)}")
        return from_dict(_MODELS[family], {k: v for k, v in values.items() if k != "family"}, where=where)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    _require(not unknown, f"{where} has unknown fields {unknown}; {kind.__name__} knows {sorted(fields)}")
    optional = dataclasses.MISSING
    missing = [n for n, f in fields.items() if n not in values and f.default is optional and f.default_factory is optional]
    _require(not missing, f"{where} lacks the fields {missing}")
    return kind(**{name: _convert(hints[name], value, where=f"{where}.{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    if hint is Path:
        return Path(value)
    return tuple(value) if typing.get_origin(hint) is tuple else value


def save_experiment(experiment: Experiment, path: Path) -> None:
    """Write the resolved experiment as JSON."""
    path.write_text(json.dumps(to_dict(experiment), indent=2) + "\n")


def load_experiment(path: Path) -> Experiment:
    """Read what `save_experiment` wrote. Raises ValueError that names the file and the field."""
    return from_dict(Experiment, json.loads(path.read_text()), where=str(path))
