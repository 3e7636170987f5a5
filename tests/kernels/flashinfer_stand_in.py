"""What is used of `flashinfer`, in plain torch, as its documentation has it, and stricter.

Misuse that the library would not notice, or would answer with wrong numbers, raises here. `plan` looks at host memory
and may not be part of a recording. `run` is one operation that reads nothing but device memory: the buffers that the
plan filled. It fails if the workspace is another plan's by then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from tests.runtime.recorded import _Tape

HEAD_DIMS = {64, 128, 256}
GROUP_SIZES = {1, 2, 3, 4, 8}
"""Query heads of a KV head that decoding without tensor cores knows."""

_numbers = count(1)


def _ints(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.unbind()]


def _check(condition: bool, *what: object) -> None:
    if not condition:
        raise ValueError(what)


class _Wrapper:
    """What both wrappers do. `strict`: the real sizes of heads and dtypes only."""

    strict = True
    made: list[_Wrapper] = []

    def __init__(self, floats: Tensor, layout: str, use_cuda_graph: bool, buffers: Sequence[Tensor | None]) -> None:
        _check(layout == "NHD" and floats.dtype is torch.uint8 and floats.dim() == 1, layout, floats.dtype)
        _check(floats.data_ptr() % 16 == 0, "alignment")
        self.floats, self.graph = floats, use_cuda_graph
        self.ints = torch.empty(8 << 20, dtype=torch.uint8, device=floats.device)
        if use_cuda_graph:
            for buffer in buffers:
                _check(isinstance(buffer, Tensor) and buffer.dtype is torch.int32, "an int32 buffer is missing")
        else:
            _check(all(buffer is None for buffer in buffers), "buffers without a graph")
        self.number, self.plans, self.runs = next(_numbers), 0, 0
        self.options: dict[str, Any] = {}
        self.sizes: tuple[int, ...] = ()
        _Wrapper.made.append(self)

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        _check(int_workspace_buffer.dtype is torch.uint8 and int_workspace_buffer.numel() >= 8 << 20, "ints")
        self.floats, self.ints = float_workspace_buffer, int_workspace_buffer

    def _planned(
        self, lengths: Sequence[Tensor], seq_lens: Tensor, sizes: tuple[int, ...], options: dict[str, Any]
    ) -> tuple[list[int], ...]:
        """The host's copy of indptr, last_page_len and seq_lens, checked."""
        modes = _get_current_dispatch_mode_stack()
        _check(not any(isinstance(mode, _Tape) for mode in modes), "planned in a recording")
        indptr, indices, last = lengths
        heads, kv_heads, head_dim, page_size = sizes
        _check(all(type(size) is int for size in sizes) and heads % kv_heads == 0, sizes)
        _check(all(t.dtype is torch.int32 and t.is_contiguous() for t in (*lengths, seq_lens)), "int32")
        _check(head_dim in HEAD_DIMS or not self.strict, head_dim)
        dtypes = (options["q_data_type"], options["kv_data_type"])
        _check(dtypes[0] in (torch.float16, torch.bfloat16) or not self.strict, dtypes)
        _check(dtypes[1] in (dtypes[0], torch.float8_e4m3fn, torch.float8_e5m2), dtypes)
        _check(options["window_left"] >= -1 and options["logits_soft_cap"] >= 0.0 and options["sm_scale"] > 0, options)
        with _disable_current_modes():
            ends, rest, lens = _ints(indptr), _ints(last), _ints(seq_lens)
        _check(ends[0] == 0 and len(ends) == len(rest) + 1 == len(lens) + 1, ends, rest)
        _check(indices.shape == (ends[-1],), indices.shape, ends)
        for row, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
            _check(end > begin and 1 <= rest[row] <= page_size, "a row without keys", row)
            _check(lens[row] == (end - begin - 1) * page_size + rest[row], "seq_lens", row)
        self.plans += 1
        self.options, self.sizes = options, sizes
        return ends, rest, lens

    def _keep(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """Copy to the buffers of a graph, or to new memory."""
        for name, value in zip(names, values, strict=True):
            if self.graph:
                buffer = getattr(self, name)
                whole = "indices" not in name
                _check(buffer.shape[0] == value.shape[0] if whole else buffer.shape[0] >= value.shape[0], name)
                buffer[: value.shape[0]].copy_(value)
                buffer[value.shape[0] :].fill_(1 << 30)  # a page that is not there
            else:
                setattr(self, name, value.clone())

    def _sign(self, lens: list[int]) -> None:
        """Leave the plan in the workspace."""
        with _disable_current_modes():
            signed = torch.tensor([self.number, *lens], dtype=torch.int32)
            self.ints.view(torch.int32)[: len(signed)] = signed

    def _run(self, q: Tensor, cache: tuple[Tensor, Tensor], qo_indptr: Tensor, causal: bool, out: Tensor) -> Tensor:
        heads, kv_heads, head_dim, page_size = self.sizes
        (k, v), options = cache, self.options
        _check(self.plans > 0, "run before plan")
        _check(q.dtype is options["q_data_type"] and k.dtype is v.dtype is options["kv_data_type"], q.dtype, k.dtype)
        _check(q.shape[1:] == (heads, head_dim), q.shape)
        _check(k.shape == v.shape and k.shape[1:] == (page_size, kv_heads, head_dim), k.shape, v.shape)
        _check(k.stride() == v.stride(), "K/V strides differ")
        for tensor in (q, k, v):
            _check(tensor.stride(-1) == 1 and tensor.data_ptr() % (16 if self.strict else 1) == 0, "alignment")
        _check(out.shape == q.shape and out.dtype is q.dtype and out.is_contiguous(), out.shape)
        _check(q.device == k.device == self.floats.device, q.device)
        self.runs += 1
        numbers = (options["sm_scale"], options["logits_soft_cap"], options["window_left"], causal, self.number)
        lists = (qo_indptr, self._paged_kv_indptr, self._paged_kv_indices, self._paged_kv_last_page_len)
        torch.ops.flashinfer_stand_in.run(q, k, v, *lists, self.ints, out, *numbers)
        return out

    _paged_kv_indptr: Tensor
    _paged_kv_indices: Tensor
    _paged_kv_last_page_len: Tensor


_LISTS = ("_paged_kv_indptr", "_paged_kv_indices", "_paged_kv_last_page_len")


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """One query a row."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
    ) -> None:
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        self.tensor_cores = use_tensor_cores
        for name, buffer in zip(_LISTS, buffers, strict=True):
            if buffer is not None:
                setattr(self, name, buffer)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        seq_lens: Tensor,
        non_blocking: bool = True,
        **options: Any,
    ) -> None:
        _check(set(options) == {"window_left", "logits_soft_cap", "sm_scale", "q_data_type", "kv_data_type"}, options)
        group = num_qo_heads // num_kv_heads
        _check(self.tensor_cores or group in GROUP_SIZES, "group size", group)
        lengths, sizes = (indptr, indices, last_page_len), (num_qo_heads, num_kv_heads, head_dim, page_size)
        _, _, lens = self._planned(lengths, seq_lens, sizes, options)
        self._keep(_LISTS, lengths)
        self._sign(lens)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        _check(q.shape[0] == self._paged_kv_last_page_len.shape[0], "one query a row")
        return self._run(q, paged_kv_cache, torch.arange(q.shape[0] + 1, dtype=torch.int32), False, out)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Any number of queries a row, the last of its positions."""

    _qo_indptr: Tensor

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
    ) -> None:
        buffers = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        for name, buffer in zip(("_qo_indptr", *_LISTS), buffers, strict=True):
            if buffer is not None:
                setattr(self, name, buffer)
        self.most_tokens = -1

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        seq_lens: Tensor,
        non_blocking: bool = True,
        **options: Any,
    ) -> None:
        _check(set(options) == {"window_left", "logits_soft_cap", "sm_scale", "q_data_type", "kv_data_type"}, options)
        _check(causal and qo_indptr.dtype is torch.int32, "causal")
        lengths = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        sizes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        _, _, lens = self._planned(lengths, seq_lens, sizes, options)
        with _disable_current_modes():
            starts = _ints(qo_indptr)
        _check(starts[0] == 0 and len(starts) == len(lens) + 1, starts)
        queries = [end - begin for begin, end in zip(starts, starts[1:], strict=False)]
        _check(all(0 <= num <= keys for num, keys in zip(queries, lens, strict=True)), queries, lens)
        if self.graph:
            _check(self.floats.numel() >= _split_bytes(len(lens), starts[-1], sizes), "partial results do not fit")
            self.most_tokens = starts[-1] if self.most_tokens < 0 else self.most_tokens
            _check(starts[-1] <= self.most_tokens, "more tokens than in the first plan")
        self._keep(("_qo_indptr", *_LISTS), (qo_indptr, *lengths))
        self._sign(lens)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        return self._run(q, paged_kv_cache, self._qo_indptr, True, out)


