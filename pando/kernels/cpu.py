"""The ops on the compiled CPU kernels. A call they do not cover (device, dtype, layout) runs the reference instead.

Every function checks what the kernels assume and passes raw pointers: about a microsecond a call. Levels are the
instruction sets the kernels were compiled for, lowest first; each includes the ones before.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pando import env
from pando.errors import ConfigError
from pando.kernels import reference
from pando.kernels.int8_rows import row_size
from pando.kernels.ops import AttentionPlan, OpTable

INTERFACE = 12
"""The signatures this module calls; a compiled module of another number is stale."""

LOAD_ERROR: str | None = None
"""Why there are no compiled kernels; None if there are."""

try:
    from pando.kernels import _native, cpu_linear, cpu_program, cpu_recurrent, cpu_step
except ImportError as error:
    LOAD_ERROR = str(error)
else:
    if _native.interface != INTERFACE:
        LOAD_ERROR = f"it was built from other sources: interface {_native.interface}, not {INTERFACE}"

NOT_NATIVE: dict[str, str] = {
    "rope_store": "rms_norm, rope_ and store_kv in turn; one pass in programs",
    "layer_norm": "native in programs",
}
"""Ops that stay torch in the native table, with the reason."""

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATION_CODES = {kind: code for code, kind in enumerate(reference.ACTIVATIONS)}


def levels() -> dict[str, str]:
    """Every level with why it can not be used here, "" if it can; empty without compiled kernels."""
    return {} if LOAD_ERROR is not None else dict(_native.levels())


def best_isa(cap: str | None = None) -> str:
    """The highest usable level, not above `cap`. Raises ConfigError if `cap` names no level."""
    found = levels()
    if cap is not None and cap not in found:
        raise ConfigError(f"PANDO_ISA is {cap!r}; choose one of {', '.join(found)}", param="PANDO_ISA")
    best = "portable"
    for name, obstacle in found.items():
        if not obstacle:
            best = name
        if name == cap:
            break
    return best


def num_threads() -> int:
    """Threads the native kernels use; 1 without them."""
    return 1 if LOAD_ERROR is not None else _native.num_threads()


def set_num_threads(n: int) -> None:
    """Threads the native kernels use from the next call on. No result depends on it. Raises ConfigError below 1."""
    if not 1 <= n <= 1024:
        raise ConfigError(f"num_threads is {n}; give a number in 1..1024", param="num_threads")
    if LOAD_ERROR is None:
        _native.set_num_threads(n)


def set_aside(change: int) -> None:
    """Take so many processors from the native kernels, or give them back (negative): other work needs them. Adds up."""
    if LOAD_ERROR is None:
        _native.set_aside(change)


def ask_for_huge_pages(memory: Tensor) -> None:
    """For memory that nothing has touched yet: let huge pages back it. A matter of speed only."""
    if LOAD_ERROR is None:
        _native.huge_pages(memory.data_ptr(), memory.nbytes)


def populate(memory: Tensor) -> bool:
    """Have the system back memory as if it were written; what is in it stays, and it may be used meanwhile.

    False where that can not be had. A matter of speed only.
    """
    return LOAD_ERROR is None and _native.populate(memory.data_ptr(), memory.nbytes)


def set_shared_prefix(on: bool) -> None:
    """Whether attention reads KV that rows of a batch share once (the default). No result depends on it."""
    if LOAD_ERROR is None:
        _native.set_shared_prefix(on)


if env.read("PANDO_SHARED_PREFIX") == "0":
    set_shared_prefix(False)


def table(isa: str, *, deterministic: bool = False) -> OpTable:
    """The op table of one level. Raises ConfigError if this machine does not have it.

    deterministic: a token's result does not depend on how many tokens its step brought, either: long rows are not split
    over threads, shared prefixes are read by each row.
    """
    found = levels()
    obstacle = found.get(isa, "there is no such level")
    if obstacle:
        raise ConfigError(f"instruction set {isa!r} can not be used: {obstacle}", param="isa")
    level = list(found).index(isa)
    ops = _Ops(level, deterministic)
    packer = cpu_linear.Packer(level)
    recurrent = cpu_recurrent.RecurrentOps(level)
    return OpTable(
        name=f"cpu-{isa}",
        pack_linear=packer.pack_linear,
        pack_experts=packer.pack_experts,
        rms_norm=ops.rms_norm,
        add_rms_norm=ops.add_rms_norm,
        layer_norm=reference.layer_norm,
        rope_=ops.rope_,
        store_kv=ops.store_kv,
        gated_activation=ops.gated_activation,
        paged_attention=ops.paged_attention,
        attention_plan=partial(_native.AttentionPlan, deterministic),
        causal_conv=recurrent.causal_conv,
        gated_delta=recurrent.gated_delta,
        state_space=recurrent.state_space,
        selective_scan=recurrent.selective_scan,
        sample=ops.sample,
        argmax=ops.argmax,
        finite=ops.finite,
        apply_token_mask_=ops.apply_token_mask_,
        apply_penalties_=apply_penalties_,
        logprobs=ops.logprobs,
        step_table=partial(cpu_step.NativeStepTable, level),
        program=partial(cpu_program.NativeProgram, level, deterministic),
        deterministic=deterministic,
        kv_dtypes=frozenset(("int8",)),
        rounds=True,
    )


def native_file() -> str:
    """Path of the extension module; "" without one."""
    return "" if LOAD_ERROR is not None else str(_native.__file__)


def level_of(ops: OpTable) -> int | None:
    """The level of a native table, as native code counts them; None for the reference."""
    names = list(levels())
    name = ops.name.removeprefix("cpu-")
    return names.index(name) if name in names else None


def activation_code(kind: str | None) -> int:
    """Code of a gated activation, -1 for none. Raises ConfigError on an unknown kind."""
    return cpu_linear.activation_code(kind)


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """A contiguous CPU tensor of `dtype`."""
    return tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()


def _is_heads(tensor: Tensor, dtype: torch.dtype) -> bool:
    """A CPU tensor [tokens or slots, heads, dim] of `dtype` with a contiguous last dim."""
    return tensor.dtype is dtype and tensor.is_cpu and tensor.dim() == 3 and tensor.stride(2) == 1


def _placed(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Address and (token or slot, head) strides of a tensor [tokens or slots, heads, dim]."""
    return tensor.data_ptr(), tensor.stride()[:2]


