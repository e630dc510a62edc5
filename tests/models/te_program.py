"""Program of `test_te.py`: runs the same model on the `torch` and the `te` layer backend, the latter with kernels written in PyTorch
(`support.te`).

    python te_program.py mm1|infimm|mono_internvl

It is a separate program because megatron-core looks for Transformer Engine when it is imported. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support import te

te.install()

import torch  # noqa: E402
from support import distributed  # noqa: E402
from support.small import random_step, small_experiment  # noqa: E402
from support.small_infimm import infimm_step, small_infimm  # noqa: E402
from support.small_mono import mono_step, small_mono  # noqa: E402
from support.te import fp8  # noqa: E402

from megatron_mm.config import Experiment, MoEConfig, ResamplerConfig  # noqa: E402
from megatron_mm.config.towers import EVA_TINY  # noqa: E402
from megatron_mm.data.batch import PackedBatch  # noqa: E402
from megatron_mm.models.context import Kernels  # noqa: E402
from megatron_mm.parallel import initial_weights  # noqa: E402
from megatron_mm.parallel import topology as topologies  # noqa: E402
from megatron_mm.run.start import check_fp8  # noqa: E402
from megatron_mm.training import build  # noqa: E402
from megatron_mm.training.checkpoint import Checkpointer, TrainState  # noqa: E402
from megatron_mm.training.optimizer import build_optimizer  # noqa: E402
from megatron_mm.training.step import TrainingStep  # noqa: E402
from tools.gpu_check_layers import hide_nothing  # noqa: E402


@dataclass(frozen=True)
class Subject:
    """A family to compare."""

    experiment: Callable[..., Experiment]
    """Builds the experiment; takes fields of `train` to change."""
    batches: Callable[..., list[PackedBatch]]
    """Returns the micro-batches of a step; the first has no image."""
    also: Callable[[Experiment], dict[str, Experiment]] = lambda base: {}
    """Further variants to compare in fp32."""
    misfits: Callable[[Experiment], dict[str, Experiment]] = lambda base: {}
    """Variants with a size that FP8 products refuse, by the name of that size."""


def _with_experts(base: Experiment) -> dict[str, Experiment]:
    decoder = replace(base.model.decoder, moe=MoEConfig(num_experts=4, every_n_layers=2, top_k=2))
    return {"experts": replace(base, model=replace(base.model, decoder=decoder))}


def _small_infimm(**train: Any) -> Experiment:
    """Build a small InfiMM with 16 latents, as FP8 products require multiples of 16, and a tower whose SwiGLU has padded rows on `te`."""
    return small_infimm(
        model={
            "vision": replace(EVA_TINY, hidden_size=32, num_attention_heads=4, ffn_hidden_size=42, image_size=16),
            "resampler": ResamplerConfig(num_latents=16, num_layers=2, num_attention_heads=4, head_dim=8),
        },
        **train,
    )


def _misfits_of_decoder(base: Experiment) -> dict[str, Experiment]:
    return {
        "model.decoder.hidden_size": _changed(base, decoder={"hidden_size": 72}),
        "model.decoder.ffn_hidden_size": _changed(base, decoder={"ffn_hidden_size": 104}),
        "model.decoder.num_attention_heads x head_dim": _changed(base, decoder={"num_attention_heads": 1, "num_query_groups": 1}),
        "(model.decoder.num_attention_heads + 2 num_query_groups) x head_dim": _changed(
            base, decoder={"num_query_groups": 1, "head_dim": 12}
        ),
    }


def _misfits_of_infimm(base: Experiment) -> dict[str, Experiment]:
    return {
        **_misfits_of_decoder(base),
        "model.vision.hidden_size": _changed(base, vision={"hidden_size": 40, "num_attention_heads": 2}),
        "model.resampler.num_latents": _changed(base, resampler={"num_latents": 8}),
        "model.gated.num_attention_heads x head_dim": _changed(base, gated={"num_attention_heads": 5}),
    }


def _changed(base: Experiment, **parts: dict[str, int]) -> Experiment:
    """Return the experiment with changed fields in parts of the model's configuration."""
    changed: dict[str, Any] = {part: replace(getattr(base.model, part), **fields) for part, fields in parts.items()}
    return replace(base, model=replace(base.model, **changed))


SUBJECTS = {
    "mm1": Subject(small_experiment, random_step, _with_experts, _misfits_of_decoder),
    "infimm": Subject(_small_infimm, infimm_step, misfits=_misfits_of_infimm),
    "mono_internvl": Subject(small_mono, mono_step, misfits=_misfits_of_decoder),
}


