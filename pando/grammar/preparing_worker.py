"""The process in which large sources are read; see `pando.grammar.preparing`. Frames on standard input and output."""

from __future__ import annotations

import os
import signal
import sys

import msgspec

from pando.errors import InvalidGrammar
from pando.grammar.guidance import Source
from pando.grammar.preparing import Job, PreparedSource, read_frame, write_frame

NICENESS = 5
"""Nobody waits for a grammar as somebody waits for the next token."""


def answer(job: Job) -> PreparedSource:
    """Read one source; what is wrong with it is an answer, too."""
    try:
        source = Source(job.spec, job.limits, job.markers, None)
    except InvalidGrammar as error:
        return PreparedSource(error=error.message, param=error.param)
    return PreparedSource(source.grammar, list(source.relaxed))


def main() -> None:
    """Serve jobs until standard input ends; an empty frame asks whether somebody is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides when to end
    os.nice(NICENESS)
    while (frame := read_frame(sys.stdin.fileno())) is not None:
        reply = b"" if not frame else msgspec.msgpack.encode(answer(msgspec.msgpack.decode(frame, type=Job)))
        write_frame(sys.stdout.fileno(), reply)


if __name__ == "__main__":
    main()
