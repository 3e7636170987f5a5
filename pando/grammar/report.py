"""What a reply says about a grammar that could not hold its output to everything that the source asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pando.core.messages import Finish
from pando.core.sampling import GrammarSpec

VERIFIED, VIOLATION, UNVERIFIED = "schema_verified", "schema_violation", "schema_unverified"


@dataclass(frozen=True, slots=True)
class Report:
    """The text was checked after its end. kind: one of the names above; message: why, None if it is verified."""

    kind: str
    message: str | None
    relaxed: tuple[tuple[str, str], ...]

    def fields(self, param: str) -> dict[str, Any]:
        """Fields of a reply: `finish_details` and `warnings`. param: the field of the request that it is about."""
        return {
            "finish_details": {"type": self.kind, "message": self.message},
            "warnings": [
                {"code": "schema_relaxed", "param": param, "pointer": pointer, "message": message}
                for pointer, message in self.relaxed
            ],
        }


def report_of(grammar: GrammarSpec | None, finish: Finish | None, text: str) -> Report | None:
    """The report on a sequence that ended; None if its grammar is exact, or it has none."""
    if grammar is None or finish is None or not finish.relaxed:
        return None
    if finish.kind != "stop":
        return Report(UNVERIFIED, "the text did not come to its end", finish.relaxed)
    from pando.grammar.verify import check_text  # brings a library that few requests need

    kind, message = check_text(grammar, text)
    return Report({None: UNVERIFIED, True: VERIFIED, False: VIOLATION}[kind], message, finish.relaxed)


def may_be_relaxed(grammar: GrammarSpec | None) -> bool:
    """True if a report on this grammar is possible at all."""
    return grammar is not None and grammar.kind in ("json_schema", "structural_tag") and not grammar.options.strict
