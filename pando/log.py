"""Log lines for people: time, level (when it is not plain information), message. Standard library only.

A module asks for its logger with `logging.getLogger(__name__)`; a process calls `setup` once.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")


class LineFormatter(logging.Formatter):
    """`12:30:05 message`, with the level's name in front of warnings and errors and the module's in debug lines."""

    def format(self, record: logging.LogRecord) -> str:
        """One line for the record; a traceback, if there is one, follows on its own lines."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        if record.levelno >= logging.WARNING:
            mark = f"{record.levelname.lower()}: "
        else:
            mark = f"{record.name}: " if record.levelno < logging.INFO else ""
        text = f"{clock} {mark}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def setup(level: str = "info", stream: TextIO | None = None) -> None:
    """Send the `pando` loggers to `stream` (stderr) at `level`, one of LEVELS. Calling it again replaces the first."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger("pando")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())
