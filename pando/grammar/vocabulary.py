"""What a grammar must know of a tokenizer, taken once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pando.errors import ConfigError


class TextTokenizer(Protocol):
    """The parts of a tokenizer that grammars use."""

    vocab_size: int
    special_ids: frozenset[int]
    added_tokens: dict[str, int]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to the text."""

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""


def markers_of(tokenizer: TextTokenizer) -> dict[str, int]:
    """Tokens that stand for themselves, by their spelling; see `Vocabulary`."""
    return {
        name: token
        for name, token in tokenizer.added_tokens.items()
        if token in tokenizer.special_ids or name.startswith("<") and name.endswith(">")
    }


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens as grammars see them.

    json: text of tokenizer.json. num_tokens: ids that exist; vocab_size: width of the logits, not less. key: hash of
    everything that a mask depends on. markers: tokens that stand for themselves and are never part of a text, by their
    spelling: special ones, and added ones in angle brackets such as `<tool_call>`. The callables are the tokenizer's.
    """

    json: str
    num_tokens: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    special_ids: frozenset[int]
    markers: Mapping[str, int]
    key: str
    encode: Callable[[str], list[int]]
    token_bytes: Callable[[int], bytes]

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
            markers=markers_of(tokenizer),
            key=digest.hexdigest()[:16],
            encode=lambda source: tokenizer.encode(source, add_special_tokens=False),
            token_bytes=tokenizer.token_bytes,
        )
