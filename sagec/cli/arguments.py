"""The argument tree of all commands; `sagec completion` is written from it."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from sagec.cli import commands
from sagec.cli.failure import UsageError, unknown


class Parser(argparse.ArgumentParser):
    """An argument parser that fails in one line and says what was probably meant."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help says more)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        kind = action.metavar if isinstance(action.metavar, str) else action.dest
        raise argparse.ArgumentError(None, unknown(kind.lower(), str(value), list(action.choices)))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Python 3.11 makes an empty list of `--option=--`.
        if action.option_strings and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "'--' is no value")
        return super()._get_values(action, arg_strings)


class _Version(argparse.Action):
    """Print the version; it is looked up only here, for that takes a while."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"sagec {version('sagec')}")
        except PackageNotFoundError:
            print("sagec, not installed")
        parser.exit()


class _Wide(argparse.HelpFormatter):
    """Room for the names of commands and options on the line of their help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)
        self._action_max_length = 14  # argparse forgets that commands are indented


class _WideRaw(_Wide, argparse.RawDescriptionHelpFormatter):
    """The same, with examples as they are written."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; `.run` is the function that does it.

    Raises UsageError.
    """
    parser = tree()
    words, program = _cut(list(argv))
    args, rest = parser.parse_known_args(words)
    if rest:
        options = _options(parser if args.command is None else subparsers(parser)[args.command])
        word = next((word for word in rest if word.startswith("-")), rest[0])
        if word.startswith("-"):
            known = [option for option in options if option.startswith("--")]
            raise UsageError(unknown("option", word.partition("=")[0], known))
        raise UsageError(f"{word!r} is one argument too many for sagec {args.command}")
    if args.command is None:
        parser.print_help()
        parser.exit()
    if program:
        args.program = [*args.program, *program]
    return args


def _cut(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line, and behind its first `--` a program's, which argparse would look into."""
    if "--" not in argv or argv[0] not in commands.PROGRAM_BEHIND:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def tree() -> Parser:
    """The parser of `sagec`, with a parser for each command below it."""
    parser = Parser(
        prog="sagec",
        description="A compiler toolchain for serving graphs of large language models.",
        epilog="sagec COMMAND --help says more about each.",
        formatter_class=_Wide,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    below = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=Parser
    )
    for name, module in _commands():
        summary = module.__doc__.strip().partition("\n")[0]
        command = below.add_parser(
            name, help=summary, description=summary, epilog=module.EPILOG, allow_abbrev=False
        )
        command.formatter_class = _WideRaw
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _commands() -> Iterator[tuple[str, Any]]:
    """Modules of the commands, in the order that a reader wants to see them in."""
    found = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    first = [name for name in commands.ORDER if name in found]
    for name in [*first, *sorted(found.difference(first))]:
        yield name, importlib.import_module(f"{commands.__name__}.{name}")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]
