"""`megatron-mm convert`: conversion between our checkpoints and Hugging Face's, inspection, comparison, upcycling."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from megatron_mm.cli.checks import place
from megatron_mm.cli.command import Command, Group, Parser, integer, one_of
from megatron_mm.cli.recipe import recipe_of

_THREADS = min(8, os.cpu_count() or 1)
"""Default number of conversion threads."""


def _add_threads(parser: Parser) -> None:
    parser.add_argument(
        "--threads", type=integer, default=_THREADS, metavar="N", help="number of threads that read and write (default: %(default)s)"
    )


# ---------------------------------------------------------------------------------------------------------------------- to-hf


def _to_hf_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN_DIR/checkpoints/step_..., or RUN_DIR for its newest")
    parser.add_argument("out", type=place, metavar="OUT", help="directory to write")
    parser.add_argument(
        "--part",
        default="whole",
        help="export the whole model, or only the decoder or the tower (default: %(default)s)",
        **one_of(["whole", "language", "vision"]),
    )
    parser.add_argument(
        "--architecture",
        default="llama",
        help="class of a decoder that is exported alone (default: %(default)s)",
        **one_of(["llama", "mistral", "internlm2"]),
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="type of the weights; auto keeps the checkpoint's type (default: %(default)s)",
        **one_of(["auto", "float32", "bfloat16", "float16"]),
    )
    parser.add_argument(
        "--vocab-size", type=integer, metavar="N", help="number of vocabulary rows to write (default: all but padding rows)"
    )
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="maximum size of a safetensors file (default: %(default)s)")
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
    parser.add_argument("out", type=place, metavar="OUT", help="run directory to create; train from it with `train RECIPE --init-from OUT`")
    parser.add_argument(
        "--recipe", required=True, metavar="RECIPE", help="recipe that defines the model; if given, --help lists every field"
    )
    parser.add_argument(
        "--whole", type=Path, metavar="DIR", help="a whole model: output of `convert to-hf`, or the released InfiMM or Mono-InternVL"
    )
    parser.add_argument("--language", type=Path, metavar="DIR", help="a decoder: Llama, Vicuna, Mistral, Zephyr, InternLM2")
    parser.add_argument("--vision", type=Path, metavar="DIR", help="an image tower: CLIP (from transformers or open_clip) or EVA-CLIP")
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
        print(f"  {count:16,} parameters with initial values: {what}")
    command = ["train", given.recipe, "--run-dir", "RUN_DIR", "--data.path", "DATA", "--init-from", str(given.out), *given.overrides]
    print(f"train from it: megatron-mm {shlex.join(command)}")


# -------------------------------------------------------------------------------------------------------------------- inspect


def _inspect_arguments(parser: Parser) -> None:
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="our checkpoint or run directory, a Hugging Face directory, or a file of weights"
    )
    parser.add_argument("--no-norms", action="store_true", help="do not read any tensor, which is faster")
    parser.add_argument("--unfold", action="store_true", help="list every layer separately, even if several are alike")
    _add_threads(parser)


def _inspect(given: argparse.Namespace) -> None:
    from megatron_mm.conversion.inspect import inspect

    lines = inspect(given.path, norms=not given.no_norms, unfold=given.unfold, threads=given.threads)
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --------------------------------------------------------------------------------------------------------------------- verify


def _verify_arguments(parser: Parser) -> None:
    for name in ("first", "second"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help="Hugging Face directory, or our checkpoint or run directory")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="also compare logits for this text; runs the Python code in the Hugging Face directory"
    )
    _add_threads(parser)


def _verify(given: argparse.Namespace) -> None:
    from megatron_mm.conversion.verify import report, verify

    found = verify(given.first, given.second, prompt=given.prompt, threads=given.threads)
    print("\n".join(report(found)))
    if not found.passed:
        raise SystemExit(1)


# -------------------------------------------------------------------------------------------------------------------- upcycle


def _upcycle_arguments(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a dense checkpoint, or RUN_DIR for its newest one")
    parser.add_argument(
        "run_dir", type=place, metavar="RUN_DIR", help="run directory to create; continue it with `train RECIPE --run-dir RUN_DIR`"
    )
    parser.add_argument(
        "--recipe", required=True, metavar="RECIPE", help="a sparse recipe, such as mm1_3b_moe; if given, --help lists every field"
    )


def _upcycle(given: argparse.Namespace) -> None:
    from megatron_mm.conversion.upcycle import upcycle
    from megatron_mm.training.checkpoint import find_checkpoint

    made = upcycle(find_checkpoint(given.checkpoint), given.run_dir, given.experiment)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{made}: continue with megatron-mm train {given.recipe} --run-dir {given.run_dir} --data.path DATA")


CONVERT = Group(
    help="convert checkpoints",
    commands={
        "to-hf": Command(help="write a checkpoint as a Hugging Face model", run=_to_hf, arguments=_to_hf_arguments),
        "from-hf": Command(
            help="make a checkpoint from Hugging Face weights, from which training can begin",
            run=_from_hf,
            arguments=_from_hf_arguments,
            experiment=recipe_of,
            notes=lambda: "DIR is a Hugging Face directory or a file of weights. Parameters that no source provides get initial values.",
        ),
        "inspect": Command(
            help="print a checkpoint as a tree: shapes, types, norms, parameter counts", run=_inspect, arguments=_inspect_arguments
        ),
        "verify": Command(
            help="compare two checkpoints: names, shapes, values, logits of a prompt", run=_verify, arguments=_verify_arguments
        ),
        "upcycle": Command(
            help="turn a dense checkpoint into a sparse model; each expert starts as a copy of the dense MLP",
            run=_upcycle,
            arguments=_upcycle_arguments,
            experiment=recipe_of,
            notes=lambda: "Under torchrun, the options --parallel.* determine how the sparse model is split.",
        ),
    },
)
