"""A second backend, as an extra: xgrammar. Compiles in a process that is killed at a deadline; never a fall-back.

xgrammar accepts many keywords of JSON schema without enforcing them. They are looked for here: with `strict` the
schema is refused, else it is flagged and replies are checked at their end, as with the default backend.
"""

from __future__ import annotations

import base64
import importlib
import json
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from pando.core.sampling import GrammarSpec
from pando.errors import InvalidGrammar, MissingExtra, StepFailed
from pando.grammar.guidance import make_tokenizer, spec_key
from pando.grammar.limits import Limits, check_regex, check_text, parse_schema, refuse
from pando.grammar.masks import Masks, full_row, row_of
from pando.grammar.preflight import malformed, one_dialect
from pando.grammar.protocols import BatchState, Issue
from pando.grammar.relax import relaxed, unsupported
from pando.grammar.rewrite import rewrite
from pando.grammar.schema_tree import ANNOTATIONS, Schema, children
from pando.grammar.verify import Verifier
from pando.grammar.vocabulary import Vocabulary

_SEPARATORS: dict[str, tuple[Any, int]] = {
    "compact": ((",", ":"), 0),
    "spaced": ((", ", ": "), 0),
    "bounded": ((None, None), 2),
    "flexible": ((None, None), 64),
}
_ALONE = (("$ref",), ("const",), ("enum",), ("anyOf",))
"""Keywords beside which xgrammar drops the others."""
_TOGETHER = (("pattern", "minLength"), ("pattern", "maxLength"), ("pattern", "format"), ("format", "minLength"))


def load() -> Any:
    """The library. Raises MissingExtra."""
    try:
        return importlib.import_module("xgrammar")
    except ImportError:
        raise MissingExtra("the xgrammar backend needs: pip install 'pando-llm[xgrammar]'") from None


def gaps(schema: Schema, pointer: str = "#") -> Iterator[Issue]:
    """Places that xgrammar takes without enforcing them."""
    if isinstance(schema, dict):
        keys = set(schema) - ANNOTATIONS
        for (key,) in _ALONE:
            if key in keys and len(keys) > 1:
                yield Issue(f"{pointer}/{key}", f"what stands beside {key} is not enforced", fatal=False)
        for first, second in _TOGETHER:
            if first in keys and second in keys:
                yield Issue(f"{pointer}/{second}", f"{second} is not enforced together with {first}", fatal=False)
        if len(schema.get("allOf", ())) > 1:
            yield Issue(f"{pointer}/allOf", "only one part of allOf is enforced", fatal=False)
        for key in ("multipleOf", "minProperties", "maxProperties"):
            if key in keys:
                yield Issue(f"{pointer}/{key}", f"{key} is not enforced", fatal=False)
    for relative, child in children(schema):
        yield from gaps(child, pointer + relative)


