"""Vocabularies and backends that tests share: made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pando
from pando.core.sampling import GrammarOptions, GrammarSpec
from pando.grammar.guidance import GuidanceBackend, GuidanceGrammar
from pando.grammar.protocols import GrammarState
from pando.grammar.vocabulary import Vocabulary
from pando.tokenizer.tokenizer import Tokenizer
from tests import tiny_tokenizers

PADDING = 37
"""Ids that the model has and the tokenizer has not."""


@cache
def aspen_tokenizer() -> Tokenizer:
    """The built-in model's tokenizer."""
    return Tokenizer.load(Path(pando.__file__).parent / "models_builtin" / "aspen")


@cache
def aspen() -> Vocabulary:
    """The built-in model's, with logits wider than the vocabulary."""
    tokenizer = aspen_tokenizer()
    return Vocabulary.of(tokenizer, [_known(tokenizer.eos_token_id)], tokenizer.vocab_size + PADDING)


@cache
def byte_level() -> Vocabulary:
    """A small byte-level BPE with two end ids."""
    tokenizer = tiny_tokenizers.byte_level()
    ends = [_known(tokenizer.token_id("<|im_end|>")), _known(tokenizer.token_id("<|end|>"))]
    return Vocabulary.of(tokenizer, ends, tokenizer.vocab_size + 3)


@cache
def sentencepiece() -> Vocabulary:
    """SentencePiece style with byte fallback."""
    tokenizer = Tokenizer(tiny_tokenizers.sentencepiece_rust())
    return Vocabulary.of(tokenizer, [_known(tokenizer.token_id("</s>"))])


VOCABULARIES: dict[str, Callable[[], Vocabulary]] = {
    "aspen": aspen,
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
}


@cache
def backend(name: str = "aspen", num_threads: int = 1) -> GuidanceBackend:
    """The default backend over one of the vocabularies."""
    return GuidanceBackend(VOCABULARIES[name](), num_threads=num_threads)


def compiled(kind: str, source: str, *, strict: bool = True, name: str = "aspen") -> GuidanceGrammar:
    """A grammar of the default backend."""
    spec = GrammarSpec(kind, source, GrammarOptions(strict=strict))  # type: ignore[arg-type]
    return backend(name).compile(spec)


def fits(state: GrammarState, text: str, vocabulary: Vocabulary) -> bool:
    """True if the whole text is accepted and may end there. Advances the state."""
    tokens = vocabulary.encode(text)
    return state.accept(tokens) == len(tokens) and state.is_accepting()


def _known(token: int | None) -> int:
    assert token is not None
    return token
