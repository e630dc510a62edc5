"""What a user may have meant by an option that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from megatron_mm.config.checks import containing

_BATCH = ("--train.global-batch-size", "--train.micro-batch-size")
_THREADS = ("--data.decode-threads", "--data.read-threads")
ELSEWHERE: dict[tuple[str, ...], tuple[str, ...]] = {
    ("learning-rate", "base-lr", "max-lr"): ("--optimizer.peak-lr",),
    ("min-learning-rate", "lr-min"): ("--optimizer.min-lr",),
    ("warmup", "lr-warmup", "warmup-iters", "lr-warmup-iters", "warmup-ratio"): ("--optimizer.warmup-steps",),
    ("lr-schedule", "lr-scheduler", "lr-scheduler-type", "lr-decay-style"): ("--optimizer.decay",),
    ("lr-decay-iters", "lr-decay-steps"): ("--train.schedule-steps",),
    ("clip", "clip-grad", "clip-norm", "gradient-clip", "gradient-clip-val", "gradient-clipping", "grad-clip", "max-grad-norm"): (
        "--optimizer.clip-grad-norm",
    ),
    ("adam-beta1",): ("--optimizer.beta1",),
    ("adam-beta2",): ("--optimizer.beta2",),
    ("adam-eps", "adam-epsilon", "eps"): ("--optimizer.epsilon",),
    ("wd",): ("--optimizer.weight-decay",),
    ("steps", "max-steps", "num-steps", "total-steps", "iterations", "iters", "max-iters", "train-iters"): ("--train.steps",),
    ("epochs", "num-epochs", "num-train-epochs", "max-epochs"): ("--train.steps",),
    ("gbs", "train-batch-size"): ("--train.global-batch-size",),
    ("mbs", "per-device-train-batch-size", "per-device-batch-size", "batch-size-per-gpu"): ("--train.micro-batch-size",),
    ("grad-accum", "gradient-accumulation", "gradient-accumulation-steps", "accumulate-grad-batches"): _BATCH,
    ("dtype", "torch-dtype", "amp", "mixed-precision", "bf16", "fp16", "fp8", "fp32"): ("--train.precision",),
    ("freeze", "trainable"): ("--train.freeze-policy",),
    ("tp", "tp-size", "tensor-parallel-size", "tensor-model-parallel-size"): ("--parallel.tensor",),
    ("pp", "pp-size", "pipeline-parallel-size", "pipeline-model-parallel-size"): ("--parallel.pipeline",),
    ("vp", "vpp", "virtual-pipeline", "num-virtual-stages-per-pipeline-rank"): ("--parallel.virtual",),
    ("ep", "ep-size", "expert-parallel-size", "expert-model-parallel-size"): ("--parallel.expert",),
    ("sp", "sequence-parallel"): ("--parallel.sequence",),
    ("activation-checkpointing", "gradient-checkpointing", "recompute-granularity", "recompute-activations"): ("--parallel.recompute",),
    ("seq-len", "seq-length", "max-seq-len", "max-seq-length", "max-length", "context-length", "block-size"): ("--data.sequence-length",),
    ("workers", "num-workers", "dataloader-num-workers"): _THREADS,
    ("dataset", "data", "data-dir", "train-data"): ("--data.path",),
    ("mix", "blend", "data-blend"): ("--data.mixture",),
    ("out", "output", "output-dir", "save", "save-dir", "log-dir"): ("--run-dir",),
    ("pretrained", "pretrained-checkpoint", "finetune"): ("--init-from",),
    ("checkpoint.every", "save-every", "save-steps", "save-interval", "checkpoint-interval"): ("--checkpoint.interval",),
    ("eval.every", "eval-every", "eval-steps", "val-interval"): ("--eval.interval",),
    ("log-every", "log-interval", "logging-steps"): ("--monitor.console-interval",),
    ("report-to", "use-wandb", "wandb-mode"): ("--monitor.wandb",),
    ("use-tensorboard", "tensorboard-dir"): ("--monitor.tensorboard",),
}
"""Usual names of options in other training programs, with those here that serve the same purpose."""
_RESUME = ("load", "resume", "resume-from", "resume-from-checkpoint")
_MOST = 3
"""More names than this are no advice."""


def advice(name: str, known: Iterable[str]) -> str:
    """Return what to use in place of the option `name`, which does not exist, or an empty text."""
    options = list(dict.fromkeys(known))
    if name.removeprefix("--") in _RESUME and {"--run-dir", "--init-from"} <= set(options):
        return "the same command with the same --run-dir resumes a run; --init-from starts with the weights of another one"
    near = _meant(name, options)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _meant(name: str, options: Sequence[str]) -> Sequence[str]:
    """Return the options that a name may stand for: at most three, or none.

    The usual names of other programs come first, then the same field of another group, options that contain all its words, and options
    whose field is spelled like it, in the same group if there is one.
    """
    group, _, field = name.removeprefix("--").rpartition(".")
    for names, ours in ELSEWHERE.items():
        if {field, f"{group}.{field}"} & set(names) and (found := [option for option in ours if option in options]):
            return found
    fields: dict[str, list[str]] = {}
    for option in options:
        fields.setdefault(option.removeprefix("--").rpartition(".")[2], []).append(option)
    guesses = [fields.get(field, []), containing(name, options), containing(field, options)]
    beside = [option.rpartition(".")[2] for option in options if option.startswith(f"--{group}.")]
    if spelled := difflib.get_close_matches(field, beside, n=1):
        guesses.append([f"--{group}.{spelled[0]}"])
    if spelled := difflib.get_close_matches(field, fields, n=1):
        guesses.append(fields[spelled[0]])
    guesses.append(difflib.get_close_matches(name, options, n=1, cutoff=0.8))
    return next((guess for guess in guesses if 0 < len(guess) <= _MOST), [])
