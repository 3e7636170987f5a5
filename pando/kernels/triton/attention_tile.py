"""The inside of an attention kernel: a tile of query rows against a range of keys of one page table.

A tile has BLOCK_M query rows: HT heads of one KV head for each of its tokens, row m being head m % HT of token m // HT.
Head dims are held as a power of two (D1, V1) and a rest (D2, V2; 0: none), so that 80, 96, 192 or 576 waste nothing and
the 512 values of a latent are the first part of its key. Scores are in the base-2 logarithm, sums in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pando.kernels.triton.int8_cache import load_scale, values_at


@triton.jit
def load_kv(
    base_ptr, slot, stride, inside,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr, DTYPE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[N, WIDTH] of a cache from dim FIRST on, in DTYPE. The one place where KV is read, whatever it is stored as."""
    dim = FIRST + tl.arange(0, WIDTH)
    INTEGER: tl.constexpr = base_ptr.dtype.element_ty.is_int()
    row = base_ptr + slot * stride
    if INTEGER:
        at = values_at(row)[:, None] + dim[None, :]
    else:
        at = row[:, None] + dim[None, :]
    if FIRST + WIDTH > LIMIT:
        fits = dim[None, :] < LIMIT
        x = tl.load(at, mask=(inside[:, None] & fits) if MASKED else fits, other=0.0)
    elif MASKED:
        x = tl.load(at, mask=inside[:, None], other=0.0)
    else:
        x = tl.load(at)
    if INTEGER:
        x = x.to(tl.float32) * load_scale(row, inside, LIMIT, MASKED)[:, None]
    return x.to(DTYPE)


