"""Sampling parameters: names, defaults and range checks of the public API, in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from pando.core.patterns import may_explode
from pando.errors import InvalidRequest

GREEDY_TEMPERATURE = 1e-6
"""Temperatures below this are greedy decoding."""

MAX_PATTERNS, MAX_PATTERN, MAX_GROUPS = 16, 1024, 100
"""Stop regexes of a request, and characters and groups of each, at most: they are searched for after every token."""

GRAMMAR_KINDS = ("json_schema", "regex", "ebnf", "structural_tag")
"""Kinds that a native request may name as sampling parameters of their own."""

GrammarKind = Literal["json_schema", "json_object", "regex", "ebnf", "lark", "structural_tag", "choice"]


class GrammarOptions(msgspec.Struct, frozen=True):
    """How a grammar's source is read.

    strict: refuse a JSON schema that can not be enforced exactly; else it may be widened, with the reply checked and
    flagged. whitespace: between the parts of a JSON document: none, one space after `,` and `:`, at most two letters
    at each place, or any amount.
    """

    strict: bool = False
    whitespace: Literal["compact", "spaced", "bounded", "flexible"] = "compact"


AS_SERVED = GrammarOptions(whitespace="spaced")
"""How requests' grammars are read: spaces stand where models learned them; what is widened is checked and flagged."""

STRICTLY = GrammarOptions(strict=True, whitespace="spaced")
"""The same for requests that say `strict`: what can not be enforced exactly is refused."""


class ReasoningSpec(msgspec.Struct, frozen=True):
    """The text that may come before the part that a grammar holds: a model's reasoning.

    start: where the output begins: with the grammar, inside the reasoning, or with either as the model likes. begin,
    end: token ids of the markers around the reasoning. committed: after so many tokens of the end marker the rest of it
    must follow; 0 = never.
    """

    start: Literal["now", "inside", "optional"]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    committed: int = 0


class GrammarSpec(msgspec.Struct, frozen=True):
    """What the output must match: one kind, its source text (JSON for the JSON kinds and `choice`) and options.

    after: what may come before, None = nothing. It is no part of what is compiled.
    """

    kind: GrammarKind
    source: str = ""
    options: GrammarOptions = GrammarOptions()
    after: ReasoningSpec | None = None


