"""The default backend: llguidance, an Earley parser over a lazily built lexer. No precomputation per grammar."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from pando.core.sampling import GrammarSpec
from pando.errors import InvalidGrammar
from pando.grammar.limits import Limits, check_regex, check_text, parse_schema, refuse
from pando.grammar.masks import Masks, full_row, row_of
from pando.grammar.preflight import Prepared, prepare
from pando.grammar.preparing import LARGE, PreparedSource, Preparer
from pando.grammar.protocols import BatchState, Issue
from pando.grammar.sources import WHITESPACE, choice_lark, ebnf_to_lark
from pando.grammar.structural import structural_lark
from pando.grammar.verify import Verifier
from pando.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_BYTES_PER_GRAMMAR = 64 * 1024
_BYTES_PER_SOURCE_BYTE = 32
"""A rough upper estimate of what a compiled grammar and its warmed lexer hold; llguidance does not say."""


class GuidanceBackend:
    """Compiles for one vocabulary. `num_threads` fill masks in parallel. apart: read large sources in other processes,
    so that the threads of this one go on meanwhile."""

    name = "llguidance"

    def __init__(
        self, vocabulary: Vocabulary, limits: Limits | None = None, num_threads: int = 1, *, apart: bool = False
    ) -> None:
        self.vocabulary = vocabulary
        self.limits = limits or Limits()
        self._preparer = Preparer(self.limits, vocabulary.markers) if apart else None
        self._tokenizer = make_tokenizer(vocabulary)
        self._executor = LLExecutor(num_threads) if num_threads > 1 else None
        self._end_row = row_of(vocabulary.eos_ids, vocabulary.vocab_size)

    def key(self, spec: GrammarSpec) -> str:
        """See GrammarBackend."""
        return spec_key(f"{self.name} {llguidance.__version__}", self.vocabulary, spec)

    def validate(self, spec: GrammarSpec) -> list[Issue]:
        """See GrammarBackend."""
        try:
            return list(Source(spec, self.limits, self.vocabulary.markers, None).relaxed)
        except InvalidGrammar as error:
            return [Issue("", error.message)]

    def compile(self, spec: GrammarSpec) -> GuidanceGrammar:
        """See GrammarBackend."""
        began = time.thread_time()
        if self._preparer is not None and len(spec.source) >= LARGE:
            source = Source.prepared(spec, self.limits, self._preparer.prepare(spec), self._tokenizer)
        else:
            source = Source(spec, self.limits, self.vocabulary.markers, self._tokenizer)
        assert source.matcher is not None, "a source without error has a matcher"
        self._warm(source.matcher, spec.kind)
        return GuidanceGrammar(self, source, self.key(spec), (time.thread_time() - began) * 1e3)

    def _warm(self, matcher: LLMatcher, kind: str) -> None:
        """Do the first mask's work here, in the compile's thread: copies share it, and the loop does not wait for it.

        Raises InvalidGrammar if that exceeds the limits.
        """
        row = np.empty_like(self._end_row)
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        matcher.compute_ff_tokens()
        if matcher.is_error():
            raise refuse("", _plain_words(str(matcher.get_error()))[:500], kind)

    def close(self) -> None:
        """End the processes that read sources, if there are any."""
        if self._preparer is not None:
            self._preparer.close()

    def allocate_masks(self, rows: int) -> Masks:
        """See GrammarBackend."""
        row = full_row(self.vocabulary.num_tokens, self.vocabulary.vocab_size)
        return np.repeat(row[None, :], rows, axis=0)

    def fill_batch(self, items: Sequence[tuple[BatchState, int]], masks: Masks) -> list[bool]:
        """See GrammarBackend."""
        if self._executor is None:
            return [state.fill(masks, row) for state, row in items]
        work: list[tuple[LLMatcher, int]] = []
        for state, row in items:
            matcher = state.begin_fill(masks, row)
            if isinstance(matcher, LLMatcher):
                work.append((matcher, row))
        if work:
            self._executor.unsafe_compute_mask_ptr(work, masks.ctypes.data, masks.shape[1] * 4, masks.shape[0])
        return [state.end_fill(masks, row) for state, row in items]

    def end_row(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The mask row of a text that is complete: end ids only."""
        return self._end_row


def spec_key(engine: str, vocabulary: Vocabulary, spec: GrammarSpec) -> str:
    """Identity of a compiled source. Keys of JSON objects are not sorted: their order is the order of the output."""
    options = f"{spec.options.strict} {spec.options.whitespace}"
    text = "\n".join((engine, vocabulary.key, spec.kind, options, spec.source))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class _Wrapped:
    """A tokenizer that llguidance has no reader for, called back for the tokens of a text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id = None
        self.special_token_ids = sorted({*vocabulary.special_ids, *vocabulary.markers.values()})
        self.tokens = [vocabulary.token_bytes(token) for token in range(vocabulary.num_tokens)]
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def make_tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    """llguidance's view of the vocabulary: its own reader of tokenizer.json where that works, else call-backs."""
    ends = list(vocabulary.eos_ids)
    slices = LLTokenizer.json_slices()
    try:
        return LLTokenizer(vocabulary.json, n_vocab=vocabulary.vocab_size, eos_token=ends, slices=slices)
    except (ValueError, RuntimeError):
        wrapped = TokenizerWrapper(_Wrapped(vocabulary))
        return LLTokenizer(wrapped, n_vocab=vocabulary.vocab_size, eos_token=ends, slices=slices)