class Trainee:
    """A model on one backend, with its training step and checkpointer."""

    def __init__(self, subject: Subject, experiment: Experiment, backend: str, run_dir: Path) -> None:
        use_backend(backend)
        self.subject, self.experiment = subject, experiment
        self.topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
        self.model = build.build_model(experiment, self.topology)
        hide_nothing(self.model[0].module)
        optimizer = build_optimizer(experiment, self.model)
        self.step = TrainingStep(experiment, self.topology, self.model, optimizer, num_sources=2)
        self.checkpointer = Checkpointer(experiment, self.topology, run_dir, self.model, optimizer)

    def train(self, first: int, last: int) -> list[float]:
        """Train; return the losses. Each batch is first evaluated with the same weights, which must yield the same loss."""
        losses = []
        for number in range(first, last + 1):
            batches = self.subject.batches(self.experiment, self.topology, step=number)
            evaluated = self.step.evaluate(batches).mean
            losses.append(self.step.run(batches, step=number).losses.mean)
            assert abs(evaluated - losses[-1]) < 1e-6, f"step {number}: evaluation says {evaluated}, training {losses[-1]}"
        return losses

    def save(self, step: int) -> None:
        self.checkpointer.save(TrainState(step=step))
        self.checkpointer.finish()

    def names(self) -> dict[str, list[Any]]:
        """Return the global names and shapes of the model's entries in a checkpoint."""
        return {entry.key: list(getattr(entry, "global_shape", ())) for entry in entries(self.model[0].module)}


def use_backend(backend: str) -> None:
    build.choose_backend = lambda experiment, *, on_gpu: backend  # type: ignore[assignment, return-value]
    build.choose_kernels = lambda experiment, *, backend: kernels_of(backend)


def kernels_of(backend: str) -> Kernels:
    """Return Transformer Engine's fused kernels, except those written in Triton."""
    on = backend == "te"
    return Kernels(weight_gradients=on, router=on, eva_tower=on)


def entries(chunk: torch.nn.Module) -> list[Any]:
    """Return a chunk's entries in a checkpoint."""
    return list(chunk.sharded_state_dict(metadata=dict(initial_weights.STATE_METADATA)).values())  # type: ignore[operator]


def compare(subject: Subject, experiment: Experiment) -> dict[str, Any]:
    """Train four steps on each backend, and repeat the last two on the other backend from the checkpoint of step 2."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("torch", "te"):
            trainee = Trainee(subject, experiment, backend, Path(folder) / backend)
            losses = trainee.train(1, 2)
            trainee.save(2)
            found[backend] = {"names": trainee.names(), "losses": losses + trainee.train(3, 4)}
            topologies.shutdown()
        for backend, other in (("torch", "te"), ("te", "torch")):
            trainee = Trainee(subject, experiment, backend, Path(folder) / other)
            assert trainee.checkpointer.load_latest() is not None
            found[backend][f"from {other}"] = trainee.train(3, 4)
            topologies.shutdown()
    return found


@dataclass(frozen=True)
class Seen:
    """A model's outputs for some micro-batches, each run separately."""

    images: list[int]
    logits: list[torch.Tensor]
    gradients: list[dict[str, torch.Tensor]]
    """Gradients of the sum of the losses, by name in checkpoints; parameters without a gradient are left out."""


def look(subject: Subject, backend: str, **train: Any) -> Seen:
    """Return logits and gradients on a backend, with weights prepared by `hide_nothing`."""
    return look_at(subject, subject.experiment(**train), backend)


def look_at(subject: Subject, experiment: Experiment, backend: str) -> Seen:
    use_backend(backend)
    topology = topologies.initialize(experiment.parallel, seed=1)
    (chunk,) = build.build_chunks(experiment, topology)
    initial_weights.initialize_weights([chunk], seed=1)
    hide_nothing(chunk)
    seen = Seen([], [], [])
    for batch in subject.batches(experiment, topology, step=3):
        with torch.no_grad():
            seen.logits.append(chunk(batch, with_loss=False)[0].float())
        chunk.zero_grad()
        chunk(batch).sum().backward()
        learned = {entry.key: entry.data.grad for entry in entries(chunk) if getattr(entry.data, "grad", None) is not None}
        seen.images.append(batch.num_images)
        seen.gradients.append({name: gradient.float().clone() for name, gradient in learned.items()})
    topologies.shutdown()
    return seen


def distances(one: Seen, other: Seen) -> dict[str, list[Any]]:
    """Return |one - other| / |other| for each micro-batch: of the logits, and of the gradient with the largest ratio.

    Gradients that are zero in both, or rounding of less than a millionth of the largest gradient, count as equal. The gradient of a single
    number (a gate) is a sum over all tokens whose terms may cancel: all such gradients are compared as one vector.
    """
    found: dict[str, list[Any]] = {"logits": [], "gradients": []}
    for index in range(len(one.images)):
        found["logits"].append(_distance(one.logits[index], other.logits[index], floor=0.0))
        ones, others = _numbers_together(one.gradients[index]), _numbers_together(other.gradients[index])
        assert ones.keys() == others.keys(), set(ones) ^ set(others)
        floor = 1e-6 * max(float(gradient.norm()) for gradient in others.values())
        found["gradients"].append(max(_distance(ones[name], others[name], floor=floor) for name in ones))
    return found


