"""What a grammar must know of a tokenizer, taken once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pando.errors import ConfigError


class TextTokenizer(Protocol):
    """The parts of a tokenizer that grammars use."""

    vocab_size: int
    special_ids: frozenset[int]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to the text."""

    def token_id(self, text: str) -> int | None:
        """Id of the token written so, or None."""

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens as grammars see them.

    json: text of tokenizer.json. num_tokens: ids that exist; vocab_size: width of the logits, not less. key: hash of
    everything that a mask depends on. The callables are the tokenizer's.
    """

    json: str
    num_tokens: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    special_ids: frozenset[int]
    key: str
    encode: Callable[[str], list[int]]
    token_bytes: Callable[[int], bytes]
    token_id: Callable[[str], int | None]

    @classmethod
    def of(cls, tokenizer: TextTokenizer, eos_ids: Sequence[int], vocab_size: int | None = None) -> Vocabulary:
        """The vocabulary of a tokenizer whose model has `vocab_size` logits (default: as many as there are tokens).

        Raises ConfigError if there is no end id, or one outside the vocabulary.
        """
        width = max(tokenizer.vocab_size, vocab_size or 0)
        ends = tuple(dict.fromkeys(eos_ids))
        if not ends or not all(0 <= token < width for token in ends):
            raise ConfigError(f"grammars need end-of-sequence ids in [0, {width}); got {list(ends)}")
        text = tokenizer.to_json()
        digest = hashlib.sha256(f"{width}:{ends}:{sorted(tokenizer.special_ids)}:".encode() + text.encode())
        return cls(
            json=text,
            num_tokens=tokenizer.vocab_size,
            vocab_size=width,
            eos_ids=ends,
            special_ids=tokenizer.special_ids,
            key=digest.hexdigest()[:16],
            encode=lambda source: tokenizer.encode(source, add_special_tokens=False),
            token_bytes=tokenizer.token_bytes,
            token_id=tokenizer.token_id,
        )

    def special_id(self, text: str) -> int | None:
        """Id of the special token written so; None if there is none or it is plain text to the tokenizer."""
        token = self.token_id(text)
        return token if token is not None and token in self.special_ids else None
