"""GGUF files: their metadata, and where which tensor lies. Standard library only.

Layout (versions 2 and 3, little endian): "GGUF", u32 version, u64 tensors, u64 pairs; the pairs of a string, a u32 type
and a value; per tensor its name, u32 dims, u64 sizes (fastest first), u32 type, u64 offset; then, aligned, the data.
Strings are a u64 length and UTF-8; an array is a u32 type, a u64 length and its items.
"""

from __future__ import annotations

import functools
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from pando.errors import ConfigError

SUFFIX = ".gguf"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")

TYPE_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
"""Tensor types by number; those that can be read are in `pando.quant.gguf_blocks`."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: its type's name, its shape with the fastest dim last, and its first byte in the file."""

    type: str
    shape: tuple[int, ...]
    start: int


class GGUFFile:
    """The head of a GGUF file. Raises ConfigError that names the file if it can not be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.size = len(data)
                self.metadata, self.tensors = _Head(data).read()
        except (OSError, ValueError, struct.error, IndexError, OverflowError) as error:
            raise ConfigError(
                f"{path} can not be read as GGUF: {error}. Download it again (an interrupted download or a git-lfs "
                "pointer looks like this)",
                param="model_path",
            ) from error
        if self.integer("split.count", 1) > 1:
            raise ConfigError(
                f"{path} is one of {self.integer('split.count')} parts; join them with llama-gguf-split --merge",
                param="model_path",
            )

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises ConfigError if it is missing or something else, as the methods below do."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        return float(value)

    def array(self, key: str) -> list[object]:
        """An array; empty if it is missing."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, value, "an array")
        return value

    def strings(self, key: str) -> list[str]:
        """An array of strings."""
        return [str(item) for item in self.array(key)]

    def _wrong(self, key: str, value: object, expected: str) -> ConfigError:
        found = "missing" if value is None else repr(value)[:80]
        return ConfigError(f"{self.path}: metadata {key} is {found}; expected {expected}", param="model_path")


def read_gguf(path: Path) -> GGUFFile:
    """The head of a file; the last one is kept, because config, weights and tokenizer all ask for it.

    Raises ConfigError that names the file if it can not be read.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise ConfigError(f"{path} can not be read: {error}", param="model_path") from error
    return _read(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1)
def _read(path: Path, _mtime: int, _size: int) -> GGUFFile:
    return GGUFFile(path)


class _Head:
    """Reads a file's head from front to back."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def read(self) -> tuple[dict[str, object], dict[str, TensorInfo]]:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"it has version {version}; 2 and 3 are known")
        num_tensors, num_pairs = int(self.scalar("Q")), int(self.scalar("Q"))
        metadata: dict[str, object] = {}
        for _ in range(num_pairs):
            key = self.string()
            metadata[key] = self.value(int(self.scalar("I")))
        rows = [self.row() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        data = -(-self.at // alignment) * alignment
        return metadata, {name: TensorInfo(kind, shape, data + offset) for name, kind, shape, offset in rows}

    def row(self) -> tuple[str, str, tuple[int, ...], int]:
        name = self.string()
        dims = int(self.scalar("I"))
        sizes = tuple(int(self.scalar("Q")) for _ in range(dims))
        number, offset = int(self.scalar("I")), int(self.scalar("Q"))
        return name, TYPE_NAMES.get(number, f"type {number}"), sizes[::-1], offset

    def scalar(self, kind: str) -> int | float | bool:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        assert isinstance(value, int | float)
        return value

    def string(self) -> str:
        (length,) = _LENGTH.unpack_from(self.data, self.at)
        start = self.at + _LENGTH.size
        self.at = start + length
        if self.at > len(self.data):
            raise ValueError("it ends inside a string")
        return self.data[start : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.items(int(self.scalar("I")), int(self.scalar("Q")))
        if kind not in _SCALARS:
            raise ValueError(f"it holds a value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def items(self, kind: int, count: int) -> list[object]:
        if kind in _SCALARS:
            shape = f"<{count}{_SCALARS[kind]}"
            values = list(struct.unpack_from(shape, self.data, self.at))
            self.at += struct.calcsize(shape)
            return values
        if count > len(self.data) - self.at:
            raise ValueError("it ends inside an array")
        return [self.string() if kind == _STRING else self.value(kind) for _ in range(count)]
