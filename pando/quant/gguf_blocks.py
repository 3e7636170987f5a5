"""Block formats of GGUF tensors, as the weights they stand for. All numbers are little endian, d and m float16.

    Q4_0  d, 16 bytes               w = d (q - 8)    32 weights; byte i holds weights i (low half) and i + 16
    Q4_1  d, m, 16 bytes            w = d q + m
    Q5_0  d, 4 bytes, 16 bytes      w = d (q - 16)   bit i of the 4 bytes is the fifth bit of weight i
    Q5_1  d, m, 4 bytes, 16 bytes   w = d q + m
    Q8_0  d, 32 int8                w = d q
    Q4_K  d, m, 12 bytes, 128 bytes     256 weights in 8 groups: w = d a q - m b, with 6 bits for each a and b. Run r of
                                        32 bytes holds group 2 r in its low halves and 2 r + 1 in its high ones
    Q5_K  d, m, 12, 32, 128 bytes       bit g of the 32 bytes is the fifth bit of group g
    Q6_K  128, 64 bytes, 16 int8 a, d   256 weights in 16 groups: w = d a (q - 32); half h of 128 weights has its low 4
                                        bits in 64 bytes (weights l and l + 64 share byte l) and its high 2 in 32 bytes
                                        (weights l, l + 32, l + 64, l + 96 share byte l)

Every one but Q6_K becomes groups of 32 with the same scale and offset: nothing is rounded again. Q6_K becomes int8 in
groups of 16. Products round activations to int8 by group, as the format's own programs do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pando.kernels.weights import QuantizedWeight

Parts = tuple[Tensor, Tensor, Tensor | None]
"""Values [B, n], scales [B, groups] and offsets [B, groups] float32 of B blocks of n weights."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """A format: weights and bytes of a block, inputs of a group, and how a block is read ([B, bytes] uint8)."""

    weights: int
    bytes: int
    bits: int
    group: int
    read: Callable[[Tensor], Parts]


def _half(raw: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block: [B, 1] float32."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """[B, n] -> [B, 2 n]: all low halves, then all high ones."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _bits(raw: Tensor) -> Tensor:
    """[B, n] -> [B, n, 8] uint8 of 0 and 1, lowest bit first."""
    return raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1


def _q4_0(raw: Tensor) -> Parts:
    scale = _half(raw, 0)
    return _nibbles(raw[:, 2:]), scale, -8 * scale


def _q4_1(raw: Tensor) -> Parts:
    return _nibbles(raw[:, 4:]), _half(raw, 0), _half(raw, 2)


def _fifth_bits(raw: Tensor) -> Tensor:
    """4 bytes -> 32 weights, 0 or 16 each."""
    return _bits(raw).flatten(-2) << 4


def _q5_0(raw: Tensor) -> Parts:
    codes = (_nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])).view(torch.int8) - 16
    return codes, _half(raw, 0), None


def _q5_1(raw: Tensor) -> Parts:
    codes = (_nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])).view(torch.int8)
    return codes, _half(raw, 0), _half(raw, 2)


def _q8_0(raw: Tensor) -> Parts:
    return raw[:, 2:].contiguous().view(torch.int8), _half(raw, 0), None


def _k_lines(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets [B, 8] of a Q4_K or Q5_K block.

    Bytes 0..3 hold a of groups 0..3 and bytes 4..7 their b, 6 bits each; bytes 8..11 hold the low halves of a (low) and
    b (high) of groups 4..7, whose top bits are those of the first eight bytes.
    """
    low, middle, high = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    a = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), dim=-1)
    b = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), dim=-1)
    return a * _half(raw, 0), -(b * _half(raw, 2))


def _k_nibbles(raw: Tensor) -> Tensor:
    """128 bytes -> 256 weights: 4 runs of 32 bytes, low halves before high ones."""
    return _nibbles(raw.unflatten(-1, (4, 32))).flatten(-2)


def _q4_k(raw: Tensor) -> Parts:
    return _k_nibbles(raw[:, 16:]), *_k_lines(raw)


def _q5_k(raw: Tensor) -> Parts:
    fifth = _bits(raw[:, 16:48]).transpose(-1, -2).flatten(-2) << 4  # [group, weight of it]
    return (_k_nibbles(raw[:, 48:]) | fifth).view(torch.int8), *_k_lines(raw)


def _q6_k(raw: Tensor) -> Parts:
    low = _nibbles(raw[:, :128].unflatten(-1, (2, 64)))
    pairs = raw[:, 128:192].unflatten(-1, (2, 32)).unsqueeze(-2) >> torch.tensor([[0], [2], [4], [6]]).byte() & 3
    codes = (low | pairs.flatten(-2) << 4).view(torch.int8).flatten(-2) - 32
    return codes, raw[:, 192:208].contiguous().view(torch.int8) * _half(raw, 208), None


BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(32, 18, 4, 32, _q4_0),
    "Q4_1": BlockType(32, 20, 4, 32, _q4_1),
    "Q5_0": BlockType(32, 22, 8, 32, _q5_0),
    "Q5_1": BlockType(32, 24, 8, 32, _q5_1),
    "Q8_0": BlockType(32, 34, 8, 32, _q8_0),
    "Q4_K": BlockType(256, 144, 4, 32, _q4_k),
    "Q5_K": BlockType(256, 176, 8, 32, _q5_k),
    "Q6_K": BlockType(256, 210, 8, 16, _q6_k),
}
"""Quantised tensor types that can be read. F32, F16 and BF16 are plain tensors."""

PLAIN_TYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

BLOCKS_AT_ONCE = 1 << 14
"""So that what the bits pass through stays in the cache."""


def read_blocks(raw: Tensor, kind: BlockType, rows: int, columns: int) -> QuantizedWeight:
    """The matrix [rows, columns] of raw uint8 [rows * columns / weights, bytes]; a row is whole blocks."""
    per_row = columns // kind.weights
    values = torch.empty(rows * per_row, kind.weights, dtype=torch.uint8 if kind.bits == 4 else torch.int8)
    lines = [torch.empty(rows * per_row, kind.weights // kind.group) for _ in range(2)]
    with_offset = False
    for start in range(0, len(raw), BLOCKS_AT_ONCE):
        part = slice(start, start + BLOCKS_AT_ONCE)
        values[part], lines[0][part], offset = kind.read(raw[part])
        if offset is not None:
            lines[1][part] = offset
            with_offset = True
    scale, offset = (line.view(rows, -1) for line in lines)
    return QuantizedWeight(values.view(rows, columns), scale, offset if with_offset else None, kind.bits, kind.group, 8)
