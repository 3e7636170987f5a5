"""Rounding plain matrices to 8 and 4 bits. Legend: N outputs, K inputs, G groups of inputs, g inputs of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pando.kernels.weights import QuantizedWeight

BLOCK = 1 << 19
"""Elements rounded at once: 2 MiB of float32 and as much scratch stay in the second-level cache of the cores."""

FITS = 2
"""Least-squares corrections of a group's line. On Gaussian weights in groups of 64 the error falls from 9.0 % (the line
through the extremes) to 8.6 % with two; a grid over six clipping ratios costs twice as much and reaches the same."""


def _blocks(parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, slice]]:
    """About `BLOCK` elements each of the parts, in float32, and their rows in the whole."""
    done, columns = 0, parts[0].shape[1]
    step = max(1, BLOCK // columns)
    scratch = torch.empty(min(step, max(len(part) for part in parts)), columns, device=parts[0].device)
    for part in parts:
        for start in range(0, len(part), step):
            block = part[start : start + step]
            yield scratch[: len(block)].copy_(block), slice(done + start, done + start + len(block))
        done += len(part)


def per_output(parts: Sequence[Tensor], activation_bits: int) -> QuantizedWeight:
    """Parts [n_i, K] of one weight as int8 with one scale per output: its largest |w| / 127, ties to even."""
    rows, columns = sum(len(part) for part in parts), parts[0].shape[1]
    values = torch.empty(rows, columns, dtype=torch.int8, device=parts[0].device)
    scale = torch.empty(rows, 1, device=values.device)
    for wide, block in _blocks(parts):
        torch.div(wide.abs().amax(-1, keepdim=True), 127, out=scale[block])
        values[block] = wide.mul_(_reciprocal(scale[block])).round_()
    return QuantizedWeight(values, scale, None, 8, columns, activation_bits)


LARGEST_E4M3 = 448.0


def per_output_float8(parts: Sequence[Tensor], activation_bits: int) -> QuantizedWeight:
    """Parts [n_i, K] of one weight as float8 e4m3 with one scale per output: its largest |w| / 448."""
    rows, columns = sum(len(part) for part in parts), parts[0].shape[1]
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=parts[0].device)
    scale = torch.empty(rows, 1, device=values.device)
    for wide, block in _blocks(parts):
        torch.div(wide.abs().amax(-1, keepdim=True), LARGEST_E4M3, out=scale[block])
        values[block].copy_(wide.mul_(_reciprocal(scale[block])))
    return QuantizedWeight(values, scale, None, 8, columns, activation_bits)


def four_bits(parts: Sequence[Tensor], group_size: int, activation_bits: int) -> QuantizedWeight:
    """Parts [n_i, K] of one weight in 4 bits: a group of inputs of an output gets scale * v + offset, v in 0..15.

    That line starts as the one through the group's extremes; then, `FITS` times, values are rounded to it and the line
    is fitted to the weights by least squares.
    """
    rows, columns = sum(len(part) for part in parts), parts[0].shape[1]
    values = torch.empty(rows, columns, dtype=torch.uint8, device=parts[0].device)
    groups, full = -(-columns // group_size), columns // group_size * group_size
    scale, offset = (torch.empty(rows, groups, device=values.device) for _ in range(2))
    for wide, block in _blocks(parts):
        for start, stop, size in ((0, full, group_size), (full, columns, columns - full)):
            if start == stop:
                continue
            line = slice(start // group_size, -(-stop // group_size))
            codes, scale[block, line], offset[block, line] = _fit_lines(wide[:, start:stop].unflatten(-1, (-1, size)))
            values[block, start:stop] = codes.flatten(-2)
    return QuantizedWeight(values, scale, offset, 4, group_size, activation_bits)


def _fit_lines(wide_NGg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, G, g] in float32, scales [N, G] and offsets [N, G].

    One rounding per operation and one order for sums: csrc/kernels/rounding.cpp gives the same bits.
    """
    low, high, size = wide_NGg.amin(-1, keepdim=True), wide_NGg.amax(-1, keepdim=True), wide_NGg.shape[-1]
    scale, offset = (high - low) / 15, low
    codes, scratch = torch.empty_like(wide_NGg), torch.empty_like(wide_NGg)
    mean = tree_sum(wide_NGg) / size
    for fit in range(FITS + 1):
        inverse = _reciprocal(scale)
        torch.mul(wide_NGg, inverse, out=codes)
        codes.sub_(offset * inverse).clamp_(0, 15).round_()
        if fit == FITS:
            break
        code_mean = tree_sum(codes) / size
        torch.sub(codes, code_mean, out=codes)
        spread = tree_sum(torch.mul(codes, codes, out=scratch))
        product = tree_sum(torch.mul(codes, wide_NGg, out=scratch))
        scale = torch.where(spread > 0, product / spread, scale)
        offset = mean - scale * code_mean
    return codes, scale.squeeze(-1), offset.squeeze(-1)


def tree_sum(x: Tensor) -> Tensor:
    """[..., g] -> [..., 1] float32: the second half is added to the first until one number is left.

    g is filled up with zeros to a power of two. Unlike with `Tensor.sum`, whose order depends on the processor, every
    machine gets the same bits.
    """
    size = x.shape[-1]
    full = 1 << (size - 1).bit_length()
    if full != size:
        x = torch.nn.functional.pad(x, (0, full - size))
    while full > 1:
        full //= 2
        x = x[..., :full] + x[..., full:]
    return x


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, 0 where scale is too small to have one: there all values are alike."""
    return torch.where(scale > 1e-37, 1 / scale, 0.0)