class CompilerProcess:
    """Owns the worker: starts it on first use, kills it when a job takes longer than `deadline_s` seconds."""

    def __init__(self, vocabulary: Vocabulary, deadline_s: float = 10.0, memory_bytes: int = 8 << 30) -> None:
        self._vocabulary = vocabulary
        self._deadline_s = deadline_s
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def compile(self, job: dict[str, Any]) -> str:
        """The serialised grammar of a job. Raises InvalidGrammar (also at the deadline) and StepFailed."""
        with self._lock:
            process = self._started()
            answer = self._exchange(process, json.dumps(job), self._deadline_s)
        if answer is None:
            raise InvalidGrammar(f"the grammar did not compile in {self._deadline_s:g} s; simplify it")
        if "error" in answer:
            raise InvalidGrammar(answer["error"])
        return str(answer["grammar"])

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._kill()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pando.grammar.xgrammar_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        vocabulary = self._vocabulary
        tokens = [vocabulary.token_bytes(token) for token in range(vocabulary.num_tokens)]
        head = {
            "tokens": [base64.b64encode(token).decode() for token in tokens],
            "vocab_size": vocabulary.vocab_size,
            "stop_ids": list(vocabulary.eos_ids),
            "memory_bytes": self._memory_bytes,
        }
        if self._exchange(self._process, json.dumps(head), 120.0) is None:
            raise StepFailed("the process of the xgrammar backend does not start")
        return self._process

    def _exchange(self, process: subprocess.Popen[str], line: str, seconds: float) -> dict[str, Any] | None:
        """Write a line, read one; None, with the worker killed, if none comes in time."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                answer = process.stdout.readline() if selector.select(seconds) else ""
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._kill()
            return None
        value: dict[str, Any] = json.loads(answer)
        return value

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


class XGrammarBackend:
    """See GrammarBackend. `close` ends its process. Raises MissingExtra."""

    name = "xgrammar"

    def __init__(self, vocabulary: Vocabulary, limits: Limits | None = None, deadline_s: float = 10.0) -> None:
        self.library = load()
        self.vocabulary = vocabulary
        self.limits = limits or Limits()
        tokens = [vocabulary.token_bytes(token) for token in range(vocabulary.num_tokens)]
        self.info = self.library.TokenizerInfo(
            tokens,
            self.library.VocabType.RAW,
            vocab_size=vocabulary.vocab_size,
            stop_token_ids=list(vocabulary.eos_ids),
        )
        self.tokenizer = make_tokenizer(vocabulary)
        self.tail = full_row(vocabulary.num_tokens, vocabulary.vocab_size)
        self.end_row = row_of(vocabulary.eos_ids, vocabulary.vocab_size)
        self._process = CompilerProcess(vocabulary, deadline_s)

    def key(self, spec: GrammarSpec) -> str:
        """See GrammarBackend."""
        return spec_key(f"{self.name} {version('xgrammar')}", self.vocabulary, spec)

    def validate(self, spec: GrammarSpec) -> list[Issue]:
        """See GrammarBackend."""
        try:
            return list(self._read(spec)[1])
        except InvalidGrammar as error:
            return [Issue("", error.message)]

    def compile(self, spec: GrammarSpec) -> XGrammar:
        """See GrammarBackend."""
        began = time.perf_counter()
        job, issues, verifier = self._read(spec)
        text = self._process.compile(job)
        compiled = self.library.CompiledGrammar.deserialize_json(text, self.info)
        return XGrammar(self, compiled, self.key(spec), (time.perf_counter() - began) * 1e3, issues, verifier)

    def allocate_masks(self, rows: int) -> Masks:
        """See GrammarBackend."""
        return np.repeat(self.tail[None, :], rows, axis=0)

    def fill_batch(self, items: Sequence[tuple[BatchState, int]], masks: Masks) -> list[bool]:
        """See GrammarBackend."""
        return [state.fill(masks, row) for state, row in items]

    def close(self) -> None:
        """End the compiler's process."""
        self._process.close()

    def _read(self, spec: GrammarSpec) -> tuple[dict[str, Any], tuple[Issue, ...], Verifier | None]:
        """The job of a spec, what it will not enforce, and the check of replies if there is such."""
        check_text(spec.source, spec.kind, self.limits)
        separators, most = _SEPARATORS[spec.options.whitespace]
        job = {"kind": spec.kind, "source": spec.source, "separators": separators, "max_whitespace": most}
        if spec.kind == "json_object":
            return {**job, "kind": "json_schema", "source": '{"type":"object"}'}, (), None
        if spec.kind == "choice":
            raise refuse("", "choices are compiled by the default backend", spec.kind)
        if spec.kind == "regex":
            check_regex(spec.source, "", spec.kind, self.limits)
        if spec.kind != "json_schema":
            return job, (), None
        schema = parse_schema(spec.source, spec.kind, self.limits)
        wrong = malformed(schema)
        if wrong is not None:
            raise refuse(wrong.pointer, wrong.message, spec.kind)
        exact = rewrite(one_dialect(schema))
        refused = [*unsupported(exact), *gaps(exact)]
        if refused and spec.options.strict:
            raise refuse(refused[0].pointer, refused[0].message, spec.kind)
        wide, issues = relaxed(exact)
        found = (*issues, *gaps(wide))
        try:
            verifier = Verifier(schema) if found else None
        except ValueError as error:
            raise refuse("#", f"replies can not be checked: {error}", spec.kind) from None
        return {**job, "source": json.dumps(wide, ensure_ascii=False)}, found, verifier


