"""Ops on logits [R, V]: a row is cut into pieces for many programs, whose results a second kernel joins in order.

A vocabulary has 30 to 260 thousand entries and a decode step as few as one row: one program per row would leave nearly
the whole GPU idle.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.triton.launch import CompileCase, meta

PIECE = 4096
"""Logits per program: 32 a thread of four warps, eight 16-byte loads in flight in each."""


@triton.jit
def ordered(x):
    """int32 that compare as the float32 x do; 0.0 and -0.0 alike, every NaN above all numbers."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    # Negative numbers count down from -1; the bits of the others are in order already.
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def _best_piece_kernel(logits_ptr, piece_ptr, vocab, pieces, FINITE: tl.constexpr, PIECE: tl.constexpr):
    """The best (key, lowest id) of a piece as one int64 that is largest for it; FINITE: 1 if a logit is not finite."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = piece * PIECE + tl.arange(0, PIECE)
    inside = place < vocab
    x = tl.load(logits_ptr + row * vocab + place, mask=inside, other=0.0)
    if FINITE:
        best = tl.max(((tl.abs(x) < float("inf")) == 0).to(tl.int64), 0)
    else:
        packed = (ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)
        best = tl.max(tl.where(inside, packed, -0x8000000000000000), 0)
    tl.store(piece_ptr + row * pieces + piece, best)


@triton.jit
def _best_row_kernel(piece_ptr, out_ptr, pieces, FINITE: tl.constexpr, PIECES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES)
    other: tl.constexpr = 0 if FINITE else -0x8000000000000000
    best = tl.max(tl.load(piece_ptr + row * pieces + piece, mask=piece < pieces, other=other), 0)
    if FINITE:
        tl.store(out_ptr + row, best == 0)
    else:
        is_number = (best >> 32) != 0x7FFFFFFF
        tl.store(out_ptr + row, tl.where(is_number, 0x7FFFFFFF - (best & 0xFFFFFFFF), 0))


def _best(logits: Tensor, finite: bool) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.bool if finite else torch.int64, device=logits.device)
    if rows:
        pieces = triton.cdiv(vocab, PIECE)
        scratch = torch.empty(rows, pieces, dtype=torch.int64, device=logits.device)
        _best_piece_kernel[(rows, pieces)](logits, scratch, vocab, pieces, FINITE=finite, PIECE=PIECE, num_warps=4)
        _best_row_kernel[(rows,)](
            scratch, out, pieces, FINITE=finite, PIECES=triton.next_power_of_2(pieces), num_warps=1
        )
    return out


def argmax(logits: Tensor) -> Tensor:
    """`OpTable.argmax`; 0 for a row that holds a NaN."""
    return _best(logits.contiguous(), finite=False)


def finite(logits: Tensor) -> Tensor:
    """`OpTable.finite`."""
    return _best(logits.contiguous(), finite=True)


@triton.jit
def _sum_piece_kernel(logits_ptr, largest_ptr, total_ptr, vocab, pieces, PIECE: tl.constexpr):
    """The largest logit of a piece, and the sum of exp(logit - largest)."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits_ptr + row * vocab + place, mask=place < vocab, other=float("-inf"))
    largest = tl.max(x, 0)
    # A piece of nothing but -inf has the sum 0, not the NaN of inf - inf.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(largest_ptr + row * pieces + piece, largest)
    tl.store(total_ptr + row * pieces + piece, tl.sum(tl.exp(x - shift), 0))