def _row_strides(x: Tensor) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride) of the rows of x (see `Rows` in csrc/kernels.hpp); None: not expressible."""
    if x.is_contiguous():
        return 1, x.shape[-1], 0
    if x.stride(-1) != 1 or x.dim() > 3:
        return None
    return (1, x.stride(0), 0) if x.dim() == 2 else (x.shape[1], x.stride(0), x.stride(1))


def apply_penalties_(
    logits: Tensor,
    history: Tensor,
    prompt_lens: Tensor,
    lens: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Penalties in place, in time proportional to the history. Raises ValueError on a token outside the vocabulary."""
    floats = (logits, repetition, frequency, presence)
    if not (
        all(_is_plain(tensor, torch.float32) for tensor in floats)
        and all(_is_plain(tensor, torch.int32) for tensor in (prompt_lens, lens))
        and history.dtype is torch.int32
        and history.is_cpu
        and (history.stride(1) == 1 or history.shape[1] <= 1)
    ):
        return reference.apply_penalties_(logits, history, prompt_lens, lens, repetition, frequency, presence)
    columns = (history, prompt_lens, lens, repetition, frequency, presence)
    assert all(tensor.shape[0] == logits.shape[0] for tensor in columns), [tensor.shape for tensor in columns]
    _native.penalties(
        logits.data_ptr(),
        logits.shape[0],
        logits.shape[1],
        history.data_ptr(),
        history.stride(0),
        history.shape[1],
        prompt_lens.data_ptr(),
        lens.data_ptr(),
        repetition.data_ptr(),
        frequency.data_ptr(),
        presence.data_ptr(),
    )
    return None


def _attention_code(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_q_lens: Tensor,
    kv_lens: Tensor,
    sinks: Tensor | None,
    tree_mask: Tensor | None,
) -> int | None:
    """The code of q's dtype if the native kernel covers this call; the shapes of a covered call must fit."""
    dtype = q.dtype
    kept = torch.int8 if k_cache.dtype is torch.int8 else dtype
    covered = (
        dtype in _CODES
        and _is_heads(q, dtype)
        and _is_heads(k_cache, kept)
        and _is_heads(v_cache, kept)
        and _is_plain(cu_q_lens, torch.int32)
        and _is_plain(kv_lens, torch.int32)
        and page_table.dtype is torch.int32
        and page_table.is_cpu
        and (page_table.stride(1) == 1 or page_table.shape[1] <= 1)
        and (sinks is None or _is_plain(sinks, torch.float32))
        and (tree_mask is None or _is_plain(tree_mask, tree_mask.dtype) and tree_mask.element_size() == 1)
    )
    if not covered:
        return None
    rows, (_, heads, head_dim), kv_heads = kv_lens.shape[0], q.shape, v_cache.shape[1]
    assert cu_q_lens.shape[0] == rows + 1 and page_table.shape[0] == rows, (cu_q_lens.shape, page_table.shape, rows)
    assert (k_cache.shape[1], row_size(k_cache)) == (kv_heads, head_dim), (q.shape, k_cache.shape, v_cache.shape)
    assert heads % kv_heads == 0 and (sinks is None or sinks.shape == (heads,)), (heads, kv_heads)
    return _CODES[dtype]