class XGrammar:
    """A compiled grammar; see CompiledGrammar."""

    def __init__(
        self,
        backend: XGrammarBackend,
        compiled: Any,
        key: str,
        compile_ms: float,
        issues: tuple[Issue, ...],
        verifier: Verifier | None,
    ) -> None:
        self.key = key
        self.compile_ms = compile_ms
        self.relaxed = issues
        self.nbytes = int(compiled.memory_size_bytes)
        self._backend = backend
        self._compiled = compiled
        self._verifier = verifier

    def new_state(self) -> XGrammarState:
        """See CompiledGrammar."""
        return XGrammarState(self._backend, self._backend.library.GrammarMatcher(self._compiled))

    def violation(self, text: str) -> str | None:
        """See CompiledGrammar."""
        return None if self._verifier is None else self._verifier.violation(text)


_CONTEXT = 32
"""Tokens before a forced text that may decide how it is cut into tokens."""


class XGrammarState:
    """One sequence; remembers its tokens, which forced texts are tokenised behind."""

    def __init__(self, backend: XGrammarBackend, matcher: Any, history: Sequence[int] = ()) -> None:
        self._backend = backend
        self._matcher = matcher
        self._history = list(history)

    def accept(self, tokens: Sequence[int]) -> int:
        """See GrammarState."""
        taken = 0
        while taken < len(tokens) and not self._matcher.is_terminated():
            if not self._matcher.accept_token(tokens[taken]):
                break
            taken += 1
        self._history += tokens[:taken]
        return taken

    def validate(self, tokens: Sequence[int]) -> int:
        """See GrammarState."""
        taken = self.accept(tokens)
        self.rollback(taken)
        return taken

    def rollback(self, n: int) -> None:
        """See GrammarState."""
        if n:
            assert n <= len(self._history), f"rollback of {n} tokens exceeds what was accepted"
            self._matcher.rollback(n)
            del self._history[-n:]

    def forced_tokens(self, limit: int) -> list[int]:
        """See GrammarState."""
        if self._matcher.is_terminated() or limit <= 0:
            return []
        text = self._matcher.find_jump_forward_string()
        if not text:
            return []
        tokens, _ = self._backend.tokenizer.tokenize_partial(text.encode(), recent_tokens=self._history[-_CONTEXT:])
        forced = list(tokens[:limit])
        return forced[: self.validate(forced)]

    def fill(self, masks: Masks, row: int) -> bool:
        """See GrammarState."""
        if self.begin_fill(masks, row) is not None:
            self._matcher.fill_next_token_bitmask(masks, row)
            masks[row] &= self._backend.tail
        return True

    def begin_fill(self, masks: Masks, row: int) -> object | None:
        """See BatchFill."""
        if self._matcher.is_terminated():
            masks[row] = self._backend.end_row
            return None
        return self

    def end_fill(self, masks: Masks, row: int) -> bool:
        """See BatchFill."""
        return self.fill(masks, row)

    def fork(self) -> XGrammarState:
        """See GrammarState."""
        return XGrammarState(self._backend, self._matcher.fork(), self._history)

    def is_accepting(self) -> bool:
        """See GrammarState."""
        return bool(self._matcher.is_terminated() or self._matcher.is_completed())

    def is_finished(self) -> bool:
        """See GrammarState."""
        return bool(self._matcher.is_terminated())

    def error(self) -> str | None:
        """See GrammarState."""
        return None
