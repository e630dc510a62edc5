"""The command line: `megatron-mm COMMAND` (or `python -m megatron_mm COMMAND`). `COMMANDS` lists all commands; each has a file of its own.

A user's mistake results in one line on standard error and exit code 2. Large packages are imported only by the commands that need them, so
that `--help` is fast.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from megatron_mm import __version__
from megatron_mm.cli.command import Group, reader_left, run
from megatron_mm.cli.convert import CONVERT
from megatron_mm.cli.doctor import DOCTOR
from megatron_mm.cli.eval import EVAL
from megatron_mm.cli.evaluate import EVALUATE
from megatron_mm.cli.plan import PLAN
from megatron_mm.cli.prepare import PREPARE
from megatron_mm.cli.report import REPORT
from megatron_mm.cli.train import TRAIN
from megatron_mm.cli.watch import WATCH
from megatron_mm.platform import engines
from megatron_mm.platform.files import file_error, is_full_disk

logger = logging.getLogger(__name__)

COMMANDS = Group(
    help="Pre-train multimodal language models with tensor, pipeline, expert and data parallelism.",
    commands={
        "train": TRAIN,
        "prepare": PREPARE,
        "convert": CONVERT,
        "eval": EVAL,
        "evaluate": EVALUATE,
        "watch": WATCH,
        "report": REPORT,
        "plan": PLAN,
        "doctor": DOCTOR,
    },
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; returns on success, exits with 2 on a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"megatron-mm {__version__}")
        return
    _configure_logging()
    try:
        if arguments[:1] != ["doctor"]:  # doctor reports this itself
            engines.check(engines.installed())
        run(COMMANDS, arguments, program="megatron-mm")
        _flush()
    except BrokenPipeError:
        if not reader_left():  # a lost connection
            raise
        os._exit(141)  # the code that a shell reports for a program whose output nobody reads any more
    except (ValueError, FileNotFoundError) as error:
        _fail(error)
    except OSError as error:
        if error.filename is None and not is_full_disk(error):  # a lost connection, for example
            raise
        places = [Path(word.rpartition("=")[2]) for word in arguments if not word.startswith("-") or "=" in word]
        _fail(error, places=places)  # a file that cannot be written: a full disk, somebody else's folder
    except (AssertionError, AttributeError, ImportError, NotImplementedError, TypeError) as error:
        _explain_by_engine(error)
        raise
    except KeyboardInterrupt:
        print("megatron-mm: interrupted: start the same command again to resume", file=sys.stderr, flush=True)
        os._exit(130)  # the code that a shell reports for Ctrl-C


def _flush() -> None:
    """Write what is left of the output. When nobody reads it any more, that is no mistake: all work is done."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        return
    reader_left()


def _explain_by_engine(error: Exception) -> None:
    """Exit with one line if megatron-core lacks something that is used here; otherwise, if this version is untested, add a note to the
    error."""
    version = engines.installed()
    named = (error.name or "").split(".")[0] if isinstance(error, ImportError) else ""
    if version is not None or named == "megatron":
        try:
            engines.check_parts(version)
        except ValueError as why:
            _fail(why)
    if remark := engines.remark(version):
        error.add_note(f"megatron-mm: {remark}")


def _fail(error: Exception, *, places: Iterable[Path] = ()) -> NoReturn:
    """Print a user's mistake once and exit.

    Usually all processes of a run find the same mistake. The others wait, so that the first one prints it and torchrun ends them. A mistake
    that only another process finds is still printed.

    Args:
        places: files and folders that the command may have been writing.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(3)
    said = file_error(error, places=places) if isinstance(error, OSError) else error
    print(f"megatron-mm: error: {f'[rank {rank}] ' if rank else ''}{said}", file=sys.stderr, flush=True)
    logger.debug("where the error came from", exc_info=error)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(2)  # not sys.exit: clean-up could wait for processes that never answer


class PrintableFormatter(logging.Formatter):
    """File names and texts come from data, so characters that a terminal would interpret are written as `?`."""

    def format(self, record: logging.LogRecord) -> str:
        return "".join(character if character.isprintable() or character in "\n\t" else "?" for character in super().format(record))


def _configure_logging() -> None:
    rank = int(os.environ.get("RANK", "0"))
    prefix = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("megatron_mm").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed|apex")
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)  # it warns of layers that are not its own
    warnings.filterwarnings("ignore", module=r"urllib3")
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex).*")