class Source:
    """A spec turned into llguidance's terms and compiled; without a tokenizer it is only checked.

    Raises InvalidGrammar. relaxed: what is not enforced; matcher: at the start, None without a tokenizer.
    """

    def __init__(
        self, spec: GrammarSpec, limits: Limits, markers: Mapping[str, int] | None, tokenizer: LLTokenizer | None
    ) -> None:
        self._begin(spec, limits, tokenizer)
        self._markers = markers or {}
        check_text(spec.source, spec.kind, limits)
        _READERS[spec.kind](self)

    def _begin(self, spec: GrammarSpec, limits: Limits, tokenizer: LLTokenizer | None) -> None:
        self.matcher: LLMatcher | None = None
        self.grammar = ""
        """What was compiled last, in llguidance's own words."""
        self.relaxed: tuple[Issue, ...] = ()
        self.verifier: Verifier | None = None
        self.schema: Any = None
        """The JSON schema that was compiled, for the kinds that have one."""
        self.num_bytes = len(spec.source)
        self._spec = spec
        self._limits = limits
        self._tokenizer = tokenizer

    @classmethod
    def prepared(cls, spec: GrammarSpec, limits: Limits, found: PreparedSource, tokenizer: LLTokenizer) -> Source:
        """A source that was read elsewhere: only compiled here."""
        source = cls.__new__(cls)
        source._begin(spec, limits, tokenizer)
        source._must(found.grammar)
        source.relaxed = tuple(found.relaxed)
        if source.relaxed and spec.kind in ("json_schema", "json_object"):
            source.verifier = Verifier(json.loads(spec.source))
        return source

    def _json_schema(self) -> None:
        kind, options = self._spec.kind, self._spec.options
        schema = parse_schema(self._spec.source, kind, self._limits)
        form: JsonCompileOptions = {**WHITESPACE[options.whitespace], "lenient": False, "coerce_one_of": False}

        def grammar(part: Any) -> str:
            text: str = LLMatcher.grammar_from_json_schema(json.dumps(part), overrides=form)
            return text

        prepared: Prepared = prepare(
            schema,
            kind,
            options.strict,
            attempt=lambda part: self._try(grammar(part)),
            fault=lambda part: LLMatcher.validate_grammar(grammar(part)) or None,
        )
        self.schema, self.relaxed = prepared.schema, prepared.relaxed
        if prepared.relaxed:
            try:
                self.verifier = Verifier(schema)
            except ValueError as error:
                first = prepared.relaxed[0]
                raise refuse(first.pointer, f"{first.message}, nor checked afterwards: {error}", kind) from None

    def _json_object(self) -> None:
        form = WHITESPACE[self._spec.options.whitespace]
        self._must(LLMatcher.grammar_from_json_schema('{"type":"object"}', overrides=form))
        self.schema = {"type": "object"}

    def _regex(self) -> None:
        check_regex(self._spec.source, "", "regex", self._limits)
        self._must(LLMatcher.grammar_from_regex(self._spec.source))

    def _ebnf(self) -> None:
        self._must(LLMatcher.grammar_from_lark(ebnf_to_lark(self._spec.source)))

    def _lark(self) -> None:
        self._must(LLMatcher.grammar_from_lark(self._spec.source))

    def _choice(self) -> None:
        self._must(LLMatcher.grammar_from_lark(choice_lark(self._spec.source, self._limits)))

    def _structural_tag(self) -> None:
        def prepared(schema: Any, pointer: str) -> tuple[Any, tuple[Issue, ...]]:
            spec = GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False), self._spec.options)
            try:
                source = Source(spec, self._limits, None, None)
            except InvalidGrammar as error:
                raise refuse(pointer, error.message, self._spec.kind) from None
            return source.schema, source.relaxed

        text, self.relaxed = structural_lark(self._spec, self._limits, self._markers, prepared)
        self._must(LLMatcher.grammar_from_lark(text))

    def _must(self, grammar: str) -> None:
        reason = self._try(grammar)
        if reason is not None:
            raise refuse("", reason[:500], self._spec.kind)

    def _try(self, grammar: str) -> str | None:
        self.grammar = grammar
        bounds = parser_limits(self._limits)
        if self._tokenizer is None:
            return LLMatcher.validate_grammar(grammar, limits=bounds) or None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=bounds)
        if matcher.is_error():
            return _plain_words(str(matcher.get_error())) or "it can not be compiled"
        self.matcher = matcher
        return None


