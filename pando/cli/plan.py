"""`pando plan MODEL`: what fits in memory, before anything is loaded."""

from __future__ import annotations

import argparse

from pando.cli.flags import SERVER_FIELDS, add_config_flags, config_from

SUMMARY = "what a model needs and what fits in memory"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="built-in name, folder or hub id (default aspen)")
    add_config_flags(parser, skip=SERVER_FIELDS)
    parser.set_defaults(run=run, prog=parser.prog)


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns the exit code."""
    from pando.doctor import plan_lines

    for line in plan_lines(config_from(args, args.model)):
        print(line)
    return 0
