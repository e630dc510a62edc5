"""The command line: `megatron-mm COMMAND` (or `python -m megatron_mm COMMAND`).

    train RECIPE      train a recipe; every field is an option (--train.steps 100); --dry-run shows what would run
    prepare demo      make a small data set of drawn scenes
    prepare index     read every sample of a data set once and index it
    prepare tokenizer train a SentencePiece tokenizer on a data set's texts
    convert to-hf     write a checkpoint as a Hugging Face model
    convert from-hf   make a checkpoint that training begins with, of Hugging Face weights
    convert inspect   show a checkpoint as a tree
    convert upcycle   make a sparse model of a dense checkpoint
    plan              predicted step time and memory against published measurements
    eval CHECKPOINT   held-out losses with true, shuffled and blank images, and captions
    doctor            what this machine has, and what falls back to what

A user's mistake is one line on standard error and exit code 2. Heavy imports wait for the command that needs them, so that
`--help` is quick.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_mm import __version__
from megatron_mm.cli.plan import add_plan, run_plan

logger = logging.getLogger(__name__)

_THREADS = min(8, os.cpu_count() or 1)
"""That convert, unless told."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; returns on success, exits with 2 on a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and known.run not in (_train, _eval, run_plan, _convert_upcycle, _convert_from_hf):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _configure_logging()
    try:
        known.run(known, rest)
    except (ValueError, FileNotFoundError) as error:
        _fail(error)
    except KeyboardInterrupt:
        print("megatron-mm: interrupted; the same command, started again, goes on", file=sys.stderr, flush=True)
        os._exit(130)  # as a shell would say it