def _numbers_together(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    numbers = [gradient.flatten() for gradient in gradients.values() if gradient.numel() == 1]
    tensors = {name: gradient for name, gradient in gradients.items() if gradient.numel() > 1}
    return {**tensors, **({"numbers": torch.cat(numbers)} if numbers else {})}


def _distance(one: torch.Tensor, other: torch.Tensor, *, floor: float) -> float:
    return float((one - other).norm()) / max(float(other.norm()), floor)


def compare_passes(subject: Subject) -> dict[str, Any]:
    """Return the distances of other backends and precisions from plain PyTorch's fp32 logits and gradients."""
    exact = look(subject, "torch", precision="fp32")
    found = {
        f"{backend} {precision}": distances(look(subject, backend, precision=precision), exact)
        for backend, precision in (("te", "fp32"), ("torch", "bf16"), ("te", "bf16"), ("te", "fp8"))
    }
    torch.use_deterministic_algorithms(True, warn_only=True)
    found["te deterministic"] = distances(look(subject, "te", precision="fp32"), exact)
    found["te deterministic"]["core attention"] = sorted(_core_attentions(subject))
    torch.use_deterministic_algorithms(False)
    return {**found, "images": exact.images}


def _core_attentions(subject: Subject) -> set[str]:
    """Return the names of the classes of core attention of a model on `te`."""
    use_backend("te")
    experiment = subject.experiment(precision="fp32")
    (chunk,) = build.build_chunks(experiment, topologies.initialize(experiment.parallel, seed=1))
    topologies.shutdown()
    return {type(module).__name__ for name, module in chunk.named_modules() if name.endswith("core_attention")}


def compare_fp8(subject: Subject) -> dict[str, list[float]]:
    """Return losses on `te` in bf16, in FP8, and in FP8 with recomputed layers."""
    found = {}
    for name, precision, recompute in (("bf16", "bf16", "none"), ("fp8", "fp8", "none"), ("fp8 recomputed", "fp8", "full")):
        experiment = subject.experiment(precision=precision)
        experiment = replace(experiment, parallel=replace(experiment.parallel, recompute=recompute))
        check_fp8(experiment)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = Trainee(subject, experiment, "te", Path(folder)).train(1, 4)
            topologies.shutdown()
    return found


@dataclass(frozen=True)
class Gradient:
    """Gradient of this process's part of a parameter."""

    size: int
    squared: float
    """Sum of squares."""


def gradients_of(family: str, tensor: int, backend: str) -> dict[str, Gradient]:
    """Return the gradients of a step on one process of a tensor-parallel group (with sequence parallelism if it has several)."""
    subject = SUBJECTS[family]
    experiment = subject.experiment(precision="fp32")
    experiment = replace(
        experiment,
        parallel=replace(experiment.parallel, tensor=tensor),
        optimizer=replace(experiment.optimizer, clip_grad_norm=0.0),  # gradients are read unclipped
    )
    with tempfile.TemporaryDirectory() as folder:
        trainee = Trainee(subject, experiment, backend, Path(folder))
        trainee.train(1, 1)
    learned = {entry.key: entry.data for entry in entries(trainee.model[0].module) if hasattr(entry.data, "main_grad")}
    topologies.shutdown()
    return {name: Gradient(p.numel(), float(p.main_grad.double().square().sum())) for name, p in learned.items()}


def compare_cut(family: str) -> dict[str, list[float]]:
    """Return the norms of the gradients on one process with plain PyTorch's layers, and on each of two with Transformer Engine's.

    For a parameter that is split, the two parts' norms are combined.
    """
    distributed._PRELOADED.clear()  # processes start by importing this file, and so Transformer Engine
    whole = gradients_of(family, 1, "torch")
    parts = distributed.run_processes(gradients_of, 2, family, 2, "te")
    norms: dict[str, list[float]] = {}
    for name, gradient in whole.items():
        squared = [part[name].squared for part in parts]
        if parts[0][name].size < gradient.size:
            squared = [sum(squared)]
        norms[name] = [gradient.squared**0.5, *(value**0.5 for value in squared)]
    return norms


def try_misfits(subject: Subject) -> dict[str, list[str]]:
    """Return the errors of FP8 products and of the check before the start for each misfit; "" if it is accepted."""
    found = {}
    for name, experiment in subject.misfits(subject.experiment(precision="fp8")).items():
        said = ["", ""]
        try:
            look_at(subject, experiment, "te")
        except (AssertionError, ValueError) as error:
            said[0] = str(error)
            topologies.shutdown()
        try:
            check_fp8(experiment)
        except ValueError as error:
            said[1] = str(error)
        found[name] = said
    return found


def main() -> None:
    torch.set_num_threads(1)
    subject = SUBJECTS[sys.argv[1]]
    dense = subject.experiment(precision="fp32")
    models = {"fp32": dense, **subject.also(dense)}
    found: dict[str, Any] = {name: compare(subject, experiment) for name, experiment in models.items()}
    found["passes"] = compare_passes(subject)
    found["losses"] = compare_fp8(subject)
    found["misfits"] = try_misfits(subject)
    found["cut"] = compare_cut(sys.argv[1])
    found["recipes"] = sorted(fp8.QUANTIZERS)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
