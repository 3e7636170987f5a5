"""Weights in the layout of the product kernel, and the launch of it.

Legend: E experts (1 for a plain linear map), N outputs, K inputs, G groups of inputs, S pieces of K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pando.kernels.triton.launch import has_e4m3, num_sms
from pando.kernels.triton.product import join_kernel, product_kernel
from pando.kernels.weights import QuantizedWeight, UnroundedWeight, Weight

DENSE, INT8, INT4 = 0, 1, 2
"""Kinds of `product_kernel`."""


UNDER_WAY = 40 << 10
"""Bytes of weights that a multiprocessor should have on their way: 4.8 TB/s times a latency of 0.7 us are 3.4 MB, 26 KB
for each of an H200's, and a half more for the time between asking and asking again."""

SHARED = 100 << 10
"""Bytes of shared memory of a block, so that two fit on a multiprocessor, and the next begins while one ends."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights [E, N, K] of one shape and scheme.

    values: DENSE [E, N, K] floats, INT8 [E, N, K'] int8 or float8, INT4 [E, N, K' / 2] bytes; K' is K filled up
    with zeros.
    scale, offset [E, G, N] float16 or None: of groups, in units of `factor` [E, N] float32, which multiplies an output.
    bias [E, N] float32. half: H, the inputs of half a chunk of 4-bit weights. eight_bit_rows: whether many rows are to
    be rounded to 8 bits before the product.
    """

    kind: int
    num_inputs: int
    values: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    factor: Tensor | None = None
    bias: Tensor | None = None
    group_size: int = 0
    half: int = 0
    eight_bit_rows: bool = False

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        parts = (self.values, self.scale, self.offset, self.factor, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.values.shape[1]


@dataclass(frozen=True, slots=True)
class Tiles:
    """A configuration of the product kernel: outputs, rows and inputs of a tile, pieces of K, warps, stages."""

    outputs: int
    rows: int
    inputs: int
    pieces: int
    warps: int
    stages: int


def choose_tiles(matrix: Matrix, num_rows: int, gated: bool, sms: int, routed: bool = False) -> Tiles:
    """The configuration for so many rows (of an expert, if routed); it follows from shapes alone.

    Up to 16 rows reading the weight is all that counts. Tiles are 64 outputs high, 32 where 64 would not give every
    multiprocessor a block, and as many stages deep as it takes to keep `UNDER_WAY` bytes on their way. K is cut into
    pieces only where blocks would leave more than half of the multiprocessors idle, since joining pieces is a launch
    that takes as long as reading 8 MB. Many rows want large square tiles for the tensor cores: 128 x 128 in 8 warps
    (64 sums in each thread's registers); 64 rows for 4 bits, whose partial sums take registers, too.
    """
    k, n = matrix.num_inputs, matrix.num_outputs
    rows = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64 if num_rows <= 64 or matrix.kind == INT4 else 128
    if routed and matrix.kind == INT4:
        rows = min(rows, 32)  # more would not leave room for the sums of gate and up beside their partial sums
    inputs = _inputs(matrix, rows)
    if rows >= 64:
        return Tiles(64 if gated else 128, rows, inputs, 1, 8 if rows == 128 or not gated else 4, 3)
    width = n // 2 if gated else n
    outputs = 64 if width >= 64 * sms or (rows == 32 and width >= 64) else 32
    blocks = triton.cdiv(width, outputs)
    pieces = 1
    if not routed:
        # Twice the blocks per cut; a piece keeps enough steps to fill its pipeline and the join stays small.
        while blocks * pieces * 2 < sms and k // (pieces * 2) >= 4 * inputs:
            pieces *= 2
    tile = outputs * inputs * (2 if gated and pieces == 1 else 1) * matrix.values.itemsize
    tile //= 2 if matrix.kind == INT4 else 1
    if rows > 16 or routed:
        return Tiles(outputs, rows, inputs, pieces, 4, 4)
    # Of a block's stages one is being multiplied; more than two blocks on a multiprocessor take turns.
    wanted = 1 + triton.cdiv(UNDER_WAY * sms, tile * min(blocks * pieces, 2 * sms))
    fitting = min(SHARED // (tile + 2 * rows * inputs), k // (pieces * inputs))
    return Tiles(outputs, rows, inputs, pieces, 4, max(3, min(wanted, fitting, 8)))


def _inputs(matrix: Matrix, rows: int) -> int:
    """Inputs of a tile: as wide as groups allow, 256 bytes of a weight's row for few rows, less for many."""
    if matrix.kind == INT4:
        return 2 * matrix.half
    wide = (128 if rows <= 32 else 64) if matrix.kind == DENSE else 128
    return min(wide, matrix.half) if matrix.half else wide


@dataclass(frozen=True, slots=True)
class Routing:
    """Rows of a mixture: tiles [tiles, 3] int32 (expert or -1, first and end in the list), sorted pairs int32.

    gather: rows are read from the tokens of the pairs, `choices` of which belong to a token. Else rows are read in the
    list's order and written to the places of their pairs.
    """

    tiles: Tensor
    pairs: Tensor
    choices: int
    gather: bool


def product(
    x: Tensor,
    matrix: Matrix,
    tiles: Tiles,
    out: Tensor,
    *,
    activation: int = -1,
    row_scale: Tensor | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """out [rows, N or N / 2] = the linear map of x [rows, K], with a gated activation if its code is not -1.

    row_scale [rows of x] float32 multiplies rows; int8 and float8 x need it.
    """
    num_rows, n, split = out.shape[0], matrix.num_outputs, tiles.pieces > 1
    assert x.stride(1) == 1 and out.is_contiguous(), (x.stride(), out.stride())
    gated = activation if not split else -1
    target = out
    if split:
        target = torch.empty(tiles.pieces, num_rows, n, dtype=torch.float32, device=x.device)
    steps = triton.cdiv(triton.cdiv(matrix.num_inputs, tiles.inputs), tiles.pieces)
    row_tiles = triton.cdiv(num_rows, tiles.rows) if routing is None else routing.tiles.shape[0]
    width = n // 2 if gated >= 0 else n
    product_kernel[(triton.cdiv(width, tiles.outputs), row_tiles, tiles.pieces)](
        x,
        row_scale,
        *(matrix.values, matrix.scale, matrix.offset, matrix.factor, matrix.bias),
        target,
        None if routing is None else routing.tiles,
        None if routing is None else routing.pairs,
        num_rows,
        n,
        matrix.num_inputs,
        x.stride(0),
        matrix.values.stride(1),
        1 if matrix.scale is None else matrix.scale.shape[1],
        max(matrix.group_size, 1),
        steps,
        1 if routing is None else routing.choices,
        KIND=matrix.kind,
        GATED=gated,
        SPLIT=split,
        EVEN=matrix.num_inputs % tiles.inputs == 0,
        GATHER=routing is not None and routing.gather,
        BN=tiles.outputs,
        BM=tiles.rows,
        BK=tiles.inputs,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if split:
        _join(target, matrix, out, activation, row_scale)
    return out


def _join(parts: Tensor, matrix: Matrix, out: Tensor, activation: int, row_scale: Tensor | None) -> None:
    block = min(512, triton.next_power_of_2(out.shape[1]))
    join_kernel[(out.shape[0], triton.cdiv(out.shape[1], block))](
        parts,
        row_scale,
        matrix.factor,
        matrix.bias,
        out,
        parts.shape[2],
        parts.shape[0],
        GATED=activation,
        BLOCK=block,
        num_warps=4,
    )


def tiles_for(matrix: Matrix, x: Tensor, num_rows: int, gated: bool, routed: bool = False) -> Tiles:
    """`choose_tiles` for the device of x."""
    return choose_tiles(matrix, num_rows, gated, num_sms(x.device), routed)


def pack(weights: Sequence[Weight], bias: Tensor | None = None) -> Matrix:
    """Weights of one shape. bias [E, N]. Schemes without kernels, and several beside each other, become bfloat16."""
    bias = None if bias is None else bias.float().contiguous()
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    schemes = {each.scheme for each in quantized}
    if len(quantized) == len(weights) and len(schemes) == 1 and _half(quantized[0]) and _has_values(quantized[0]):
        return _pack_quantized(quantized, bias)
    dense = [_floats(weight) for weight in weights]
    values = dense[0].unsqueeze(0) if len(dense) == 1 else torch.stack(dense)
    return Matrix(DENSE, values.shape[2], values.contiguous(), bias=bias)


def _floats(weight: Weight) -> Tensor:
    assert not isinstance(weight, UnroundedWeight), "only a table that rounds takes it"
    return weight if isinstance(weight, Tensor) else weight.dequantize().bfloat16()


def _has_values(weight: QuantizedWeight) -> bool:
    """Whether the device has the type of the values."""
    return has_e4m3() if weight.is_float else True


def _half(weight: QuantizedWeight) -> int:
    """Inputs that surely have one scale, 32 to 128, a power of two; 0 if groups do not fall into such pieces."""
    k = weight.shape[1]
    if weight.group_size >= k:
        return 64 if weight.bits == 4 else 128
    return next((size for size in (128, 64, 32) if weight.group_size % size == 0), 0)


def _pack_quantized(weights: Sequence[QuantizedWeight], bias: Tensor | None) -> Matrix:
    first, half = weights[0], min(_half(weights[0]), 64 if weights[0].bits == 4 else 128)
    k, chunk = first.shape[1], 2 * half if first.bits == 4 else half
    values = torch.stack([weight.values for weight in weights])
    values = torch.nn.functional.pad(values, (0, -k % chunk))
    if first.bits == 4:
        low, high = values.unflatten(2, (-1, 2, half)).unbind(3)
        values = (low | high << 4).flatten(2)
    scale = torch.stack([weight.scale for weight in weights])
    no_offsets = all(weight.offset is None for weight in weights)
    offset = None if no_offsets else torch.stack([_offset(weight) for weight in weights])
    grouped = scale.shape[2] > 1 or offset is not None or first.bits == 4
    factor, parts = _in_units(scale, offset) if grouped else (scale.squeeze(2), (None, None))
    return Matrix(
        INT4 if first.bits == 4 else INT8,
        k,
        values.contiguous(),
        parts[0],
        parts[1],
        factor.float().contiguous(),
        bias,
        group_size=first.group_size,
        half=half,
        eight_bit_rows=first.bits == 8 and first.activation_bits == 8 and not grouped,
    )


def _offset(weight: QuantizedWeight) -> Tensor:
    """Its offsets; zeros if it has none."""
    return torch.zeros_like(weight.scale) if weight.offset is None else weight.offset


def _in_units(scale: Tensor, offset: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """A power of two per output [E, N], and scales and offsets [E, G, N] in its units as float16.

    Exact for scales that came as float16 or bfloat16 within a range of 2^24, within 2^-11 for others.
    """
    largest = scale.abs().amax(2)
    factor = torch.exp2(torch.floor(torch.log2(largest.clamp(min=1e-30))))
    units = (scale / factor.unsqueeze(2)).half().transpose(1, 2).contiguous()
    if offset is None:
        return factor, (units, None)
    return factor, (units, (offset / factor.unsqueeze(2)).half().transpose(1, 2).contiguous())
