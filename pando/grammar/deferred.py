"""A backend that is made when the first grammar is compiled: it takes up to a second that most engines never need."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

from pando.core.sampling import GrammarSpec
from pando.grammar.protocols import CompiledGrammar, GrammarCompiler


class DeferredBackend:
    """Implements `GrammarCompiler` by a backend made in the first compile's thread."""

    def __init__(self, make: Callable[[], GrammarCompiler]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._backend: GrammarCompiler | None = None

    def key(self, spec: GrammarSpec) -> str:
        """Identity of a source; one engine has one tokenizer, so that need not be part of it."""
        options = f"{spec.options.strict} {spec.options.whitespace}"
        return hashlib.sha256("\n".join((spec.kind, options, spec.source)).encode("utf-8", "surrogatepass")).hexdigest()

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Compile. Raises InvalidGrammar with a JSON pointer."""
        with self._lock:
            if self._backend is None:
                self._backend = self._make()
        return self._backend.compile(spec)
