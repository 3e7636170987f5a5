"""`python -m pando.engine_main FD`: the engine process. Config on standard input, the socket as a file descriptor."""

from __future__ import annotations

import gc
import sys

from pando.imports import uncollected


def run(fd: int) -> int:
    """Import the engine and run it; returns the exit code."""
    with uncollected():
        from pando.engine import main
    gc.freeze()  # modules live as long as the process: no collection need look at them
    return main(fd)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1])))