@triton.jit
def load_q(q_ptr, row_at, is_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """[M, WIDTH] of the queries from dim FIRST on, zeros outside."""
    dim = FIRST + tl.arange(0, WIDTH)
    return tl.load(q_ptr + row_at[:, None] + dim[None, :], mask=is_row[:, None] & (dim[None, :] < LIMIT), other=0.0)


@triton.jit
def visible(
    position, key, low, high, window, mask_ptr, step_start, num_queries,
    HAS_WINDOW: tl.constexpr, HAS_TREE: tl.constexpr,
):  # fmt: skip
    """[M, N]: whether a query sees a key. mask_ptr: the tree mask of the row, whose step starts at step_start."""
    seen = key[None, :] <= position[:, None]
    if HAS_WINDOW:
        seen = seen & (position[:, None] - key[None, :] < window)
    if HAS_TREE:
        own = key[None, :] >= step_start
        at = (position[:, None] - step_start) * num_queries + (key[None, :] - step_start)
        marked = tl.load(mask_ptr + at, mask=own & (key[None, :] < high) & (position[:, None] >= 0), other=0) != 0
        seen = tl.where(own, marked, seen)
    return seen & (key[None, :] >= low) & (key[None, :] < high)


@triton.jit
def sweep(
    state, q1, q2, position, begin, end, low, high,
    table_ptr, k_ptr, v_ptr, k_stride, v_stride, log_scale, cap_in, window, mask_ptr, step_start, num_queries,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    LATENT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TREE: tl.constexpr,
    MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Blocks of keys begin .. end - 1 (multiples of BLOCK_N) added to the state (acc1, acc2, most, total).

    Only keys low .. high - 1 are read, and masks are looked at, where MASKED. Scores are log_scale * q k, or
    log_scale * tanh(cap_in / (2 log2 e) * q k) with HAS_CAP. `total` is the sum of 2 ** (score - most).
    """
    acc1, acc2, most, total = state
    # Pages are looked up one block ahead: the loads of a block then depend on nothing that is still under way.
    key = begin + tl.arange(0, BLOCK_N)
    page = tl.load(table_ptr + key // PAGE, mask=(key >= low) & (key < high), other=0)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_N)
        inside = (key >= low) & (key < high)
        slot = page.to(tl.int64) * PAGE + key % PAGE
        ahead = key + BLOCK_N
        page = tl.load(table_ptr + ahead // PAGE, mask=(ahead >= low) & (ahead < high), other=0)
        k1 = load_kv(k_ptr, slot, k_stride, inside, 0, D1, D, q1.dtype, MASKED)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if D2 > 0:
            k2 = load_kv(k_ptr, slot, k_stride, inside, D1, D2, D, q1.dtype, MASKED)
            score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
        score = score * log_scale if not HAS_CAP else log_scale * (1 - 2 / (1 + tl.exp2(score * cap_in)))
        if MASKED:
            seen = visible(position, key, low, high, window, mask_ptr, step_start, num_queries, HAS_WINDOW, HAS_TREE)
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        # A query that has seen nothing yet: its weights must come out as 0, not as -inf - -inf.
        shift = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        weight = tl.exp2(score - shift[:, None])
        fade = tl.exp2(most - shift)
        total = total * fade + tl.sum(weight, 1)
        most = higher
        acc1 = acc1 * fade[:, None]
        rounded = weight.to(q1.dtype)
        v1 = k1 if LATENT else load_kv(v_ptr, slot, v_stride, inside, 0, V1, DV, q1.dtype, MASKED)
        acc1 = tl.dot(rounded, v1, acc1, input_precision="ieee")
        if V2 > 0:
            acc2 = acc2 * fade[:, None]
            v2 = load_kv(v_ptr, slot, v_stride, inside, V1, V2, DV, q1.dtype, MASKED)
            acc2 = tl.dot(rounded, v2, acc2, input_precision="ieee")
    return acc1, acc2, most, total


@triton.jit
def attend(
    q1, q2, position, low, high, seen_from, seen_to,
    table_ptr, k_ptr, v_ptr, k_stride, v_stride, log_scale, cap_in, window, mask_ptr, step_start, num_queries,
    BLOCK_M: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    LATENT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TREE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """State of a tile after the keys low .. high - 1, of which all queries see seen_from .. seen_to - 1.

    low    seen_from               seen_to   high
     |-masked-|------- no masks -------|-masked-|      borders of the middle moved inwards to whole blocks
    """
    begin = low // BLOCK_N * BLOCK_N
    middle = tl.maximum((seen_from + BLOCK_N - 1) // BLOCK_N * BLOCK_N, begin)
    late = seen_to // BLOCK_N * BLOCK_N
    has_middle = middle < late
    middle, late = tl.where(has_middle, middle, begin), tl.where(has_middle, late, begin)
    acc1 = tl.zeros((BLOCK_M, V1), tl.float32)
    acc2 = tl.zeros((BLOCK_M, V2 if V2 > 0 else 1), tl.float32)
    state = (acc1, acc2, tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32))
    if HAS_WINDOW:
        state = sweep(
            state, q1, q2, position, begin, middle, low, high,
            table_ptr, k_ptr, v_ptr, k_stride, v_stride, log_scale, cap_in, window, mask_ptr, step_start, num_queries,
            PAGE, BLOCK_N, D, D1, D2, DV, V1, V2, LATENT, HAS_CAP, HAS_WINDOW, HAS_TREE, True, STAGES,
        )  # fmt: skip
    state = sweep(
        state, q1, q2, position, middle if HAS_WINDOW else begin, late, low, high,
        table_ptr, k_ptr, v_ptr, k_stride, v_stride, log_scale, cap_in, window, mask_ptr, step_start, num_queries,
        PAGE, BLOCK_N, D, D1, D2, DV, V1, V2, LATENT, HAS_CAP, HAS_WINDOW, HAS_TREE, False, STAGES,
    )  # fmt: skip
    # Half of the registers are sums of a latent: masks find room beside half the keys.
    REST_N: tl.constexpr = BLOCK_N // 2 if LATENT and BLOCK_N > 16 else BLOCK_N
    state = sweep(
        state, q1, q2, position, late, high, low, high,
        table_ptr, k_ptr, v_ptr, k_stride, v_stride, log_scale, cap_in, window, mask_ptr, step_start, num_queries,
        PAGE, REST_N, D, D1, D2, DV, V1, V2, LATENT, HAS_CAP, HAS_WINDOW, HAS_TREE, True, STAGES,
    )  # fmt: skip
    return state
