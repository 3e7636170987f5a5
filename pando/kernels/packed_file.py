"""Packed weights in a file: written once, mapped by every later start and used in place, on any processor.

    "PANDOPK1" | bytes of the header | its CRC-32 | header (JSON) | sections, each from a multiple of ALIGNMENT

The header names the key the file was made for, and of every section where it is and its checksum. A file is read only
if its key is the one asked for, its size is right and every checksum fits. Mapped pages are clean: processes share
them, and the system may drop them. A file is never changed: it appears complete under its name, or not at all.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pando.kernels import cpu, reference
from pando.kernels.ops import PackedExperts, PackedLinear

if cpu.LOAD_ERROR is None:
    from pando.kernels import _native
    from pando.kernels.cpu_linear import Memory, NativeExperts, NativeLinear, PanelParts, PanelSpec

MAGIC = b"PANDOPK1"
_HEAD = struct.Struct("<8sQI")
ALIGNMENT = 4096
"""Bytes a section starts at a multiple of."""
PIECE_BYTES = 8 << 20
"""Written at once, from multiples of it: so large that the file system can keep the file in huge pages."""

LAYOUT: int = 0 if cpu.LOAD_ERROR is not None else _native.panel_layout
"""Counts up with every change of the panels; part of a file's key."""

Section = tuple[int, int, int]
"""Offset in the file, bytes, checksum."""

Packed = PackedLinear | PackedExperts


class BadFile(Exception):
    """A file of packed weights that can not be used, and why."""


