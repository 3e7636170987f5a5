"""Files of tensors, memory-mapped: a tensor is a view of the file until somebody copies it.

Pages are read when they are touched and can be given back with `release`; the system reads them again if it must. The
mapping is private and copy-on-write, so no bug can write to a checkpoint.
"""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pando.errors import ConfigError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types of a safetensors file."""


class MappedFile:
    """A file in memory, read-only in effect."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ConfigError(f"can not open weights {path}: {error}; download the file again") from error
        self.size = len(self._map)

    def bytes(self, start: int, count: int) -> bytes:
        """A copy of some bytes; fewer at the end of the file."""
        return self._map[start : start + count]

    def tensor(self, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A view of the file from byte `start`; a copy where the file does not align it to its elements."""
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        if start % dtype.itemsize == 0:
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(*shape)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
        return raw.clone().view(dtype).view(*shape)

    def release(self) -> None:
        """Give the pages back. Views stay valid: what they touch next is read again."""
        if sys.platform != "win32":
            self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor of a safetensors file is. start: byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def safetensors_entries(file: MappedFile) -> dict[str, Entry]:
    """Tensors of a safetensors file: 8 bytes length of a JSON header {name: {dtype, shape, data_offsets}}, the data.

    Raises ConfigError that names the file if that is not what it holds.
    """
    length = int.from_bytes(file.bytes(0, 8), "little")
    data = 8 + length
    try:
        if file.size < 8 or data > file.size:
            raise ValueError("it ends inside its header")
        header = json.loads(file.bytes(8, length))
        return {name: _entry(name, row, data, file.size) for name, row in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"can not open weights {file.path}: {error}. Download it again (an interrupted download or a git-lfs "
            "pointer looks like this)"
        ) from error


def _entry(name: str, row: Mapping[str, Any], data: int, size: int) -> Entry:
    if row["dtype"] not in DTYPES:
        raise ValueError(f"{name} has elements of type {row['dtype']}, which can not be read")
    dtype = DTYPES[row["dtype"]]
    shape, (begin, end) = tuple(row["shape"]), row["data_offsets"]
    count = 1
    for side in shape:
        count *= side
    if not 0 <= begin <= end <= size - data or end - begin != count * dtype.itemsize:
        raise ValueError(f"{name} lies outside the file or does not fill its place")
    return Entry(dtype, shape, data + begin)
