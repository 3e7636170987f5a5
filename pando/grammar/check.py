"""Tries schemas against documents without a model: what `pando grammar check` prints for each line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pando.core.sampling import GrammarOptions, GrammarSpec
from pando.errors import InvalidGrammar
from pando.grammar.guidance import GuidanceBackend, GuidanceGrammar
from pando.grammar.masks import allows
from pando.grammar.order import Fits, compact, in_schema_order
from pando.grammar.schema_tree import Schema
from pando.grammar.verify import Verifier

FORCED_RUN = 64
"""Most forced tokens taken in one step."""


@dataclass
class Tally:
    """Counts and times of one or more walks. Times are CPU microseconds of single masks."""

    tokens: int = 0
    forced_tokens: int = 0
    mask_us: list[float] = field(default_factory=list)


@dataclass
class Summary:
    """Totals over lines."""

    schemas: int = 0
    compiled: int = 0
    flagged: int = 0
    right: int = 0
    valid: int = 0
    valid_accepted: int = 0
    invalid: int = 0
    invalid_accepted: int = 0
    compile_ms: list[float] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def add(self, result: dict[str, Any]) -> None:
        """Count one line's result (`check_line`)."""
        good, bad = result["valid_accepted"], result["invalid_accepted"]
        self.schemas += 1
        self.compiled += result["compiled"]
        self.flagged += result["flagged"]
        self.right += bool(result["compiled"] and all(good) and not any(bad))
        self.valid += len(good)
        self.valid_accepted += sum(good)
        self.invalid += len(bad)
        self.invalid_accepted += sum(bad)
        if result["compiled"]:
            self.compile_ms.append(result["compile_ms"])

    def lines(self) -> list[str]:
        """The summary for people."""
        share = 100 * self.right / max(1, self.schemas)
        times, masks = spread(self.compile_ms), spread(self.tally.mask_us)
        forced = 100 * self.tally.forced_tokens / max(1, self.tally.tokens)
        return [
            f"schemas {self.schemas}: {self.compiled} compiled, {self.flagged} flagged, {self.right} fully right "
            f"({share:.1f} %)",
            f"valid accepted {self.valid_accepted}/{self.valid}, invalid accepted "
            f"{self.invalid_accepted}/{self.invalid}",
            "compile ms: " + ", ".join(f"{name} {value:.1f}" for name, value in times.items()),
            "mask us: " + ", ".join(f"{name} {value:.1f}" for name, value in masks.items()),
            f"tokens {self.tally.tokens}, forced {self.tally.forced_tokens} ({forced:.1f} %)",
        ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """avg, p50, p99 and max (nearest rank), zeros without values."""
    if not values:
        return dict.fromkeys(("avg", "p50", "p99", "max"), 0.0)
    ranked = sorted(values)
    last = len(ranked) - 1
    return {
        "avg": round(sum(ranked) / len(ranked), 3),
        "p50": round(ranked[round(0.50 * last)], 3),
        "p99": round(ranked[round(0.99 * last)], 3),
        "max": round(ranked[-1], 3),
    }


def _refuses(value: Any) -> bool:
    """What accepts documents where no grammar was compiled."""
    return False


class Checker:
    """Checks lines `{"id", "schema", "valid", "invalid"}` with one backend."""

    def __init__(self, backend: GuidanceBackend, options: GrammarOptions) -> None:
        self._backend = backend
        self._options = options
        self._masks = backend.allocate_masks(1)
        self.summary = Summary()

    def check_line(self, line: dict[str, Any]) -> dict[str, Any]:
        """The result of one line; a schema that does not compile accepts nothing."""
        valid, invalid = list(line.get("valid", [])), list(line.get("invalid", []))
        tally, began = Tally(), time.thread_time()
        grammar, error = None, None
        spec = GrammarSpec("json_schema", json.dumps(line["schema"], ensure_ascii=False), self._options)
        try:
            grammar = self._backend.compile(spec)
        except InvalidGrammar as refused:
            error = refused.message
        spent = (time.thread_time() - began) * 1e3
        accepts = _refuses if grammar is None else self._acceptor(grammar, tally)
        result = {
            "id": line.get("id"),
            "compiled": grammar is not None,
            "error": error,
            "flagged": bool(grammar is not None and grammar.relaxed),
            "compile_ms": round(spent, 3),
            "valid_accepted": [accepts(value) for value in valid],
            "invalid_accepted": [accepts(value) for value in invalid],
            "tokens": tally.tokens,
            "forced_tokens": tally.forced_tokens,
            "mask_us": spread(tally.mask_us),
        }
        self.summary.add(result)
        self.summary.tally.tokens += tally.tokens
        self.summary.tally.forced_tokens += tally.forced_tokens
        self.summary.tally.mask_us += tally.mask_us
        return result

    def _acceptor(self, grammar: GuidanceGrammar, tally: Tally) -> Callable[[Any], bool]:
        fits = subschema_check(grammar.schema)

        def accepts(value: Any) -> bool:
            ordered = in_schema_order(value, grammar.schema, grammar.schema, fits)
            # Alternatives that overlap leave more than one order open: what fits as it is given fits, too.
            texts = dict.fromkeys((compact(ordered), compact(value)))
            for text, counts in zip(texts, (tally, Tally()), strict=False):
                if self._walk(grammar, text, counts):
                    return grammar.violation(text) is None
            return False

        return accepts

    def _walk(self, grammar: GuidanceGrammar, text: str, tally: Tally) -> bool:
        """Force a text through mask and `accept`, token by token; counts what a step would get as forced tokens."""
        state = grammar.new_state()
        tokens = self._backend.vocabulary.encode(text)
        forced_until = 0
        for at, token in enumerate(tokens):
            if at >= forced_until:
                forced = state.forced_tokens(FORCED_RUN)
                if forced and tokens[at : at + len(forced)] == forced:
                    forced_until = at + len(forced)
                    tally.forced_tokens += len(forced)
            began = time.thread_time_ns()
            state.fill(self._masks, 0)
            tally.mask_us.append((time.thread_time_ns() - began) / 1e3)
            if not allows(self._masks[0], token) or state.accept([token]) != 1:
                return False
            tally.tokens += 1
        return state.is_accepting()


def subschema_check(root: Schema) -> Fits:
    """Whether values fit subschemas of `root`; those that can not be checked alone fit."""
    known: dict[int, tuple[Schema, Verifier | None]] = {}
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root} if isinstance(root, dict) else {}

    def fits(schema: Schema, value: Any) -> bool:
        if not isinstance(schema, dict):
            return bool(schema)
        if id(schema) not in known:
            try:
                known[id(schema)] = schema, Verifier({**shared, **schema})
            except ValueError:
                known[id(schema)] = schema, None
        verifier = known[id(schema)][1]
        return verifier is None or verifier.is_valid(value)

    return fits