class Stopped(Exception):
    """Writing was given up."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """A section of a mapped file; keeps the file mapped."""

    address: int
    nbytes: int
    owner: object

    def data_ptr(self) -> int:
        """Where it is."""
        return self.address


def is_storable(packed: Packed) -> bool:
    """Whether a file can hold it: it lies in native panels."""
    if isinstance(packed, reference.Experts):
        return all(isinstance(each, NativeLinear) for pair in packed.pairs for each in pair)
    return isinstance(packed, NativeLinear | NativeExperts)


# -- writing


def write_file(
    file: BinaryIO,
    key: Mapping[str, Any],
    entries: Sequence[Packed],
    extra: Mapping[str, Any],
    orders: Sequence[Tensor],
    go_on: Callable[[], bool],
) -> int:
    """Write packed weights, in the order they were packed; returns the file's bytes.

    extra: JSON that `PackedFile.extra` gives back; orders: integer tensors, as `PackedFile.orders`. go_on is asked
    every `PIECE_BYTES`: Stopped if it says no. Raises OSError.
    """
    sections: list[Memory] = []
    described = [_describe(entry, sections) for entry in entries]
    ordered = [order.to(torch.int64).contiguous() for order in orders]
    first = len(sections)
    sections += ordered
    sums = [_checksum(section, go_on) for section in sections]
    header, places = _header(key, described, [first + i for i in range(len(ordered))], extra, sections, sums)
    pieces = _Pieces(file, go_on)
    pieces.write(memoryview(_HEAD.pack(MAGIC, len(header), zlib.crc32(header)) + header))
    for section, (offset, _, _) in zip(sections, places, strict=True):
        assert isinstance(section, Tensor), section
        pieces.write(memoryview(bytes(offset - pieces.size)))
        pieces.write(section.view(-1).view(torch.uint8).numpy().data)
    pieces.flush()
    return pieces.size


def _describe(entry: Packed, sections: list[Memory]) -> list[Any]:
    """What the header says of a packed weight; its memory is added to the sections."""
    if isinstance(entry, NativeExperts):
        return ["together", *([_describe(each, sections) for each in part] for part in (entry.gate_up, entry.down))]
    if isinstance(entry, reference.Experts):
        return ["pairs", *([_describe(pair[i], sections) for pair in entry.pairs] for i in (0, 1))]
    assert isinstance(entry, NativeLinear), entry
    places: list[int | None] = []
    for part in (entry.memory.panels, entry.memory.factors, entry.memory.bias):
        places.append(None if part is None else len(sections))
        if part is not None:
            sections.append(part)
    return [*astuple(entry.spec), *places]


def _header(
    key: Mapping[str, Any],
    entries: list[list[Any]],
    orders: list[int],
    extra: Mapping[str, Any],
    sections: Sequence[Memory],
    sums: Sequence[int],
) -> tuple[bytes, list[Section]]:
    """The header, and where the sections are: that depends on its own length, which is guessed generously."""
    room = 1 << 16
    while True:
        places, at = [], room
        for section, checksum in zip(sections, sums, strict=True):
            places.append((at, section.nbytes, checksum))
            at = -(-(at + section.nbytes) // ALIGNMENT) * ALIGNMENT
        size = places[-1][0] + places[-1][1] if places else room
        fields = {"key": key, "size": size, "entries": entries, "orders": orders, "extra": extra, "sections": places}
        header = json.dumps(fields).encode()
        if len(header) + _HEAD.size <= room:
            return header, places
        room *= 2


def _checksum(section: Memory, go_on: Callable[[], bool]) -> int:
    """In pieces of one task: a long call would keep the kernels' threads from the model that runs beside it."""
    total, piece = 0, _native.checksum_chunk
    for chunk in range(-(-section.nbytes // piece)):
        if not go_on():
            raise Stopped
        start = chunk * piece
        total += _native.checksum(section.data_ptr() + start, min(piece, section.nbytes - start), chunk)
    return total % (1 << 64)


class _Pieces:
    """Writes pieces of `PIECE_BYTES` from multiples of it, whatever comes in. size: bytes so far."""

    def __init__(self, file: BinaryIO, go_on: Callable[[], bool]) -> None:
        self.size = 0
        self._file = file
        self._go_on = go_on
        self._piece = bytearray(PIECE_BYTES)

    def write(self, content: memoryview) -> None:
        """Add bytes."""
        while content:
            used = self.size % PIECE_BYTES
            taken = content[: PIECE_BYTES - used]
            self._piece[used : used + len(taken)] = taken
            self.size += len(taken)
            content = content[len(taken) :]
            if self.size % PIECE_BYTES == 0:
                self._put(PIECE_BYTES)

    def flush(self) -> None:
        """Write what is left."""
        self._put(self.size % PIECE_BYTES)

    def _put(self, count: int) -> None:
        if not self._go_on():
            raise Stopped
        left = memoryview(self._piece)[:count]
        while left:  # a full disk takes a part first
            left = left[self._file.write(left) :]


# -- reading


class PackedFile:
    """A mapped file of packed weights. Raises BadFile unless it holds, undamaged, what `key` names.

    extra: what was given to `write_file`. num_entries: packed weights in it.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._map, header = _map_file(path)
        fields = _read_header(header, key, len(self._map))
        self._entries: list[list[Any]] = fields["entries"]
        self._sections = [(int(at), int(count), int(total)) for at, count, total in fields["sections"]]
        self._orders: list[int] = fields["orders"]
        self.extra: dict[str, Any] = fields["extra"]
        if any(at < 0 or at % ALIGNMENT or at + count > len(self._map) for at, count, _ in self._sections):
            raise BadFile("a section lies outside the file")
        self._base = int(np.frombuffer(self._map, dtype=np.uint8).ctypes.data)
        if not _native.verify(self._base, self._sections):
            raise BadFile("a checksum does not fit")

    @property
    def num_entries(self) -> int:
        """Packed weights."""
        return len(self._entries)

    def shape(self, index: int) -> list[Any]:
        """How `shape_of` describes entry `index`."""
        return _shape(self._entries[index])

    def entry(self, index: int, level: int, out_dtype: torch.dtype | None) -> Packed:
        """The packed weight `index`, on the mapped memory; level: of the kernels that run it."""
        fields = self._entries[index]
        if _is_experts(fields):
            gate_up, down = ([self._linear(each, level, None) for each in part] for part in fields[1:])
            together = fields[0] == "together"
            return (
                NativeExperts(level, gate_up, down)
                if together
                else reference.Experts(list(zip(gate_up, down, strict=True)))
            )
        return self._linear(fields, level, out_dtype)

    def order(self, index: int) -> Tensor:
        """The integer tensor `index`, a copy."""
        part = self._section(self._orders[index])
        assert part is not None
        raw = self._map[part.address - self._base : part.address - self._base + part.nbytes]
        return torch.frombuffer(bytearray(raw), dtype=torch.int64)

    def _linear(self, fields: list[Any], level: int, out_dtype: torch.dtype | None) -> NativeLinear:
        *spec, panels, factors, bias = fields
        memory = self._section(panels)
        assert memory is not None
        return NativeLinear(
            level, PanelSpec(*spec), PanelParts(memory, self._section(factors), self._section(bias)), out_dtype
        )

    def _section(self, index: int | None) -> Mapped | None:
        if index is None:
            return None
        offset, count, _ = self._sections[index]
        return Mapped(self._base + offset, count, self._map)


def shape_of(packed: Packed) -> list[Any]:
    """What an entry and a call that packs must have in common: outputs, inputs, activation, bias; how many experts."""
    return _shape(_describe(packed, []))


def _is_experts(fields: list[Any]) -> bool:
    return isinstance(fields[0], str)


def _shape(fields: list[Any]) -> list[Any]:
    if _is_experts(fields):
        return [[len(part), *_shape(part[0])] for part in fields[1:]]
    _, n, k, _, activation, _, _, _, _, bias = fields
    return [n, k, activation, bias is not None]


def _map_file(path: Path) -> tuple[mmap.mmap, bytes]:
    """The file's memory and its header. Raises BadFile."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if hasattr(os, "geteuid") and status.st_uid not in (0, os.geteuid()):
                raise BadFile(f"it belongs to another user ({status.st_uid})")
            magic, length, checksum = _HEAD.unpack(file.read(_HEAD.size))
            if magic != MAGIC or length > status.st_size:
                raise BadFile("it is no file of packed weights")
            header = file.read(length)
            if len(header) != length or zlib.crc32(header) != checksum:
                raise BadFile("its header is damaged")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise BadFile("there is none") from error
    except (OSError, ValueError, struct.error) as error:
        raise BadFile(str(error)) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapped.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages
    return mapped, header


def _read_header(header: bytes, key: Mapping[str, Any], size: int) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(header)
    if fields["key"] != json.loads(json.dumps(key)):
        raise BadFile("it was made of another checkpoint, with other options or by another version")
    if fields["size"] != size:
        raise BadFile(f"it has {size:,} bytes instead of {fields['size']:,}")
    return fields
