"""`pando serve [MODEL]`: the API server with its web page."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace

from pando import env
from pando.cli.flags import add_config_flags, config_from

SUMMARY = "serve a model: web page and API"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="built-in name, folder or hub id (default aspen)")
    add_config_flags(parser)
    parser.set_defaults(run=run, prog=parser.prog)


def run(args: argparse.Namespace) -> int:
    """Serve until ctrl-C or SIGTERM; returns the exit code."""
    config = config_from(args, args.model)
    key = env.read("PANDO_API_KEY")
    if key is not None and not config.api_key:
        config = replace(config, api_key=(key,))
    from pando.engine_process import spawn_engine

    # The engine first: it imports torch while this process imports the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    spawned = spawn_engine(config)
    # Signals wait until the server handles them: raised in the middle of an import, an interrupt can get lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        from pando.server.launch import run_server

        return run_server(config, spawned=spawned)
    except BaseException:
        spawned.stop()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
