"""Incremental detokenisation: tokens go in as they come, text comes out once, whole characters only.

However the tokens of a sequence are split over calls, the pieces joined are the same text, and that text is what the
tokenizer's whole-sequence decode gives. (One exception, on purpose: in a run of byte-fallback tokens that is not valid
UTF-8 the library turns every byte of the run into U+FFFD, even characters that were complete. Those are shown here as
soon as they are complete, since holding back a whole run would stop the stream of any text written in byte tokens.)
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from pando.tokenizer.token_bytes import TokenBytes

if TYPE_CHECKING:
    from pando.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Turns a growing sequence of tokens into text."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete. The bytes of an unfinished character wait."""

    def finish(self) -> str:
        """What still waits, as the end of the text: an unfinished character becomes U+FFFD."""


def make_detokenizer(
    tokenizer: Tokenizer,
    *,
    skip_special_tokens: bool = True,
    continues: bool = False,
    letters: Mapping[int, str] | None = None,
) -> Detokenizer:
    """The detokenizer for this tokenizer.

    continues: the tokens follow other text, as generated tokens follow a prompt, so a leading space that the decoder
    takes off the beginning of a text is kept. letters: tokens that are shown as these texts, special ones too.
    """
    plain = _plain_detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, continues=continues)
    return MarkingDetokenizer(plain, letters) if letters else plain


def _plain_detokenizer(tokenizer: Tokenizer, *, skip_special_tokens: bool, continues: bool) -> Detokenizer:
    skip = tokenizer.special_ids if skip_special_tokens else frozenset()
    table = tokenizer.bytes_table
    if table is None:
        return WindowDetokenizer(tokenizer, skip, continues=continues)
    if table.byte_fallback:
        return FallbackDetokenizer(table, skip, strip_start=0 if continues else table.strip_start)
    return ByteDetokenizer(table, skip)


class MarkingDetokenizer:
    """Shows some tokens as texts of their own, and all others as `inner` does."""

    __slots__ = ("_inner", "_letters")

    def __init__(self, inner: Detokenizer, letters: Mapping[int, str]) -> None:
        self._inner = inner
        self._letters = letters

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete."""
        if not any(token in self._letters for token in token_ids):
            return self._inner.push(token_ids)
        pieces = []
        for token in token_ids:
            letter = self._letters.get(token)
            # A marker ends the text before it: bytes of an unfinished character do not reach across.
            pieces.append(self._inner.push([token]) if letter is None else self._inner.finish() + letter)
        return "".join(pieces)

    def finish(self) -> str:
        """What still waits."""
        return self._inner.finish()


class ByteDetokenizer:
    """Byte-level BPE: a table look-up per token, and the bytes of an unfinished character carried over."""

    __slots__ = ("_table", "_skip", "_decode")

    def __init__(self, table: TokenBytes, skip: frozenset[int]) -> None:
        self._table = table
        self._skip = skip
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete."""
        of, skip = self._table.of, self._skip
        return self._decode(b"".join([of(token) for token in token_ids if token not in skip]), False)

    def finish(self) -> str:
        """What still waits."""
        return self._decode(b"", True)


class FallbackDetokenizer:
    """SentencePiece style: ordinary tokens are whole text; byte tokens gather until they make characters."""

    __slots__ = ("_table", "_skip", "_strip", "_carry")

    def __init__(self, table: TokenBytes, skip: frozenset[int], *, strip_start: int) -> None:
        self._table = table
        self._skip = skip
        self._strip = strip_start
        self._carry = b""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete."""
        pieces = []
        for token in token_ids:
            if token in self._skip:
                continue
            data = self._table.of(token)
            if self._table.is_byte(token):
                pieces.append(self._push_byte(data))
            else:
                pieces.append(self._flush() + data.decode("utf-8", "replace"))
        return self._stripped("".join(pieces))

    def finish(self) -> str:
        """What still waits."""
        return self._stripped(self._flush())

    def _push_byte(self, byte: bytes) -> str:
        self._carry += byte
        try:
            text, used = codecs.utf_8_decode(self._carry, "strict", False)
        except UnicodeDecodeError:
            return self._flush()
        self._carry = self._carry[used:]
        return text

    def _flush(self) -> str:
        held, self._carry = len(self._carry), b""
        return _REPLACEMENT * held

    def _stripped(self, text: str) -> str:
        """Take leading spaces off until the allowed number is gone or other text has begun."""
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class WindowDetokenizer:
    """Any other decoder: decode the last emitted tokens with and without the new ones, and emit the difference.

        tokens   .... start ....... read ....... end
        decode        |---- base ----|
        decode        |---- full -----------------|      new text = full[len(base):]

    A window that ends in U+FFFD may be an unfinished character and waits for the next token.
    """

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int], *, continues: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._window: list[int] = [_ordinary_token(tokenizer)] if continues else []
        self._read = len(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete."""
        pieces = []
        for token in token_ids:
            # One token at a time, so that the text does not depend on how tokens were grouped into calls.
            if token not in self._skip:
                self._window.append(token)
                pieces.append(self._advance(last=False))
        return "".join(pieces)

    def finish(self) -> str:
        """What still waits."""
        return self._advance(last=True)

    def _advance(self, *, last: bool) -> str:
        base = self._tokenizer.decode(self._window[: self._read], skip_special_tokens=False)
        full = self._tokenizer.decode(self._window, skip_special_tokens=False)
        if not last and (full.endswith(_REPLACEMENT) or len(full) <= len(base)):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return full[len(base) :]


def _ordinary_token(tokenizer: Tokenizer) -> int:
    """A token of plain letters, to stand for the text before."""
    for name in ("the", "a", "e", "x"):
        token = tokenizer.token_id(name)
        if token is not None:
            return token
    return next(
        (token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]).strip().isalnum()),
        0,
    )