class _Ops:
    """The ops that differ between levels; contracts are those of `pando.kernels.ops`."""

    def __init__(self, level: int, deterministic: bool) -> None:
        self._level = level
        self._deterministic = deterministic

    def _plan(self, plan: AttentionPlan | None) -> _native.AttentionPlan | None:
        if plan is None:
            return _native.AttentionPlan(True) if self._deterministic else None
        assert isinstance(plan, _native.AttentionPlan), plan
        return plan

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of rows that may be strided in up to two outer dims."""
        code = _CODES.get(x.dtype)
        strides = _row_strides(x)
        if code is None or strides is None or not x.is_cpu or not _is_plain(weight, torch.float32):
            return reference.rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype)
        size = x.shape[-1]
        assert weight.shape == (size,), (x.shape, weight.shape)
        rows = x.numel() // size
        _native.norm(self._level, code, x.data_ptr(), rows, *strides, size, 0, weight.data_ptr(), out.data_ptr(), eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The sum goes to `residual` (contiguous), its norm is returned."""
        code = _CODES.get(x.dtype)
        strides = _row_strides(x)
        if (
            code is None
            or strides is None
            or not _is_plain(residual, x.dtype)
            or x.shape != residual.shape
            or not x.is_cpu
            or not _is_plain(weight, torch.float32)
        ):
            return reference.add_rms_norm(x, residual, weight, eps)
        out = torch.empty_like(residual)
        size = x.shape[-1]
        assert weight.shape == (size,), (x.shape, weight.shape)
        _native.norm(
            self._level,
            code,
            x.data_ptr(),
            x.numel() // size,
            *strides,
            size,
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            eps,
        )
        return out

    def rope_(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
        """Rotate in place. Raises ValueError on a position outside cos_sin."""
        code = _CODES.get(q.dtype)
        if (
            code is None
            or not _is_heads(q, q.dtype)
            or not _is_heads(k, q.dtype)
            or not _is_plain(positions, torch.int64)
            or not _is_plain(cos_sin, torch.float32)
        ):
            return reference.rope_(q, k, positions, cos_sin, interleaved)
        assert positions.shape[0] == q.shape[0] == k.shape[0], (q.shape, k.shape, positions.shape)
        assert cos_sin.shape[1] <= min(q.shape[2], k.shape[2]), (q.shape, k.shape, cos_sin.shape)
        _native.rope(
            self._level,
            code,
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            q.shape[1],
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            k.shape[1],
            q.shape[0],
            positions.data_ptr(),
            cos_sin.data_ptr(),
            cos_sin.shape[0],
            cos_sin.shape[1],
            interleaved,
        )
        return None

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, out_loc: Tensor) -> None:
        """Keys and values to their slots. Raises ValueError on a slot outside the cache, before it writes anything."""
        dtype, code, int8 = k.dtype, _CODES.get(k.dtype), k_cache.dtype is torch.int8
        kept = torch.int8 if int8 else dtype
        if code is None or not (
            _is_heads(k, dtype)
            and _is_heads(v, dtype)
            and _is_heads(k_cache, kept)
            and _is_heads(v_cache, kept)
            and _is_plain(out_loc, torch.int64)
        ):
            return reference.store_kv(k, v, k_cache, v_cache, out_loc)
        (tokens, heads, k_dim), v_dim = k.shape, v.shape[2]
        assert (tokens,) == out_loc.shape and (tokens, heads) == v.shape[:2], (k.shape, v.shape, out_loc.shape)
        assert (heads, k_dim) == (k_cache.shape[1], row_size(k_cache)), (k.shape, k_cache.shape)
        assert (heads, v_dim) == (v_cache.shape[1], row_size(v_cache)), (v.shape, v_cache.shape)
        _native.store(
            self._level,
            code,
            int8,
            *_placed(k),
            *_placed(v),
            *_placed(k_cache),
            *_placed(v_cache),
            tokens,
            heads,
            k_dim,
            v_dim,
            min(k_cache.shape[0], v_cache.shape[0]),
            out_loc.data_ptr(),
        )
        return None

    def gated_activation(self, gate_up: Tensor, kind: str) -> Tensor:
        """Activation of [T, 2I] with rows that may be strided."""
        code, kind_code = _CODES.get(gate_up.dtype), _ACTIVATION_CODES.get(kind)
        if code is None or kind_code is None or not gate_up.is_cpu or gate_up.dim() != 2 or gate_up.stride(1) != 1:
            return reference.gated_activation(gate_up, kind)
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, size), dtype=gate_up.dtype)
        _native.activation(
            self._level, code, kind_code, gate_up.data_ptr(), gate_up.stride(0), rows, size, out.data_ptr()
        )
        return out

    def paged_attention(
        self,
        q_THD: Tensor,
        k_cache_SKD: Tensor,
        v_cache_SKD: Tensor,
        page_table_RP: Tensor,
        cu_q_lens: Tensor,
        kv_lens: Tensor,
        *,
        page_size: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        tree_mask: Tensor | None = None,
        plan: AttentionPlan | None = None,
    ) -> Tensor:
        """Extend and decode in one call. Raises ValueError if lengths or pages leave their tensors."""
        tensors = (q_THD, k_cache_SKD, v_cache_SKD, page_table_RP, cu_q_lens, kv_lens)
        code = _attention_code(*tensors, sinks, tree_mask)
        if code is None:
            return reference.paged_attention(
                *tensors,
                page_size=page_size,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
                tree_mask=tree_mask,
            )
        tokens, heads, head_dim = q_THD.shape
        (slots, kv_heads, _), v_dim = v_cache_SKD.shape, row_size(v_cache_SKD)
        out = torch.empty((tokens, heads, v_dim), dtype=q_THD.dtype)
        _native.attention(
            self._level,
            code,
            k_cache_SKD.dtype is torch.int8,
            *_placed(q_THD),
            *_placed(k_cache_SKD),
            *_placed(v_cache_SKD),
            out.data_ptr(),
            tokens,
            heads,
            kv_heads,
            head_dim,
            v_dim,
            min(slots, k_cache_SKD.shape[0]),
            *(page_table_RP.data_ptr(), page_table_RP.stride(0), page_table_RP.shape[1]),
            cu_q_lens.data_ptr(),
            *(kv_lens.data_ptr(), kv_lens.shape[0]),
            page_size,
            window,
            scale,
            softcap,
            0 if sinks is None else sinks.data_ptr(),
            *((0, 0) if tree_mask is None else (tree_mask.data_ptr(), tree_mask.numel())),
            self._plan(plan),
        )
        return out

    def sample(
        self,
        logits_RV: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """One token per row, without sorting the vocabulary."""
        if not (
            all(_is_plain(tensor, torch.float32) for tensor in (logits_RV, temperature, top_p, min_p))
            and all(_is_plain(tensor, torch.int64) for tensor in (seeds, positions))
            and _is_plain(top_k, torch.int32)
        ):
            return reference.sample(logits_RV, temperature, top_k, top_p, min_p, seeds, positions)
        columns = (temperature, top_k, top_p, min_p, seeds, positions)
        assert all(column.shape[0] == logits_RV.shape[0] for column in columns), [column.shape for column in columns]
        out = torch.empty(logits_RV.shape[0], dtype=torch.int64)
        _native.sample(
            self._level,
            logits_RV.data_ptr(),
            logits_RV.shape[0],
            logits_RV.shape[1],
            temperature.data_ptr(),
            top_k.data_ptr(),
            top_p.data_ptr(),
            min_p.data_ptr(),
            seeds.data_ptr(),
            positions.data_ptr(),
            out.data_ptr(),
        )
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """The lowest id of each row's largest logit."""
        if not _is_plain(logits, torch.float32):
            return reference.argmax(logits)
        out = torch.empty(logits.shape[0], dtype=torch.int64)
        _native.scan(self._level, logits.data_ptr(), logits.shape[0], logits.shape[1], out.data_ptr(), 0)
        return out

    def finite(self, logits: Tensor) -> Tensor:
        """Whether each row holds only finite numbers."""
        if not _is_plain(logits, torch.float32):
            return reference.finite(logits)
        out = torch.empty(logits.shape[0], dtype=torch.bool)
        _native.scan(self._level, logits.data_ptr(), logits.shape[0], logits.shape[1], 0, out.data_ptr())
        return out

    def apply_token_mask_(self, logits: Tensor, mask: Tensor) -> None:
        """-inf where a token's bit is not set."""
        words = -(-logits.shape[1] // 32)
        if not _is_plain(logits, torch.float32) or mask.dtype is not torch.int32 or mask.stride(1) != 1:
            return reference.apply_token_mask_(logits, mask)
        assert mask.shape[0] == logits.shape[0] and mask.shape[1] >= words, (mask.shape, logits.shape)
        _native.mask(self._level, logits.data_ptr(), logits.shape[0], logits.shape[1], mask.data_ptr(), mask.stride(0))
        return None

    def logprobs(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Log-softmax at each row's token. Raises ValueError on a token outside the vocabulary."""
        if not (_is_plain(logits, torch.float32) and _is_plain(token_ids, torch.int64)):
            return reference.logprobs(logits, token_ids)
        assert token_ids.shape[0] == logits.shape[0], (logits.shape, token_ids.shape)
        out = torch.empty(logits.shape[0], dtype=torch.float32)
        _native.logprobs(
            self._level, logits.data_ptr(), logits.shape[0], logits.shape[1], token_ids.data_ptr(), out.data_ptr()
        )
        return out
