"""Token id -> bytes, for the two families of decoders where that is a plain table.

Byte-level BPE (GPT-2, Llama 3, Qwen): each letter of a token's spelling stands for one byte. SentencePiece style
(Llama 2, Mistral, Gemma): a special letter stands for a space, and `<0xE4>` for the byte 0xE4. Every other decoder
looks at neighbouring tokens and has no table.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

_SPACE_LETTER = "\u2581"


@cache
def byte_letters() -> dict[str, int]:
    """Letter -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 onward, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    letters.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return letters


class TokenBytes:
    """Bytes of each token, computed on first use.

    byte_fallback: tokens `<0xNN>` are single bytes. strip_start: spaces that the whole-sequence decoder takes off the
    beginning of a text.
    """

    def __init__(self, rust: RustTokenizer, *, byte_level: bool, byte_fallback: bool, strip_start: int) -> None:
        size = max(rust.get_vocab_size(), max(rust.get_added_tokens_decoder(), default=-1) + 1)
        self._rust = rust
        self._byte_level = byte_level
        self.byte_fallback = byte_fallback
        self.strip_start = strip_start
        self._table: list[bytes | None] = [None] * size

    def of(self, token_id: int) -> bytes:
        """Bytes of a token; empty for an id outside the vocabulary."""
        if not 0 <= token_id < len(self._table):
            return b""
        known = self._table[token_id]
        if known is None:
            known = self._table[token_id] = self._compute(self._rust.id_to_token(token_id) or "")
        return known

    def is_byte(self, token_id: int) -> bool:
        """True for a byte-fallback token, whose byte may be a part of a character."""
        return self.byte_fallback and _fallback_byte(self._rust.id_to_token(token_id) or "") is not None

    def _compute(self, name: str) -> bytes:
        if self._byte_level:
            letters = byte_letters()
            try:
                return bytes([letters[letter] for letter in name])
            except KeyError:  # an added token, spelled in plain text
                return name.encode()
        byte = _fallback_byte(name) if self.byte_fallback else None
        return byte if byte is not None else name.replace(_SPACE_LETTER, " ").encode()


def _fallback_byte(name: str) -> bytes | None:
    """The byte of a token spelled `<0xNN>`, else None."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes([int(name[3:5], 16)])
        except ValueError:
            return None
    return None


def make_token_bytes(rust: RustTokenizer) -> TokenBytes | None:
    """The table of this tokenizer, or None if its decoder is not of a kind that has one."""
    if rust.decoder is None:
        return None
    decoder: dict[str, Any] = json.loads(rust.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenBytes(rust, byte_level=True, byte_fallback=False, strip_start=0)
    space = {"type": "Replace", "pattern": {"String": _SPACE_LETTER}, "content": " "}
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or steps[0] != space or len(steps) > 4:
        return None
    strip = 0
    if len(steps) == 4:
        if steps[3]["type"] != "Strip" or steps[3]["content"] != " " or steps[3]["stop"] != 0:
            return None
        strip = int(steps[3]["start"])
    return TokenBytes(rust, byte_level=False, byte_fallback=True, strip_start=strip)
