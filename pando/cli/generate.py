"""`pando generate [MODEL] PROMPT`: one answer on standard output."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing

from pando.cli.endpoint import Endpoint, Usage
from pando.cli.flags import SERVER_FIELDS, add_config_flags, config_from
from pando.errors import ConfigError

SUMMARY = "answer one prompt (an argument or standard input)"

SAMPLING: tuple[tuple[str, str, type, str], ...] = (
    ("--max-new-tokens", "max_new_tokens", int, "longest answer in tokens"),
    ("--temperature", "temperature", float, "0 is greedy"),
    ("--top-p", "top_p", float, "smallest set of tokens with this probability"),
    ("--top-k", "top_k", int, "this many most likely tokens"),
    ("--min-p", "min_p", float, "tokens at least this likely relative to the best"),
    ("--sampling-seed", "sampling_seed", int, "seed of this answer"),
)
"""Flag, native name, type and help of the sampling options."""


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add --url, --api-key and the sampling options; only given ones appear in the namespace."""
    parser.add_argument("--url", help="talk to this server instead of loading a model")
    parser.add_argument("--api-key", dest="key", metavar="KEY", help="key for --url (default: $PANDO_API_KEY)")
    group = parser.add_argument_group("sampling")
    for flag, name, kind, text in SAMPLING:
        metavar = "N" if kind is int else "X"
        group.add_argument(flag, dest=name, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS)


def sampling_options(args: argparse.Namespace) -> dict[str, object]:
    """The sampling parameters that were given, by native name."""
    return {name: vars(args)[name] for _, name, _, _ in SAMPLING if name in vars(args)}


def open_endpoint(args: argparse.Namespace, model: str | None) -> Endpoint:
    """The server at --url (or $PANDO_URL when no model is named), else an engine in this process."""
    from pando import env
    from pando.cli.endpoint import HttpEndpoint

    named = model is not None or "model_path" in vars(args)
    if args.url and named:
        raise ConfigError("give a model or --url, not both", param="url")
    url = args.url or (None if named else env.read("PANDO_URL"))
    if url:
        return HttpEndpoint(url, args.key or env.read("PANDO_API_KEY"))
    from pando.cli.local import LocalEndpoint

    return LocalEndpoint(config_from(args, model))


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("words", nargs="*", metavar="[MODEL] PROMPT", help="prompt; `-` or nothing reads stdin")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--stats", action="store_true", help="print token counts on standard error afterwards")
    add_request_flags(parser)
    add_config_flags(parser, skip=SERVER_FIELDS)
    parser.set_defaults(run=run, prog=parser.prog)


def split_words(words: list[str]) -> tuple[str | None, str]:
    """(model or None, prompt) from the positional arguments; reads standard input for `-` or no prompt."""
    if len(words) > 2:
        raise ConfigError(f"{len(words)} arguments; put the prompt in quotes", param="prompt")
    model = words[0] if len(words) == 2 else None
    prompt = words[-1] if words else "-"
    if prompt != "-":
        return model, prompt
    if sys.stdin.isatty():
        raise ConfigError('no prompt; give one, as in  pando generate "2 + 2 ="', param="prompt")
    return model, sys.stdin.read()


def run(args: argparse.Namespace) -> int:
    """Print the answer as it comes; returns the exit code."""
    model, prompt = split_words(args.words)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": prompt})
    with closing(open_endpoint(args, model)) as endpoint:
        options = sampling_options(args)
        pieces = endpoint.complete(prompt, options) if args.raw else endpoint.chat(messages, options)
        for piece in pieces:
            if not isinstance(piece, Usage):
                print(piece, end="", flush=True)
                continue
            print(flush=True)
            if args.stats:
                print(
                    f"{piece.prompt_tokens} prompt tokens ({piece.cached_tokens} cached), "
                    f"{piece.completion_tokens} new, {piece.finish_reason}",
                    file=sys.stderr,
                )
    return 0