def _split_bytes(rows: int, tokens: int, sizes: tuple[int, ...]) -> int:
    """What a plan for a graph takes of the float workspace where rows are split: results, then their weights."""
    heads, kv_heads, dim, _ = sizes
    packed = heads // kv_heads
    each = next((tile for most, tile in ((16, 16), (64, 64)) if (tokens - rows + 1) * packed <= most), 128)
    queries = math.ceil((math.ceil(tokens * packed / each) + rows - 1) * each / packed)
    return math.ceil(heads * queries * dim * 4 / 16) * 16 + heads * queries * 4


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qo_indptr: Tensor,
    indptr: Tensor,
    indices: Tensor,
    last: Tensor,
    ints: Tensor,
    out: Tensor,
    scale: float,
    cap: float,
    window: int,
    causal: bool,
    number: int,
) -> None:
    with _disable_current_modes():
        starts, ends, rest = _ints(qo_indptr), _ints(indptr), _ints(last)
        page_size, repeats = k.shape[1], q.shape[1] // k.shape[2]
        out.fill_(float("nan"))
        signed = _ints(ints.view(torch.int32)[: len(rest) + 1])
        lens = [(ends[row + 1] - ends[row] - 1) * page_size + rest[row] for row in range(len(rest))]
        assert signed == [number, *lens], f"the workspace is of another plan: {signed}, not {[number, *lens]}"
        for row, keys in enumerate(lens):
            own = slice(starts[row], starts[row + 1])
            pages = indices[ends[row] : ends[row + 1]].long()
            own_k = k[pages].flatten(0, 1)[:keys].float().repeat_interleave(repeats, dim=1)
            own_v = v[pages].flatten(0, 1)[:keys].float().repeat_interleave(repeats, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q[own].float(), own_k) * scale
            if cap > 0:
                scores = cap * torch.tanh(scores / cap)
            position = keys - scores.shape[1] + torch.arange(scores.shape[1]).unsqueeze(1)
            key = torch.arange(keys)
            seen = (key <= position) if causal else torch.ones(1, keys, dtype=torch.bool)
            if window >= 0:
                seen = seen & (key >= position - window)
            weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
            out[own] = torch.einsum("hqk,khd->qhd", weights, own_v).to(out.dtype)


_LIBRARY = torch.library.Library("flashinfer_stand_in", "DEF")
_LIBRARY.define(
    "run(Tensor q, Tensor k, Tensor v, Tensor qo_indptr, Tensor indptr, Tensor indices, Tensor last, Tensor ints, "
    "Tensor(a!) out, float scale, float cap, int window, bool causal, int number) -> ()"
)
_LIBRARY.impl("run", _kernel, "CPU")
