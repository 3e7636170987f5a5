"""Traces of requests: reading the formats there are, all into token ids."""

from __future__ import annotations

import csv
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, TextIO

import numpy as np

from pando.cache.key import TOKEN_BYTES, tokens_to_bytes
from pando.errors import ConfigError

MOONCAKE_BLOCK = 512
"""Tokens that one hash id of a Mooncake trace stands for."""
FIRST_UNIQUE = 1 << 30
"""Token ids from here on occur once in a trace: they stand for tokens of which only the number is known."""
LAST_UNIQUE = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. time: arrival in seconds. prompt, output: token ids as int32 bytes.

    prompt_len: tokens of the prompt, fewer than `prompt` holds if its last block is padded to a whole one.
    whole_prompt: the last token may come from the cache too, because the trace counts whole blocks.
    """

    time: float
    prompt: bytes
    output: bytes
    prompt_len: int
    whole_prompt: bool = False

    @classmethod
    def of(cls, time: float, prompt: Iterable[int], output: Iterable[int]) -> TraceRequest:
        """A request from token ids."""
        data = tokens_to_bytes(prompt)
        return cls(time, data, tokens_to_bytes(output), len(data) // TOKEN_BYTES)

    @property
    def output_len(self) -> int:
        """Tokens of the output."""
        return len(self.output) // TOKEN_BYTES


class _Unique:
    """Hands out token ids that nobody had before."""

    def __init__(self) -> None:
        self._next = FIRST_UNIQUE

    def take(self, count: int) -> bytes:
        if self._next + count > LAST_UNIQUE:
            self._next = FIRST_UNIQUE  # after a thousand million tokens: nothing of then is cached any more
        first, self._next = self._next, self._next + count
        return np.arange(first, first + count, dtype=np.int32).tobytes()


class Trace(Protocol):
    """Requests in the order in which they are replayed; can be walked several times."""

    def __iter__(self) -> Iterator[TraceRequest]:
        """The requests."""

    def __len__(self) -> int:
        """Number of requests."""


class MooncakeTrace:
    """Requests by block: expanded to tokens one by one, because all of them together would not fit into memory.

    With pages that do not hold whole blocks, each id is 512 tokens of its own and the last block is cut to the prompt's
    length. With pages of whole blocks, as the trace was made, the last block is whole too.
    """

    def __init__(self, rows: list[tuple[float, array[int], int, int]], page_size: int) -> None:
        self._rows = rows  # time, ids, prompt tokens, output tokens
        self._whole = page_size % MOONCAKE_BLOCK == 0

    def __len__(self) -> int:
        """Number of requests."""
        return len(self._rows)

    def __iter__(self) -> Iterator[TraceRequest]:
        """The requests; outputs are ids that occur once."""
        unique = _Unique()
        inside = np.arange(MOONCAKE_BLOCK, dtype=np.int32)
        for time, ids, length, output in self._rows:
            # The first token tells blocks apart; the others are the same everywhere, which is enough for a prefix.
            tokens = np.broadcast_to(inside, (len(ids), MOONCAKE_BLOCK)).copy()
            tokens[:, 0] = ids
            prompt = tokens.tobytes() if self._whole else tokens.tobytes()[: length * TOKEN_BYTES]
            yield TraceRequest(time, prompt, unique.take(output), length, self._whole)


def read_tokens(path: Path, page_size: int, limit: int | None) -> Trace:
    """JSON lines with `input_tokens` and `output_tokens`, lists of ids; `ts` in seconds is optional."""
    return [
        TraceRequest.of(_number(row, "ts", 0.0), _integers(row, "input_tokens"), _integers(row, "output_tokens"))
        for row in _json_lines(path, limit)
    ]


def read_mooncake(path: Path, page_size: int, limit: int | None) -> Trace:
    """JSON lines with `hash_ids`, one per 512 tokens, equal for equal prefixes; `input_length`, `output_length`."""
    rows = []
    for row in _json_lines(path, limit):
        ids, length = _integers(row, "hash_ids"), int(_number(row, "input_length"))
        if not (len(ids) - 1) * MOONCAKE_BLOCK < length <= len(ids) * MOONCAKE_BLOCK:
            raise ConfigError(f"{path}: {len(ids)} blocks of {MOONCAKE_BLOCK} do not make {length} tokens")
        rows.append((_number(row, "timestamp", 0.0) / 1000, ids, length, int(_number(row, "output_length"))))
    return MooncakeTrace(rows, page_size)


def read_azure(path: Path, page_size: int, limit: int | None) -> Trace:
    """CSV with TIMESTAMP, ContextTokens, GeneratedTokens: lengths only, so no two requests share anything."""
    unique, requests = _Unique(), []
    with _opened(path) as file:
        for row in itertools.islice(csv.DictReader(file), limit):
            try:
                when = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                prompt, output = (unique.take(int(row[name])) for name in ("ContextTokens", "GeneratedTokens"))
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{path}: {row} is no request: {error}") from error
            requests.append(TraceRequest(when, prompt, output, len(prompt) // TOKEN_BYTES))
    return requests


FORMATS: dict[str, Callable[[Path, int, int | None], Trace]] = {
    "tokens": read_tokens,
    "mooncake": read_mooncake,
    "azure": read_azure,
}


def read_trace(path: Path, name: str, page_size: int, limit: int | None = None) -> Trace:
    """The first `limit` requests of a trace in format `name`, in the file's order. Raises ConfigError."""
    trace = FORMATS[name](path, page_size, limit)
    if not len(trace):
        raise ConfigError(f"{path} holds no requests")
    return trace


def _opened(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"can not read {path}: {error.strerror or error}") from error


def _json_lines(path: Path, limit: int | None) -> Iterator[dict[str, object]]:
    with _opened(path) as file:
        for number, line in enumerate(itertools.islice(file, limit), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number} is not an object")
            yield row


def _number(row: dict[str, object], name: str, default: float | None = None) -> float:
    value = row.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"a request has no number {name!r}: {str(row)[:80]}")
    return float(value)


def _integers(row: dict[str, object], name: str) -> array[int]:
    value = row.get(name)
    try:
        if isinstance(value, list):
            return array("i", value)
    except (TypeError, OverflowError):
        pass
    raise ConfigError(f"a request has no list of token ids {name!r}: {str(row)[:80]}")
