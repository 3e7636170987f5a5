"""Forward passes that forced tokens and drafts save: texts replayed through a guide, without a model.

    python -m benchmarks.grammar_passes [--file FILE] [--tokenizer DIR]

A pass takes the last token, what the grammar forces and what is guessed; what it yields is the right guesses and one
token. The prompt holds the schema, and for the extraction the values as a document would name them. `--file`: JSON
lines as `pando grammar check` reads them; their schemas are the prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pando
from benchmarks.grammar import LAYOUT, LAYOUT_TEXT, extraction
from pando.cache.key import TokenKey
from pando.core.sampling import GrammarSpec
from pando.errors import InvalidGrammar
from pando.grammar.check import subschema_check
from pando.grammar.guidance import GuidanceBackend
from pando.grammar.order import compact, in_schema_order
from pando.grammar.vocabulary import Vocabulary
from pando.scheduler.guide import Guide
from pando.scheduler.ngram import NgramDrafter
from pando.scheduler.results import FIRST_PRICE, MAX_PRICE, PRICE_PER_ROW
from pando.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Case:
    """A source, the text that shall come out and the prompt before it."""

    spec: GrammarSpec
    text: str
    prompt: str


@dataclass(slots=True)
class Passes:
    """Sums over texts."""

    tokens: int = 0
    passes: int = 0
    guessed: int = 0
    right: int = 0
    left_out: int = 0

    @property
    def ratio(self) -> float:
        """Tokens per forward pass."""
        return self.tokens / max(1, self.passes)

    def replay(self, guide: Guide, tokens: list[int], prompt: list[int], price: float) -> None:
        """One text. Left out if the grammar forces other tokens, as it does where a schema leaves the order open."""
        key, at, passes, guessed, right = TokenKey(prompt), 0, 0, 0, 0
        while at < len(tokens):
            forced = guide.take_forced(len(tokens) - at)
            if forced != tokens[at : at + len(forced)]:
                self.left_out += 1
                return
            key.extend(forced)
            at += len(forced)
            if at == len(tokens):
                break
            drafts = guide.draft(key, len(tokens) - at - 1, price)
            num = 0
            while num < len(drafts) and drafts[num] == tokens[at + num]:
                num += 1
            if drafts:
                guide.judge(num)
            for token in tokens[at : at + num + 1]:
                guide.accept(token)
            key.extend(tokens[at : at + num + 1])
            at, passes, guessed, right = at + num + 1, passes + 1, guessed + len(drafts), right + num
        self.tokens += len(tokens)
        self.passes += max(1, passes)
        self.guessed += guessed
        self.right += right


def extractions() -> list[Case]:
    """Twenty closed schemas of our own."""
    cases = []
    for spec, text in map(extraction, range(20)):
        document: Any = json.loads(text)
        fields = document[0] if isinstance(document, list) else document
        prompt = f"Schema: {spec.source}\nDocument: {' '.join(map(str, fields.values()))}\n"
        cases.append(Case(spec, text, prompt))
    return cases


def layout() -> list[Case]:
    """A character sheet with fixed lines, as a regular expression."""
    return [Case(GrammarSpec("regex", LAYOUT), LAYOUT_TEXT, "Describe Luna Lovegood.\n")]


def sample(backend: GuidanceBackend, file: Path) -> list[Case]:
    """The valid documents of a file of schemas, in the order that their schema gives them."""
    cases = []
    for line in filter(str.strip, file.read_text(encoding="utf-8").split("\n")):
        found = json.loads(line)
        spec = GrammarSpec("json_schema", json.dumps(found["schema"], ensure_ascii=False))
        try:
            schema = backend.compile(spec).schema
        except InvalidGrammar:
            continue
        fits = subschema_check(schema)
        for value in found.get("valid", []):
            cases.append(Case(spec, compact(in_schema_order(value, schema, schema, fits)), spec.source + "\n"))
    return cases


def measure(backend: GuidanceBackend, cases: list[Case], *, jump: bool, draft: bool, rows: int = 1) -> Passes:
    """Replay all cases as one of `rows` streams."""
    total, encode = Passes(), backend.vocabulary.encode
    price = min(MAX_PRICE, FIRST_PRICE + PRICE_PER_ROW * rows)
    compiled = {}
    for case in cases:
        key = backend.key(case.spec)
        if key not in compiled:
            compiled[key] = backend.compile(case.spec)
        guide = Guide(compiled[key].new_state(), jump=jump, drafter=NgramDrafter() if draft else None)
        try:
            total.replay(guide, encode(case.text), encode(case.prompt), price)
        except pando.errors.GrammarFailed:
            total.left_out += 1
    return total


def lines(backend: GuidanceBackend, file: Path | None) -> Iterator[str]:
    """The figures, each with its bound."""
    sets = [("closed extraction, 20 schemas", extractions(), (None, 3.0)), ("fixed layout", layout(), (2.8, None))]
    if file is not None:
        sets.append((file.name, sample(backend, file), (1.15, 1.9)))
    for name, cases, bounds in sets:
        for draft, bound in zip((False, True), bounds, strict=True):
            for rows in (1, 16) if draft else (1,):
                found = measure(backend, cases, jump=True, draft=draft, rows=rows)
                kind = f"forced and guessed, {rows} streams" if draft else "forced only"
                text = f"{name}, {kind}: {found.ratio:.2f} tokens a forward pass"
                if draft:
                    text += f", {found.guessed / max(1, found.passes):.1f} guesses each, {_share(found)} right"
                if found.left_out:
                    text += f", {found.left_out} of {len(cases)} texts left out"
                yield text + ("" if bound is None else f" (bound {bound})")


def _share(found: Passes) -> str:
    return f"{found.right / max(1, found.guessed):.0%}"


def load_backend(folder: Path | None) -> GuidanceBackend:
    """The default backend over a folder's tokenizer, or the built-in model's."""
    tokenizer = Tokenizer.load(folder or Path(pando.__file__).parent / "models_builtin" / "aspen")
    end = tokenizer.eos_token_id
    assert end is not None, "the tokenizer names no end of sequence"
    return GuidanceBackend(Vocabulary.of(tokenizer, [end]))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    for line in lines(load_backend(args.tokenizer), args.file):
        print(line, flush=True)


if __name__ == "__main__":
    main()