@triton.jit
def _logprob_kernel(logits_ptr, token_ptr, largest_ptr, total_ptr, out_ptr, vocab, pieces, PIECES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES)
    at = row * pieces + piece
    largest = tl.load(largest_ptr + at, mask=piece < pieces, other=float("-inf"))
    total = tl.load(total_ptr + at, mask=piece < pieces, other=0.0)
    top = tl.max(largest, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.sum(tl.where(total == 0.0, 0.0, total * tl.exp(largest - shift)), 0)
    chosen = tl.load(logits_ptr + row * vocab + tl.load(token_ptr + row))
    tl.store(out_ptr + row, chosen - (shift + tl.log(mass)))


def logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """`OpTable.logprobs`."""
    logits = logits.contiguous()
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        pieces = triton.cdiv(vocab, PIECE)
        largest, total = torch.empty(2, rows, pieces, dtype=torch.float32, device=logits.device)
        _sum_piece_kernel[(rows, pieces)](logits, largest, total, vocab, pieces, PIECE=PIECE, num_warps=4)
        _logprob_kernel[(rows,)](
            logits,
            token_ids,
            largest,
            total,
            out,
            vocab,
            pieces,
            PIECES=triton.next_power_of_2(pieces),
            num_warps=1,
        )
    return out


@triton.jit
def _mask_kernel(logits_ptr, mask_ptr, vocab, words, mask_stride, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = place < vocab
    word = tl.load(mask_ptr + row * mask_stride + place // 32, mask=inside, other=-1)
    blocked = inside & (((word >> (place % 32)) & 1) == 0)
    tl.store(logits_ptr + row * vocab + place, tl.full((PIECE,), float("-inf"), tl.float32), mask=blocked)


def apply_token_mask_(logits: Tensor, mask: Tensor) -> None:
    """`OpTable.apply_token_mask_`: reads the mask alone and writes what it blocks."""
    assert logits.is_contiguous() and mask.stride(1) == 1, (logits.stride(), mask.stride())
    rows, vocab = logits.shape
    if rows:
        grid = (rows, triton.cdiv(vocab, PIECE))
        _mask_kernel[grid](logits, mask, vocab, mask.shape[1], mask.stride(0), PIECE=PIECE, num_warps=4)


@triton.jit
def _count_kernel(history_ptr, prompt_ptr, len_ptr, count_ptr, vocab, history_stride, BLOCK: tl.constexpr):
    """counts[row, token] = 2 * its times in the output + (1 if it is in the prompt)."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    written = place < tl.load(len_ptr + row)
    token = tl.load(history_ptr + row * history_stride + place, mask=written, other=0)
    generated = written & (place >= tl.load(prompt_ptr + row))
    at = count_ptr + row * vocab + token
    tl.atomic_or(at, tl.full((BLOCK,), 1, tl.int32), mask=written & (generated == 0), sem="relaxed")
    tl.atomic_add(at, tl.full((BLOCK,), 2, tl.int32), mask=generated, sem="relaxed")


@triton.jit
def _penalty_kernel(
    logits_ptr,
    history_ptr,
    len_ptr,
    count_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    vocab,
    history_stride,
    BLOCK: tl.constexpr,
):
    """The first place of a token in the history that gets here takes its count, and changes its logit."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    written = place < tl.load(len_ptr + row)
    token = tl.load(history_ptr + row * history_stride + place, mask=written, other=0)
    taken = tl.atomic_xchg(count_ptr + row * vocab + token, tl.zeros((BLOCK,), tl.int32), mask=written, sem="relaxed")
    mine = written & (taken != 0)
    at = logits_ptr + row * vocab + token
    x = tl.load(at, mask=mine, other=0.0)
    repetition = tl.load(repetition_ptr + row)
    x = tl.where(x > 0, x / repetition, x * repetition)
    times = (taken >> 1).to(tl.float32)
    x -= tl.load(frequency_ptr + row) * times
    x -= tl.load(presence_ptr + row) * (times > 0).to(tl.float32)
    tl.store(at, x, mask=mine)


def apply_penalties_(
    logits: Tensor,
    history: Tensor,
    prompt_lens: Tensor,
    lens: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """`OpTable.apply_penalties_`: counts in scratch memory [R, V], then one visit to each token of the history."""
    assert logits.is_contiguous() and history.stride(1) == 1, (logits.stride(), history.stride())
    (rows, vocab), block = logits.shape, 512
    if rows == 0 or history.shape[1] == 0:
        return
    counts = torch.zeros(rows, vocab, dtype=torch.int32, device=logits.device)
    grid = (rows, triton.cdiv(history.shape[1], block))
    stride = history.stride(0)
    _count_kernel[grid](history, prompt_lens, lens, counts, vocab, stride, BLOCK=block, num_warps=4)
    _penalty_kernel[grid](
        logits,
        history,
        lens,
        counts,
        repetition,
        frequency,
        presence,
        vocab,
        stride,
        BLOCK=block,
        num_warps=4,
    )


def _rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return meta(3, dtype=dtype)


COMPILE_CASES = (
    *(
        CompileCase(f"{op.__name__}-{vocab}", partial(op, meta(3, vocab, dtype=torch.float32)))
        for op in (argmax, finite)
        for vocab in (128256, 151936)
    ),
    CompileCase("logprobs", partial(logprobs, meta(3, 151936, dtype=torch.float32), _rows(torch.int64))),
    CompileCase(
        "mask", partial(apply_token_mask_, meta(3, 151936, dtype=torch.float32), meta(3, 4748, dtype=torch.int32))
    ),
    CompileCase(
        "penalties",
        partial(
            apply_penalties_,
            meta(3, 151936, dtype=torch.float32),
            meta(3, 40960, dtype=torch.int32),
            _rows(torch.int32),
            _rows(torch.int32),
            *(_rows() for _ in range(3)),
        ),
    ),
)
