"""`pando grammar check FILE`: try schemas against documents, without a model."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pando.errors import ConfigError

SUMMARY = "try JSON schemas against documents, without a model"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True, parser_class=type(parser))
    check = actions.add_parser("check", help=SUMMARY, description=SUMMARY, allow_abbrev=False)
    check.add_argument("file", metavar="FILE", help='JSON lines {"id", "schema", "valid", "invalid"}; `-` reads stdin')
    check.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.json (default: the built-in model's)")
    check.add_argument("--strict", action="store_true", help="refuse schemas that can not be enforced exactly")
    check.set_defaults(run=run, prog=check.prog)


def run(args: argparse.Namespace) -> int:
    """Print one JSON object per line and a summary on standard error."""
    from pando.core.sampling import GrammarOptions
    from pando.grammar.check import Checker
    from pando.grammar.guidance import GuidanceBackend
    from pando.grammar.vocabulary import Vocabulary
    from pando.tokenizer.tokenizer import Tokenizer

    folder = Path(args.tokenizer) if args.tokenizer else Path(__file__).parent.parent / "models_builtin" / "aspen"
    tokenizer = Tokenizer.load(folder)
    end = tokenizer.eos_token_id
    vocabulary = Vocabulary.of(tokenizer, [end if end is not None else tokenizer.vocab_size - 1])
    gc.freeze()  # what is loaded stays: collecting it again and again would show in the times
    checker = Checker(GuidanceBackend(vocabulary), GrammarOptions(strict=args.strict))
    for line in _lines(args.file):
        print(json.dumps(checker.check_line(line), ensure_ascii=False), flush=True)
    print("\n".join(checker.summary.lines()), file=sys.stderr)
    return 0


def _lines(name: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises ConfigError that names the line."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name} can not be read: {error.strerror}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{name}, line {number} is not JSON: {error}") from None
            if not isinstance(value, dict) or "schema" not in value:
                raise ConfigError(f"{name}, line {number}: give an object with schema, valid and invalid")
            yield value
