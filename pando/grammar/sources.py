"""Small sources in the words of the default backend: choices, EBNF, white space of JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llguidance.gbnf_to_lark import any_to_lark

from pando.grammar.limits import Limits, refuse

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

WHITESPACE: dict[str, JsonCompileOptions] = {
    "compact": {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"},
    "spaced": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "bounded": {"whitespace_pattern": "[ \\n]{1,2}", "item_separator": ",", "key_separator": ":"},
    "flexible": {"whitespace_flexible": True, "item_separator": ",", "key_separator": ":"},
}
"""Options of the JSON compiler by `GrammarOptions.whitespace`."""


def choice_lark(source: str, limits: Limits) -> str:
    """A grammar of exactly the texts in a JSON list. Raises InvalidGrammar."""
    try:
        texts = json.loads(source)
    except ValueError as error:
        raise refuse("", f"the source is not JSON: {error}", "choice") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise refuse("#", "give a list of at least one text", "choice")
    if len(texts) > limits.choices:
        raise refuse("#", f"{len(texts)} texts; the limit is {limits.choices}", "choice")
    return "start: " + " | ".join(literal(text) for text in dict.fromkeys(texts)) + "\n"


def literal(text: str) -> str:
    """A text as a literal of the Lark dialect."""
    return json.dumps(text, ensure_ascii=False) if text else '""'


def ebnf_to_lark(source: str) -> str:
    """Lark from GBNF-style rules (`root ::= ...`); Lark itself passes unchanged. Raises InvalidGrammar."""
    try:
        text: str = any_to_lark(source)
    except Exception as error:  # the converter raises plain exceptions about its input
        raise refuse("", f"the rules can not be read: {error}", "ebnf") from None
    return text
