"""`megatron-mm convert`: checkpoints of ours and of Hugging Face, one from the other."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from megatron_mm.cli.command import Command, Group, Parser, integer, one_of
from megatron_mm.cli.recipe import recipe_of

_THREADS = min(8, os.cpu_count() or 1)
"""Default number of conversion threads."""


def _add_threads(parser: Parser) -> None:
    parser.add_argument("--threads", type=integer, default=_THREADS, metavar="N", help="read and write on N threads (default: %(default)s)")


# ---------------------------------------------------------------------------------------------------------------------- to-hf


def _to_hf_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN_DIR/checkpoints/step_..., or RUN_DIR for its newest")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write")
    parser.add_argument(
        "--part", default="whole", help="decoder or tower alone (default: %(default)s)", **one_of(["whole", "language", "vision"])
    )
    parser.add_argument(
        "--architecture", default="llama", help="of a decoder alone (default: %(default)s)", **one_of(["llama", "mistral", "internlm2"])
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="of the weights; auto keeps the checkpoint's (default: %(default)s)",
        **one_of(["auto", "float32", "bfloat16", "float16"]),
    )
    parser.add_argument(
        "--vocab-size", type=integer, metavar="N", help="rows of the vocabulary to write, without the padding rows at its end"
    )
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest safetensors file (default: %(default)s)")
    _add_threads(parser)


def _to_hf(given: argparse.Namespace) -> None:
    from megatron_mm.conversion.to_hf import convert_to_hf

    made = convert_to_hf(
        given.checkpoint,
        given.out,
        part=given.part,
        architecture=given.architecture,
        dtype=given.dtype,
        vocab_rows=given.vocab_size,
        shard_size=given.shard_size,
        threads=given.threads,
    )
    print(f"{made.path}: {made.num_parameters:,} parameters in {made.num_tensors} tensors, {made.num_shards} files")


# -------------------------------------------------------------------------------------------------------------------- from-hf


def _from_hf_arguments(parser: Parser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="run directory to make; `train RECIPE --init-from OUT` begins with it")
    parser.add_argument("--recipe", required=True, metavar="RECIPE", help="recipe of the model; with one, --help lists every field")
    parser.add_argument("--whole", type=Path, metavar="DIR", help="what `convert to-hf` has written, or released InfiMM or Mono-InternVL")
    parser.add_argument("--language", type=Path, metavar="DIR", help="a decoder: Llama, Vicuna, Mistral, Zephyr, InternLM2")
    parser.add_argument("--vision", type=Path, metavar="DIR", help="an image tower: CLIP, of transformers or open_clip, or EVA-CLIP")
    _add_threads(parser)


def _from_hf(given: argparse.Namespace) -> None:
    from megatron_mm.conversion.from_hf import convert_from_hf

    made = convert_from_hf(
        given.experiment, given.out, whole=given.whole, language=given.language, vision=given.vision, threads=given.threads
    )
    print(made.checkpoint)
    for what, count in made.sources.items():
        print(f"  {count:16,} parameters read: {what}")
    for what, count in made.drawn.items():
        print(f"  {count:16,} parameters drawn: {what}")
    command = ["train", given.recipe, "--run-dir", "RUN_DIR", "--data.path", "DATA", "--init-from", str(given.out), *given.overrides]
    print(f"begin with it: megatron-mm {shlex.join(command)}")


# -------------------------------------------------------------------------------------------------------------------- inspect


def _inspect_arguments(parser: Parser) -> None:
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="checkpoint or run directory of ours, Hugging Face directory, or file of weights"
    )
    parser.add_argument("--no-norms", action="store_true", help="read no tensor: quick")
    parser.add_argument("--unfold", action="store_true", help="every layer by itself, even where they look alike")
    _add_threads(parser)


def _inspect(given: argparse.Namespace) -> None:
    from megatron_mm.conversion.inspect import inspect

    lines = inspect(given.path, norms=not given.no_norms, unfold=given.unfold, threads=given.threads)
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:  # whoever read the lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --------------------------------------------------------------------------------------------------------------------- verify


def _verify_arguments(parser: Parser) -> None:
    for name in ("first", "second"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="Hugging Face directory, or checkpoint or run directory of ours")
    parser.add_argument("--prompt", metavar="TEXT", help="compare logits of this text too; runs the code that travels with the models")
    _add_threads(parser)


def _verify(given: argparse.Namespace) -> None:
    from megatron_mm.conversion.verify import report, verify

    found = verify(given.first, given.second, prompt=given.prompt, threads=given.threads)
    print("\n".join(report(found)))
    if not found.passed:
        raise SystemExit(1)


# -------------------------------------------------------------------------------------------------------------------- upcycle


def _upcycle_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="dense checkpoint, or RUN_DIR for its newest")
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="run directory to make; `train RECIPE --run-dir RUN_DIR` continues it"
    )
    parser.add_argument(
        "--recipe", required=True, metavar="RECIPE", help="sparse recipe, such as mm1_3b_moe; with one, --help lists every field"
    )


def _upcycle(given: argparse.Namespace) -> None:
    from megatron_mm.conversion.upcycle import upcycle
    from megatron_mm.training.checkpoint import find_checkpoint

    made = upcycle(find_checkpoint(given.checkpoint), given.run_dir, given.experiment)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{made}: continue with megatron-mm train {given.recipe} --run-dir {given.run_dir}")


CONVERT = Group(
    help="convert checkpoints",
    commands={
        "to-hf": Command(help="write a checkpoint as a Hugging Face model", run=_to_hf, arguments=_to_hf_arguments),
        "from-hf": Command(
            help="make a checkpoint that training begins with, of Hugging Face weights",
            run=_from_hf,
            arguments=_from_hf_arguments,
            experiment=recipe_of,
            notes=lambda: "DIR is a Hugging Face directory or a file of weights. What no source gives gets its initial weights.",
        ),
        "inspect": Command(
            help="show a checkpoint as a tree: shapes, types, norms, parameters", run=_inspect, arguments=_inspect_arguments
        ),
        "verify": Command(
            help="compare two checkpoints: names, shapes, values, logits of a prompt", run=_verify, arguments=_verify_arguments
        ),
        "upcycle": Command(
            help="make a sparse model whose experts begin as a dense checkpoint's MLPs",
            run=_upcycle,
            arguments=_upcycle_arguments,
            experiment=recipe_of,
            notes=lambda: "Under torchrun the options --parallel.* say how the sparse model is cut.",
        ),
    },
)
