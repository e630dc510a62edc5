"""Commands of the program: their arguments, their help, and the experiment whose fields they override.

The help of every command has the same form: usage, description, arguments, options. A command that works on an experiment also lists every
field of that experiment as an option, with its value, once the arguments say which experiment it is.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_mm.cli.advice import advice
from megatron_mm.cli.overrides import ABSENT, Override, apply_overrides, overrides_of
from megatron_mm.cli.values import placeholder, written
from megatron_mm.config import Experiment
from megatron_mm.config.checks import nearest


class Parser(argparse.ArgumentParser):
    """argparse's parser, but it raises a one-line ValueError, and it remembers the names of its options."""

    def __init__(self, *, prog: str, description: str = "", epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.option_names: list[str] = []
        self.needed: list[str] = []
        """Required arguments, as they are written in the usage line."""
        self.add_argument("-h", "--help", action="store_true", help="show this help")

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As in argparse, but also remembers the option's names."""
        action = super().add_argument(*names, **settings)
        self.option_names += action.option_strings
        if action.required:
            self.needed.append(" ".join([*action.option_strings, str(action.metavar)]))
        return action

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("the following arguments are required:", "missing")
        raise ValueError(message if message.endswith("?") else f"{message}: see {self.prog} --help")


@dataclass(frozen=True)
class Command:
    """A command of the program."""

    help: str
    """What it does, in one line."""
    run: Callable[[argparse.Namespace], None]
    """Runs the command. The namespace has an attribute for each argument. For a command with an `experiment`, it also has `experiment`,
    with the overrides of the command line applied, and `overrides`, the words of these as written. If the command has a recipe, `after`
    is the option right before it that is not one of the command's own, or None."""
    arguments: Callable[[Parser], None] = lambda parser: None
    """Adds its arguments and options to a parser."""
    experiment: Callable[[argparse.Namespace], Experiment | None] | None = None
    """Finds the experiment whose fields are also options, from the command's own arguments. It is called for `--help` as well, so it
    imports little. Returns None if the arguments name no experiment."""
    notes: Callable[[], str] = lambda: ""
    """Text below the options in its help."""


@dataclass(frozen=True)
class Group:
    """Commands under a common name: `megatron-mm prepare demo`."""

    help: str
    commands: Mapping[str, Command | Group]


def one_of(allowed: Sequence[str]) -> dict[str, Any]:
    """Settings of an argument that must be one of these words."""

    def check(word: str) -> str:
        if word not in allowed:
            raise argparse.ArgumentTypeError(f"unknown {word!r}: {choices(word, allowed)}")
        return word

    return {"type": check, "metavar": "{" + ",".join(allowed) + "}"}


def integer(word: str) -> int:
    """The type of an argument that is an integer."""
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not an integer") from None


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is an integer of at least this size."""

    def check(word: str) -> int:
        number = integer(word)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too small: give {least} or more")
        return number

    return check


def choices(word: str, known: Iterable[str]) -> str:
    """`choose one of A, B, C`, preceded by a suggestion if a name is close."""
    meant = nearest(word, known).removeprefix(": ")
    return f"{f'{meant} ' if meant else ''}choose one of {', '.join(known)}"


def run(group: Group, arguments: Sequence[str], *, program: str) -> None:
    """Find the command that the first words name, and run it or print its help. Raises ValueError for a user's mistake."""
    if not arguments or arguments[0] in ("-h", "--help"):
        show(_group_help(group, program))
        if not arguments:
            raise ValueError(f"no command given: choose one of {', '.join(group.commands)}")
        return
    word, *rest = arguments
    if word not in group.commands:
        raise ValueError(f"unknown command {word!r}: {choices(word, group.commands)}")
    found = group.commands[word]
    if isinstance(found, Group):
        run(found, rest, program=f"{program} {word}")
    else:
        _run_command(found, rest, program=f"{program} {word}")


def show(text: str) -> None:
    """Print, and go on even if the reader closes the pipe before the end, as in `| head -3`. A plain print ends the program then, quietly:
    this is for output after which there is more to do."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        reader_left()


def reader_left() -> bool:
    """Return whether the reader of standard output has closed the pipe. If so, further output is discarded."""
    output = sys.stdout.fileno()
    state = select.poll()
    state.register(output, 0)  # errors are always reported
    if not state.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _group_help(group: Group, program: str) -> str:
    width = max(map(len, group.commands)) + 2
    lines = [f"  {name:{width}}{command.help}" for name, command in group.commands.items()]
    about = f"`{program} COMMAND --help` describes a command."
    return "\n".join([f"usage: {program} COMMAND ...", "", group.help, "", "commands:", *lines, "", about])


def _run_command(command: Command, arguments: Sequence[str], *, program: str) -> None:
    parser = Parser(prog=program, description=command.help, epilog=command.notes())
    command.arguments(parser)
    wants_help = any(word in ("-h", "--help") for word in arguments)
    words = [word for word in arguments if word not in ("-h", "--help")]
    try:
        given, rest = parser.parse_known_args(words)
        given.after = _option_before(getattr(given, "recipe", None), words, known=parser.option_names)
        experiment = command.experiment(given) if command.experiment is not None else None
    except ValueError:
        if not wants_help or words:
            raise
        experiment = None  # the command's own help needs no arguments
    if wants_help:
        _print_help(parser, command, experiment)
        return
    overrides: list[Override] = []
    if experiment is not None:
        overrides = overrides_of(experiment)
        _add_options(parser, overrides)
        given, unknown = parser.parse_known_args(_with_dashes(words))
        given.experiment, given.overrides = apply_overrides(experiment, overrides, vars(given)), rest
    else:
        given.experiment, given.overrides, unknown = None, [], rest
    if unknown:
        raise ValueError(_unknown(unknown[0], [*parser.option_names, *(option.name for option in overrides)], program))
    command.run(given)


def _option_before(recipe: str | None, words: Sequence[str], *, known: Sequence[str]) -> str | None:
    """The option right before the recipe, if it is not one of the command's own: fields are options only once the recipe is known, so the
    word may be meant as the value of one."""
    place = words.index(recipe) if recipe in words else 0
    before = words[place - 1] if place else ""
    return before if before.startswith("--") and "=" not in before and before not in known else None


def _print_help(parser: Parser, command: Command, experiment: Experiment | None) -> None:
    fields = ["[--GROUP.FIELD VALUE ...]"] if command.experiment is not None else []
    parser.usage = " ".join([parser.prog, *parser.needed, "[OPTION ...]", *fields])
    if experiment is not None:
        _add_help_groups(parser, overrides_of(experiment))
    show(parser.format_help())


def _with_dashes(words: Sequence[str]) -> list[str]:
    """Options may also be written with underscores, as fields are: --train.global_batch_size."""
    parts = [(word.partition("="), word.startswith("--")) for word in words]
    return [name.replace("_", "-") + equals + value if option else name + equals + value for (name, equals, value), option in parts]


def _unknown(word: str, known: Sequence[str], program: str) -> str:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {word!r}: see {program} --help"
    return f"unknown option {name}: {advice(name.replace('_', '-'), known) or f'see {program} --help'}"


def _add_options(parser: Parser, overrides: Sequence[Override]) -> None:
    """Add the fields' options to a parser; it stores the words that follow an option under the option's name."""
    for option in overrides:
        if option.name in parser.option_names:
            continue
        parser.add_argument(*option.names, dest=option.name, nargs="*", default=argparse.SUPPRESS)
        if option.negative is not None:
            parser.add_argument(option.negative, dest=option.name, action="store_const", const=["False"], default=argparse.SUPPRESS)


def _add_help_groups(parser: Parser, overrides: Sequence[Override]) -> None:
    """Add the fields' options, with their values, to a parser's help, with one group per part."""
    groups: dict[tuple[str, ...], argparse._ArgumentGroup] = {}
    for option in overrides:
        if option.key is not None or option.name in parser.option_names:
            continue
        part = option.path[:-1]
        if part not in groups:
            groups[part] = parser.add_argument_group(".".join(part) or "experiment", option.group_text.replace("%", "%%"))
        default = "not in this recipe" if option.value is ABSENT else f"default: {written(option.value)}"
        text = f"{option.text} ({default})".strip().replace("%", "%%")
        if option.negative is not None and placeholder(option.hint) == "":
            groups[part].add_argument(option.name, option.negative, help=text, action="store_true")
        else:
            groups[part].add_argument(option.name, help=text, metavar=placeholder(option.hint))