def _fail(error: Exception) -> NoReturn:
    """Print a user's mistake once and leave.

    All processes of a run usually find the same mistake: the others wait, so that the first one speaks for them and torchrun
    ends them; a mistake that only another process finds is still printed.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(3)
    print(f"megatron-mm: error: {f'[rank {rank}] ' if rank else ''}{error}", file=sys.stderr, flush=True)
    logger.debug("where the error came from", exc_info=error)
    sys.stdout.flush()
    os._exit(2)  # not sys.exit: clean-up could wait for processes that never answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-mm", description="Pre-train multimodal language models with tensor, pipeline, expert and data parallelism."
    )
    parser.add_argument("--version", action="version", version=f"megatron-mm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe", add_help=False)
    train.add_argument("recipe", nargs="?", help="name of a recipe")
    train.add_argument("-h", "--help", action="store_true")
    train.set_defaults(run=_train)

    prepare = commands.add_parser("prepare", help="make, index or tokenize data").add_subparsers(required=True, metavar="WHAT")
    demo = prepare.add_parser("demo", help="make a small data set of drawn scenes, its tokenizer and its index")
    demo.add_argument("--out", type=Path, required=True, help="directory to write")
    demo.add_argument("--samples", type=int, default=2000, help="training samples (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the scenes (default: %(default)s)")
    demo.set_defaults(run=_prepare_demo)
    index = prepare.add_parser("index", help="read every sample once: validity, token counts, image sizes")
    index.add_argument("path", type=Path, help="data set (with split folders), one split, or one source folder")
    index.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: PATH/tokenizer.model)")
    index.add_argument(
        "--chat-template",
        default="plain",
        help="how conversations and tasks are written: plain, zephyr, llama2, vicuna or internlm2 (default: %(default)s)",
    )
    index.add_argument("--caption-prompt", help="make chats of pairs, too: what asks for the caption (default: an image and its caption)")
    index.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    index.set_defaults(run=_prepare_index)
    tokenizer = prepare.add_parser("tokenizer", help="train a SentencePiece tokenizer on the texts of a data set")
    tokenizer.add_argument("path", type=Path, help="data set")
    tokenizer.add_argument("--out", type=Path, help="model to write (default: PATH/tokenizer.model)")
    tokenizer.add_argument("--vocab-size", type=int, default=49152, help="tokens, special ones included (default: %(default)s)")
    tokenizer.set_defaults(run=_prepare_tokenizer)

    convert = commands.add_parser("convert", help="convert checkpoints").add_subparsers(required=True, metavar="DIRECTION")
    to_hf = convert.add_parser("to-hf", help="write a checkpoint as a Hugging Face model")
    to_hf.add_argument("checkpoint", type=Path, help="RUN_DIR/checkpoints/step_..., or RUN_DIR for its newest")
    to_hf.add_argument("out", type=Path, help="directory to write")
    to_hf.add_argument("--part", choices=["whole", "language", "vision"], default="whole", help="decoder or tower alone")
    to_hf.add_argument(
        "--architecture", choices=["llama", "mistral", "internlm2"], default="llama", help="of a decoder alone (default: %(default)s)"
    )
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    to_hf.add_argument("--dtype", choices=dtypes, default="auto", help="auto keeps the checkpoint's (default: %(default)s)")
    to_hf.add_argument("--vocab-size", type=int, help="rows of the vocabulary to write, without those at the end that only fill it up")
    to_hf.add_argument("--shard-size", default="5GB", help="largest safetensors file (default: %(default)s)")
    to_hf.add_argument("--threads", type=int, default=_THREADS, help="that read and write at once (default: %(default)s)")
    to_hf.set_defaults(run=_convert_to_hf)

    from_hf = convert.add_parser("from-hf", help="make a checkpoint that training begins with, of Hugging Face weights", add_help=False)
    from_hf.add_argument("out", nargs="?", type=Path, help="run directory to make; `train RECIPE --init-from OUT` begins with it")
    from_hf.add_argument("--recipe", help="whose model it becomes")
    from_hf.add_argument("--whole", type=Path, help="an exported model of the recipe's family")
    from_hf.add_argument("--language", type=Path, help="a decoder: Llama, Mistral, InternLM2")
    from_hf.add_argument("--vision", type=Path, help="an image tower: CLIP, of transformers or open_clip")
    from_hf.add_argument("--threads", type=int, default=_THREADS)
    from_hf.add_argument("-h", "--help", action="store_true")
    from_hf.set_defaults(run=_convert_from_hf)

    inspect = convert.add_parser("inspect", help="show a checkpoint as a tree: shapes, types, norms, parameters")
    inspect.add_argument("path", type=Path, help="checkpoint or run directory of ours, Hugging Face directory, or file of weights")
    inspect.add_argument("--no-norms", action="store_true", help="read no tensor: quick")
    inspect.add_argument("--unfold", action="store_true", help="every layer by itself, even where they look alike")
    inspect.add_argument("--threads", type=int, default=_THREADS, help="that read at once (default: %(default)s)")
    inspect.set_defaults(run=_convert_inspect)

    upcycle = convert.add_parser("upcycle", help="make a sparse model whose experts begin as a dense checkpoint's MLPs", add_help=False)
    upcycle.add_argument("checkpoint", nargs="?", type=Path, help="dense checkpoint, or RUN_DIR for its newest")
    upcycle.add_argument("run_dir", nargs="?", type=Path, help="run directory to make; `train RECIPE --run-dir` goes on from it")
    upcycle.add_argument("--recipe", help="sparse recipe, such as mm1_3b_moe")
    upcycle.add_argument("-h", "--help", action="store_true")
    upcycle.set_defaults(run=_convert_upcycle)

    evaluate = commands.add_parser("eval", help="held-out losses with true, shuffled and blank images, and captions", add_help=False)
    evaluate.add_argument("checkpoint", nargs="?", type=Path, help="RUN_DIR/checkpoints/step_..., or RUN_DIR for its newest")
    evaluate.add_argument("-h", "--help", action="store_true")
    evaluate.set_defaults(run=_eval)

    add_plan(commands)
    doctor = commands.add_parser("doctor", help="what this machine has, and what falls back to what")
    doctor.set_defaults(run=_doctor)
    return parser


def _configure_logging() -> None:
    rank = int(os.environ.get("RANK", "0"))
    prefix = f"[rank {rank}] " if rank else ""
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_mm").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed|apex")
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)  # it warns of layers that are not its own
    warnings.filterwarnings("ignore", module=r"urllib3")
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex).*")


def _train(known: argparse.Namespace, rest: list[str]) -> None:
    from megatron_mm.families.recipes import RECIPES, get_recipe

    if known.recipe is None:
        print("usage: megatron-mm train RECIPE --run-dir DIR --data.path DIR [--group.field VALUE ...] [--dry-run]\n")
        print(f"recipes: {', '.join(RECIPES)}\n\n`megatron-mm train RECIPE --help` lists every field with the recipe's value.")
        if not known.help:
            raise ValueError("no recipe given")
        return
    from megatron_mm.cli.options import parse_train_arguments

    options = parse_train_arguments(get_recipe(known.recipe), [*rest, *(["--help"] if known.help else [])])
    if options.dry_run:
        from megatron_mm.run.dry_run import describe

        for line in describe(options.experiment):
            print(line)
        return
    if options.run_dir is None:
        raise ValueError("no run directory given: add --run-dir DIR")
    from megatron_mm.run.start import start

    start(options.experiment, options.run_dir)


def _eval(known: argparse.Namespace, rest: list[str]) -> None:
    if known.checkpoint is None:
        print("usage: megatron-mm eval CHECKPOINT [--data.path DIR] [--group.field VALUE ...]\n")
        print("CHECKPOINT is RUN_DIR/checkpoints/step_..., or RUN_DIR for its newest; with one, --help lists every field.")
        if not known.help:
            raise ValueError("no checkpoint given")
        return
    from megatron_mm.cli.options import parse_eval_arguments
    from megatron_mm.run.evaluate import evaluate, experiment_of
    from megatron_mm.training.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(known.checkpoint)
    options = parse_eval_arguments(experiment_of(checkpoint), [*rest, *(["--help"] if known.help else [])])
    found = evaluate(options.experiment, checkpoint)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{checkpoint}")
        for line in found.report():
            print(line)


def _prepare_demo(known: argparse.Namespace, rest: list[str]) -> None:
    from megatron_mm.data.prepare.demo import prepare_demo

    print(prepare_demo(known.out, samples=known.samples, seed=known.seed))


def _prepare_index(known: argparse.Namespace, rest: list[str]) -> None:
    from megatron_mm.data.prepare.index import prepare_index

    summary = prepare_index(
        known.path,
        tokenizer=known.tokenizer,
        template=known.chat_template,
        caption_prompt=known.caption_prompt,
        workers=known.workers,
    )
    print(summary)


def _prepare_tokenizer(known: argparse.Namespace, rest: list[str]) -> None:
    from megatron_mm.data.prepare.index import prepare_tokenizer

    print(prepare_tokenizer(known.path, out=known.out or known.path / "tokenizer.model", vocab_size=known.vocab_size))


def _convert_to_hf(known: argparse.Namespace, rest: list[str]) -> None:
    from megatron_mm.conversion.to_hf import convert_to_hf

    made = convert_to_hf(
        known.checkpoint,
        known.out,
        part=known.part,
        architecture=known.architecture,
        dtype=known.dtype,
        vocab_rows=known.vocab_size,
        shard_size=known.shard_size,
        threads=known.threads,
    )
    print(f"{made.path}: {made.num_parameters:,} parameters in {made.num_tensors} tensors, {made.num_shards} files")


def _convert_from_hf(known: argparse.Namespace, rest: list[str]) -> None:
    if known.out is None or known.recipe is None or known.help:
        print("usage: megatron-mm convert from-hf OUT --recipe RECIPE [--whole DIR] [--language DIR] [--vision DIR]")
        print("                                       [--threads N] [--group.field VALUE ...]\n")
        print("DIR is a Hugging Face directory or a file of weights. What no source gives gets its initial weights.")
        print("--language reads Llama, Vicuna, Mistral, Zephyr and InternLM2; --vision CLIP towers of transformers and open_clip,")
        print("and EVA-CLIP; --whole what `convert to-hf` has written, and released InfiMM and Mono-InternVL.")
        print("With a recipe, --help lists every field.\n")
        if not known.help:
            raise ValueError("no directory to write or no recipe given")
        if known.recipe is None:
            return
    from megatron_mm.cli.options import parse_model_arguments
    from megatron_mm.conversion.from_hf import convert_from_hf
    from megatron_mm.families.recipes import get_recipe

    arguments = [*rest, *(["--help"] if known.help else [])]
    experiment = parse_model_arguments(get_recipe(known.recipe), arguments, program="megatron-mm convert from-hf OUT --recipe RECIPE")
    made = convert_from_hf(experiment, known.out, whole=known.whole, language=known.language, vision=known.vision, threads=known.threads)
    print(made.checkpoint)
    for what, count in made.sources.items():
        print(f"  {count:16,} parameters read: {what}")
    for what, count in made.drawn.items():
        print(f"  {count:16,} parameters drawn: {what}")
    command = ["train", known.recipe, "--run-dir", "RUN_DIR", "--data.path", "DATA", "--init-from", str(known.out), *rest]
    print(f"begin with it: megatron-mm {shlex.join(command)}")


def _convert_inspect(known: argparse.Namespace, rest: list[str]) -> None:
    from megatron_mm.conversion.inspect import inspect

    lines = inspect(known.path, norms=not known.no_norms, unfold=known.unfold, threads=known.threads)
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:  # whoever read the lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _convert_upcycle(known: argparse.Namespace, rest: list[str]) -> None:
    if known.checkpoint is None or known.run_dir is None or known.recipe is None:
        print("usage: megatron-mm convert upcycle DENSE_CHECKPOINT RUN_DIR --recipe RECIPE [--group.field VALUE ...]\n")
        print("Under torchrun the options --parallel.* say how the sparse model is cut. `train RECIPE --run-dir RUN_DIR` goes on from it.")
        if not known.help:
            raise ValueError("upcycling needs a dense checkpoint, a run directory and --recipe")
        return
    from megatron_mm.cli.options import parse_model_arguments
    from megatron_mm.conversion.upcycle import upcycle
    from megatron_mm.families.recipes import get_recipe
    from megatron_mm.training.checkpoint import find_checkpoint

    arguments, program = (
        [*rest, *(["--help"] if known.help else [])],
        "megatron-mm convert upcycle DENSE_CHECKPOINT RUN_DIR --recipe RECIPE",
    )
    experiment = parse_model_arguments(get_recipe(known.recipe), arguments, program=program)
    made = upcycle(find_checkpoint(known.checkpoint), known.run_dir, experiment)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{made}: go on with megatron-mm train {known.recipe} --run-dir {known.run_dir}")


def _doctor(known: argparse.Namespace, rest: list[str]) -> None:
    from megatron_mm.run.doctor import report

    print(report())