class LogprobSpec(msgspec.Struct, frozen=True):
    """Which log-probabilities to return.

    start: first prompt position whose logprob is wanted; -1 = generated tokens only.
    top: number of most likely alternatives per position. token_ids: fixed tokens reported at every position.
    """

    start: int = -1
    top: int = 0
    token_ids: list[int] = []


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when generation ends. Raises InvalidRequest on a value out of range."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    n: int = 1
    stop: list[str] = []
    stop_token_ids: list[int] = []
    stop_regex: list[str] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[int, float] = {}
    sampling_seed: int | None = None
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        for field, low, high in _RANGES:
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise InvalidRequest(f"{field} is {value}; give a value in [{low}, {high}]", param=field)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p is {self.top_p}; give a value in (0, 1]", param="top_p")
        if not 0.0 < self.repetition_penalty <= 2.0:
            raise InvalidRequest(
                f"repetition_penalty is {self.repetition_penalty}; give a value in (0, 2]", param="repetition_penalty"
            )
        if self.top_k == 0 or self.top_k < -1:
            raise InvalidRequest(f"top_k is {self.top_k}; give -1 (off) or a positive number", param="top_k")
        if self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequest(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}",
                param="min_new_tokens",
            )
        for token, bias in self.logit_bias.items():
            if not bias < float("inf"):
                raise InvalidRequest(f"logit_bias of token {token} is {bias}; give a number", param="logit_bias")
        if any(text == "" for text in self.stop):
            raise InvalidRequest("a stop string is empty; remove it", param="stop")
        if len(self.stop_regex) > MAX_PATTERNS:
            raise InvalidRequest(
                f"stop_regex has {len(self.stop_regex)} patterns; give at most {MAX_PATTERNS}", param="stop_regex"
            )
        for pattern in self.stop_regex:
            if len(pattern) > MAX_PATTERN or pattern.count("(") > MAX_GROUPS:
                raise InvalidRequest(
                    f"stop_regex {pattern!r:.60} is too large; give at most {MAX_PATTERN} characters and {MAX_GROUPS} "
                    "groups",
                    param="stop_regex",
                )
            try:
                re.compile(pattern)
            except (re.error, OverflowError) as error:
                raise InvalidRequest(f"stop_regex {pattern!r} does not compile: {error}", param="stop_regex") from None
            if may_explode(pattern):
                raise InvalidRequest(
                    f"stop_regex {pattern!r} may take for ever to match: a repeat inside another, choices that begin "
                    "alike inside a repeat, or too many repeats that take the same letters; bound one of them, as in "
                    "{1,4}",
                    param="stop_regex",
                )

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is taken at every step."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def needs_text(self) -> bool:
        """True if ending the request depends on decoded text."""
        return bool(self.stop or self.stop_regex)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequest if a token id named here is not in the vocabulary."""
        for field in ("logit_bias", "stop_token_ids"):
            for token in getattr(self, field):
                if not 0 <= token < vocab_size:
                    raise InvalidRequest(
                        f"{field} names token {token}; the vocabulary has {vocab_size} entries", param=field
                    )


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_new_tokens", 0, 2**31),
    ("temperature", 0.0, 100.0),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("min_new_tokens", 0, 2**31),
    ("n", 1, 128),
    ("top_k", -1, 2**31 - 1),
    ("sampling_seed", -(2**63), 2**64 - 1),
)


def sampling_from_mapping(values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """Build SamplingParams from a native request body (`sampling_params`), absent values from `defaults`.

    Accepts a string where a list of strings is meant, string keys in `logit_bias`, and the four grammar fields.
    Raises InvalidRequest that names the field; unknown fields are refused with the list of known ones.
    """
    merged: dict[str, Any] = {**(defaults or {}), **{k: v for k, v in values.items() if v is not None}}
    grammars = {kind: merged.pop(kind) for kind in GRAMMAR_KINDS if kind in merged}
    if isinstance(merged.get("grammar"), Mapping) and set(merged["grammar"]) - {"kind", "source", "options"}:
        raise InvalidRequest("grammar takes kind, source and options, nothing else", param="grammar")
    if grammars and "grammar" in merged:
        raise InvalidRequest("grammar and its kinds exclude each other; give one", param="grammar")
    if len(grammars) > 1:
        raise InvalidRequest(f"{sorted(grammars)} exclude each other; give one", param=sorted(grammars)[1])
    for kind, source in grammars.items():
        if not isinstance(source, str | dict | bool) or kind in ("regex", "ebnf") and not isinstance(source, str):
            raise InvalidRequest(f"{kind} is {source!r:.60}; give a text", param=kind)
        text = source if isinstance(source, str) else msgspec.json.encode(source).decode()
        merged["grammar"] = GrammarSpec(kind, text, AS_SERVED)  # type: ignore[arg-type]
    for field in ("stop", "stop_regex"):
        if isinstance(merged.get(field), str):
            merged[field] = [merged[field]]
    unknown = sorted(set(merged) - set(SamplingParams.__struct_fields__))
    if unknown:
        known = sorted([*SamplingParams.__struct_fields__, *GRAMMAR_KINDS])
        raise InvalidRequest(f"unknown sampling parameter {unknown[0]!r}; known: {', '.join(known)}", param=unknown[0])
    try:
        return msgspec.convert(merged, SamplingParams, strict=False)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, InvalidRequest):  # raised by __post_init__ and wrapped on the way out
            raise error.__cause__ from None
        place = re.search(r"`\$\.(\w+)", str(error))
        raise InvalidRequest(f"sampling_params: {error}", param=place[1] if place else "sampling_params") from None
