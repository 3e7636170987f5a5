"""Coverage, compile and mask times, forced tokens: `python -m benchmarks.grammar [--file FILE] [--tokenizer DIR]`.

No torch, one thread but for the rows that say otherwise. With a file of JSON lines (see `pando grammar check`) it
prints how many schemas are right in both modes; always the times and forced tokens of schemas of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pando
from pando.core.sampling import GrammarOptions, GrammarSpec
from pando.grammar.check import Checker, spread
from pando.grammar.guidance import GuidanceBackend
from pando.grammar.order import compact
from pando.grammar.vocabulary import Vocabulary
from pando.tokenizer.tokenizer import Tokenizer

Field = tuple[str, dict[str, Any], Any]

FIELDS: list[Field] = [
    ("invoice_number", {"type": "string"}, "A-20391"),
    ("issue_date", {"type": "string", "format": "date"}, "2026-03-14"),
    ("total_amount", {"type": "number"}, 1249.5),
    ("currency_code", {"enum": ["EUR", "USD", "GBP", "NOK"]}, "EUR"),
    ("is_paid", {"type": "boolean"}, True),
    ("customer_name", {"type": "string"}, "Ada Lind"),
    ("number_of_items", {"type": "integer"}, 3),
    ("shipping_method", {"enum": ["standard delivery", "express delivery", "pick up in store"]}, "express delivery"),
    ("customer_rating", {"type": "integer", "minimum": 1, "maximum": 5}, 4),
    ("needs_follow_up", {"type": "boolean"}, False),
]

LAYOUT = (
    r"Name: [A-Z][a-z]{2,12} [A-Z][a-z]{2,12}\nHouse: (Gryffindor|Slytherin|Ravenclaw|Hufflepuff)\n"
    r"Blood status: (Pure-blood|Half-blood|Muggle-born)\nOccupation: (student|teacher|auror|ministry of magic)\n"
    r"Wand:\n  Wood: [a-z]{3,10}\n  Core: (phoenix feather|dragon heartstring|unicorn hair)\n"
    r"  Length: [0-9]{1,2}\.[0-9]\n"
    r"Alive: (yes|no)\n"
)
LAYOUT_TEXT = (
    "Name: Luna Lovegood\nHouse: Ravenclaw\nBlood status: Pure-blood\nOccupation: student\nWand:\n  Wood: willow\n"
    "  Core: unicorn hair\n  Length: 10.5\nAlive: yes\n"
)


def extraction(number: int) -> tuple[GrammarSpec, str]:
    """The `number`th closed schema, all of its fields required, and a document of it."""
    chosen = [FIELDS[(number + 3 * i) % len(FIELDS)] for i in range(5 + number % 4)]
    fields = {name: schema for name, schema, _ in chosen}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    if number % 3 == 0:
        schema = {"type": "array", "minItems": 2, "maxItems": 2, "items": schema}
    document: Any = {name: value for name, _, value in chosen}
    document = [document, document] if number % 3 == 0 else document
    return GrammarSpec("json_schema", json.dumps(schema), GrammarOptions(strict=True)), compact(document)


def steps(backend: GuidanceBackend, spec: GrammarSpec, text: str) -> tuple[int, int]:
    """(tokens, model steps) of a text: forced tokens ride in the step of the token before them."""
    state, tokens = backend.compile(spec).new_state(), backend.vocabulary.encode(text)
    at = taken = 0
    while at < len(tokens):
        run = state.forced_tokens(64)
        assert run == tokens[at : at + len(run)], "forced tokens are the tokenizer's own"
        at += len(run)
        count = state.accept(run)
        assert count == len(run)
        if at < len(tokens):
            assert state.accept([tokens[at]]) == 1, text
            at, taken = at + 1, taken + 1
    assert state.is_accepting()
    return len(tokens), max(1, taken)


def batches(backend: GuidanceBackend, rounds: int) -> Iterator[str]:
    """Times of masks for many states at once, half-way through documents of different schemas."""
    for num_states in (16, 64):
        for threads in (1, 2):
            threaded = GuidanceBackend(backend.vocabulary, num_threads=threads)
            grammars = [threaded.compile(extraction(number)[0]) for number in range(20)]
            states = [grammars[i % 20].new_state() for i in range(num_states)]
            masks = threaded.allocate_masks(num_states)
            texts = [backend.vocabulary.encode(extraction(i % 20)[1]) for i in range(num_states)]
            spent = []
            for round_ in range(rounds):
                for state, tokens in zip(states, texts, strict=True):
                    if round_ < len(tokens):
                        state.accept([tokens[round_]])
                began = time.perf_counter()
                threaded.fill_batch([(state, row) for row, state in enumerate(states)], masks)
                spent.append((time.perf_counter() - began) * 1e6)
            times = spread(spent)
            label = f"masks of {num_states} states, {threads} threads"
            yield f"{label}: p50 {times['p50']:.0f} us, p99 {times['p99']:.0f} us"


def coverage(backend: GuidanceBackend, file: Path) -> Iterator[str]:
    """The summary of `pando grammar check`, in both modes."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    for strict in (False, True):
        checker = Checker(backend, GrammarOptions(strict=strict))
        for line in lines:
            checker.check_line(line)
        yield f"--- {file.name}, {'strict' if strict else 'default'}"
        yield from checker.summary.lines()
        tally = checker.summary.tally
        yield f"tokens per step, forced only: {tally.tokens / max(1, tally.tokens - tally.forced_tokens):.2f}"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, help="schemas and documents, JSON lines")
    parser.add_argument("--tokenizer", type=Path, default=Path(pando.__file__).parent / "models_builtin" / "aspen")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of batch fills")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    end = tokenizer.eos_token_id
    assert end is not None, "the tokenizer names no end of sequence"
    vocabulary = Vocabulary.of(tokenizer, [end])
    began = time.thread_time()
    backend = GuidanceBackend(vocabulary)
    gc.freeze()
    print(f"vocabulary of {vocabulary.num_tokens}: read in {time.thread_time() - began:.2f} s")
    totals = [steps(backend, *extraction(number)) for number in range(20)]
    tokens, taken = (sum(column) for column in zip(*totals, strict=True))
    print(f"closed extraction, 20 schemas: {tokens} tokens in {taken} steps: {tokens / taken:.2f} tokens per step")
    tokens, taken = steps(backend, GrammarSpec("regex", LAYOUT), LAYOUT_TEXT)
    print(f"fixed layout: {tokens} tokens in {taken} steps: {tokens / taken:.2f} tokens per step")
    for line in batches(backend, args.rounds):
        print(line)
    for line in coverage(backend, args.file) if args.file else ():
        print(line, flush=True)


if __name__ == "__main__":
    main()
