"""`python -m pando.launch_server --model-path M --port 30000`: the same as `pando serve`, by the name people know."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pando.cli import main as pando


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pando serve` with these arguments; returns the exit code."""
    return pando(["serve", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
