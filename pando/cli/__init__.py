"""The `pando` command: `main` parses, runs one subcommand and turns errors into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pando.cli.parser import UsageError, build_parser, parse
from pando.errors import PandoError

__all__ = ["main"]

INTERRUPTED = 130
"""Exit code after ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (the command found a fault), 2 (user error), 130 (ctrl-C)."""
    try:
        args = parse(list(sys.argv[1:] if argv is None else argv))
        for note in getattr(args, "notes", []):
            print(f"pando: {note}", file=sys.stderr)
        if not hasattr(args, "run"):
            build_parser().print_help()
            return 0
        code: int = args.run(args)
        return code
    except UsageError as error:
        print(f"{error.prog}: {error}\n(run `{error.prog} --help` for the options)", file=sys.stderr)
        return 2
    except PandoError as error:
        print(f"pando: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npando: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) is gone. Keep the interpreter from complaining about it at exit.
        sys.stderr.close()
        return 0
