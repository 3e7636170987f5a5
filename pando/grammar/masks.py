"""Token masks on the host: int32 words, least significant bit first."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Masks = npt.NDArray[np.int32]
"""[rows, words], C-contiguous; see `protocols`."""

MaskRow = npt.NDArray[np.int32]
"""[words]"""


def num_words(vocab_size: int) -> int:
    """Words in a row for a vocabulary of this size."""
    return (vocab_size + 31) // 32


def row_of(tokens: Iterable[int], vocab_size: int) -> MaskRow:
    """A row that allows exactly these tokens; ids outside the vocabulary are left out."""
    bits = np.zeros(num_words(vocab_size) * 32, np.uint8)
    bits[[token for token in tokens if 0 <= token < vocab_size]] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def full_row(num_tokens: int, vocab_size: int) -> MaskRow:
    """A row that allows tokens 0 .. num_tokens - 1 of a vocabulary padded to `vocab_size`."""
    return row_of(range(num_tokens), vocab_size)


def allowed(row: MaskRow) -> npt.NDArray[np.int64]:
    """Ids of the tokens that a row allows, ascending."""
    return np.flatnonzero(np.unpackbits(np.ascontiguousarray(row).astype("<i4").view(np.uint8), bitorder="little"))


def allows(row: MaskRow, token: int) -> bool:
    """True if the row allows the token."""
    return bool((int(row[token // 32]) >> (token % 32)) & 1)