_READERS: dict[str, Callable[[Source], None]] = {
    "json_schema": Source._json_schema,
    "json_object": Source._json_object,
    "regex": Source._regex,
    "ebnf": Source._ebnf,
    "lark": Source._lark,
    "structural_tag": Source._structural_tag,
    "choice": Source._choice,
}


def _plain_words(reason: str) -> str:
    """The backend's message, where it is one that only its makers would understand in our words."""
    reason = reason.removesuffix("<non-verbose/>").rstrip()
    return "no text can match it" if reason == "NoExtensionBias" else reason


def parser_limits(limits: Limits) -> LLParserLimits:
    """The backend's own bounds."""
    return LLParserLimits(
        initial_lexer_fuel=limits.initial_lexer_fuel,
        step_lexer_fuel=limits.step_lexer_fuel,
        step_max_items=limits.step_items,
        max_items_in_row=limits.row_items,
        max_lexer_states=limits.lexer_states,
        max_grammar_size=limits.grammar_size,
        verbose_errors=False,  # schemas stay out of logs
    )


class GuidanceGrammar:
    """A compiled grammar; see CompiledGrammar."""

    def __init__(self, backend: GuidanceBackend, source: Source, key: str, compile_ms: float) -> None:
        self.key = key
        self.compile_ms = compile_ms
        self.relaxed = source.relaxed
        self.nbytes = _BYTES_PER_GRAMMAR + _BYTES_PER_SOURCE_BYTE * source.num_bytes
        self.schema = source.schema
        self._backend = backend
        self._verifier = source.verifier
        self._start = source.matcher

    def new_state(self) -> GuidanceState:
        """See CompiledGrammar."""
        assert self._start is not None, "compiled grammars have a tokenizer"
        return GuidanceState(self._backend, self._start.deep_copy())

    def violation(self, text: str) -> str | None:
        """See CompiledGrammar."""
        return None if self._verifier is None else self._verifier.violation(text)


class GuidanceState:
    """One sequence. The end id is kept here: the matcher stops before it and could not undo it."""

    def __init__(self, backend: GuidanceBackend, matcher: LLMatcher, ended: int = 0) -> None:
        self._backend = backend
        self._matcher = matcher
        self._ended = ended
        self._ends = frozenset(backend.vocabulary.eos_ids)

    def accept(self, tokens: Sequence[int]) -> int:
        """See GrammarState."""
        taken = 0
        while taken < len(tokens) and not self._ended:
            token = tokens[taken]
            if token in self._ends and self._matcher.is_accepting():
                self._ended = 1
            elif self._matcher.try_consume_tokens([token]) == 0:
                break
            taken += 1
        return taken

    def validate(self, tokens: Sequence[int]) -> int:
        """See GrammarState."""
        if self._ended:
            return 0
        end = next((index for index, token in enumerate(tokens) if token in self._ends), len(tokens))
        count: int = self._matcher.validate_tokens(list(tokens[:end]))
        if count < end or end == len(tokens):
            return count
        probe = self.fork()  # an end id: rare, and only the state after the tokens before it knows
        return probe.accept(tokens)

    def rollback(self, n: int) -> None:
        """See GrammarState."""
        undone = min(n, self._ended)
        self._ended -= undone
        if n > undone:
            ok = self._matcher.rollback(n - undone)
            assert ok, f"rollback of {n} tokens: {self._matcher.get_error()}"

    def forced_tokens(self, limit: int) -> list[int]:
        """See GrammarState."""
        if self._ended or limit <= 0:
            return []
        forced: list[int] = self._matcher.compute_ff_tokens()[:limit]
        # A text that spells a marker is written with the marker's token, which a text may not hold: cut before it.
        return forced[: self._matcher.validate_tokens(forced)] if forced else forced

    def fill(self, masks: Masks, row: int) -> bool:
        """See GrammarState."""
        matcher = self.begin_fill(masks, row)
        if matcher is not None:
            line = masks[row]
            matcher.unsafe_compute_mask_ptr(line.ctypes.data, line.nbytes)
        return self.end_fill(masks, row)

    def begin_fill(self, masks: Masks, row: int) -> LLMatcher | None:
        """See BatchFill."""
        if self._ended or self._matcher.is_error():
            masks[row] = self._backend.end_row()
            return None
        return self._matcher

    def end_fill(self, masks: Masks, row: int) -> bool:
        """See BatchFill."""
        return True

    def fork(self) -> GuidanceState:
        """See GrammarState."""
        return GuidanceState(self._backend, self._matcher.deep_copy(), self._ended)

    def is_accepting(self) -> bool:
        """See GrammarState."""
        return bool(self._ended or self._matcher.is_accepting())

    def is_finished(self) -> bool:
        """See GrammarState."""
        return bool(self._ended or self._matcher.is_stopped())

    def error(self) -> str | None:
        """See GrammarState."""
        return _plain_words(str(self._matcher.get_error())) if self._matcher.is_error() else None
