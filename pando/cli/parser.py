"""The argument parser of `pando`: subcommands, and errors that name the flag one probably meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from typing import NoReturn

from pando.cli import bench, chat, flags, generate, grammar, plan, serve, simulate, system

COMMANDS = {
    "serve": serve,
    "chat": chat,
    "generate": generate,
    "bench": bench,
    "plan": plan,
    "simulate": simulate,
    "grammar": grammar,
}
"""Commands with a module each, in the order of the help."""


class UsageError(Exception):
    """The command line can not be understood; `command` is the subcommand's name as typed, or empty."""

    def __init__(self, message: str, prog: str) -> None:
        super().__init__(message)
        self.prog = prog


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that raises UsageError in place of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(message, self.prog)


def build_parser() -> Parser:
    """The whole command line. Imports nothing heavy: `pando --help` is quick."""
    parser = Parser(
        prog="pando",
        description="Serve large language models; requests that share a prefix share its computation.",
        epilog="Start with:  pando serve     (the built-in model, a web page and the API on port 30000)",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", parser_class=Parser)
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False)
        module.configure(sub)
    system.configure(commands)
    return parser


def subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and all parsers below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from subparsers(sub)


def parse(argv: list[str]) -> argparse.Namespace:
    """Namespace with `run`, the function of the chosen command. Raises UsageError, with the remedy in its text."""
    parser = build_parser()
    if argv and not argv[0].startswith("-"):
        _check_command(parser, argv[0])
    args, extra = parser.parse_known_args(argv)
    chosen = next(sub for sub in subparsers(parser) if sub.prog == getattr(args, "prog", parser.prog))
    if extra:
        raise UsageError(explain(extra, chosen), chosen.prog)
    return args


def _check_command(parser: Parser, name: str) -> None:
    """Raise UsageError, with the nearest command, if `name` is none."""
    commands = [sub.prog.split(" ")[1] for sub in subparsers(parser) if sub.prog.count(" ") == 1]
    if name not in commands:
        near = difflib.get_close_matches(name, commands, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
        raise UsageError(f"unknown command {name}; {hint}", parser.prog)


def explain(extra: list[str], parser: argparse.ArgumentParser) -> str:
    """What to say about arguments that `parser` does not know."""
    unknown = next((word for word in extra if word.startswith("-")), None)
    if unknown is None:
        return f"unexpected argument {extra[0]!r}"
    name = unknown.split("=")[0]
    if name in flags.NOT_HERE:
        return f"{name} has no counterpart: {flags.NOT_HERE[name]}; leave it out"
    known = [word for word in parser._option_string_actions if word.startswith("--")]
    near = difflib.get_close_matches(name.replace("_", "-"), known, 1)
    return f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "")
