"""Linear maps and routed experts on the compiled CPU kernels: weights packed once into panels (csrc/linear.hpp).

A float weight keeps its dtype. Products of bfloat16 weights on processors with AVX-512 BF16 read subnormal numbers as 0
and round float32 and float16 rows to bfloat16 first; every other product widens the weight to float32.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pando.errors import ConfigError
from pando.kernels import _native, cpu_quantized, reference
from pando.kernels.ops import PackedExperts, PackedLinear
from pando.kernels.weights import QuantizedWeight, UnroundedWeight, Weight

_log = logging.getLogger(__name__)

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""DType of csrc/kernels.hpp, and WeightKind of csrc/linear.hpp for float weights."""

ACTIVATION_CODES = {kind: code for code, kind in enumerate(reference.ACTIVATIONS)}
"""Activation of csrc/kernels.hpp; no activation is -1."""

CHUNK_BYTES = 32 << 20
"""Small weights share chunks of this size, so that huge pages serve them, too."""

ALIGNMENT = 4096
"""Bytes a weight starts at a multiple of."""

HUGE_PAGE = 2 << 20


class PanelMemory:
    """Memory for packed weights, cut from large chunks. A chunk lives as long as any tensor cut from it."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """Uninitialised bytes [num_bytes] uint8, aligned to 4,096."""
        if num_bytes > CHUNK_BYTES // 2:
            return _chunk(num_bytes)
        if self._used + num_bytes > len(self._chunk):
            self._chunk, self._used = _chunk(CHUNK_BYTES), 0
        begin = self._used
        self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return self._chunk[begin : begin + num_bytes]


def _chunk(num_bytes: int) -> Tensor:
    """Memory from the start of a huge page; none of it is touched."""
    buffer = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
    chunk = buffer[-buffer.data_ptr() % HUGE_PAGE :][:num_bytes]
    _native.huge_pages(chunk.data_ptr(), num_bytes)
    return chunk


@dataclass(frozen=True, slots=True)
class PanelSpec:
    """What native code must know of a packed weight beside its memory: `PackedWeight` of csrc/linear.hpp."""

    kind: int
    n: int
    k: int
    group: int
    activation: int
    activation_bits: int
    has_offsets: bool

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.n if self.activation < 0 else self.n // 2


class Memory(Protocol):
    """Bytes that do not move: a tensor, or a piece of a mapped file."""

    @property
    def nbytes(self) -> int:
        """How many."""
        ...

    def data_ptr(self) -> int:
        """Where."""
        ...


@dataclass(frozen=True, slots=True)
class PanelParts:
    """The memory of a packed weight: panels; factors and bias, float32 in panel order, where it has them."""

    panels: Memory
    factors: Memory | None = None
    bias: Memory | None = None

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return sum(part.nbytes for part in (self.panels, self.factors, self.bias) if part is not None)


class NativeLinear:
    """`PackedLinear` on panels.

    handle: the weight as native code takes it; valid as long as this object. spec, memory: what it was made of.
    out_features: columns of the result. out_dtype: of the result; None = that of x.
    """

    __slots__ = ("handle", "in_features", "out_features", "num_bytes", "out_dtype", "spec", "memory", "_level")

    def __init__(self, level: int, spec: PanelSpec, memory: PanelParts, out_dtype: torch.dtype | None = None) -> None:
        self.spec, self.memory, self.out_dtype, self._level = spec, memory, out_dtype, level
        self.handle = _native.Weight(
            spec.kind,
            spec.n,
            spec.k,
            spec.group,
            spec.activation,
            spec.activation_bits,
            memory.panels.data_ptr(),
            0 if memory.bias is None else memory.bias.data_ptr(),
            0 if memory.factors is None else memory.factors.data_ptr(),
            spec.has_offsets,
        )
        self.out_features, self.in_features = spec.columns, spec.k
        self.num_bytes = memory.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., columns]. Raises ValueError for a dtype, device or width the kernels do not take."""
        shape = x.shape
        rows = x if x.dim() == 2 else x.reshape(-1, shape[-1])
        out = torch.empty((rows.shape[0], self.out_features), dtype=self.out_dtype or x.dtype)
        self._run(rows, out, False)
        return out if x.dim() == 2 else out.view(*shape[:-1], self.out_features)

    def add_to(self, x_RK: Tensor, out_RN: Tensor) -> None:
        """out += the result for x, summed in float32 and rounded once; rows of `out` may be strided."""
        if out_RN.shape != (x_RK.shape[0], self.out_features) or (out_RN.stride(1) != 1 and self.out_features > 1):
            raise ValueError(f"out {list(out_RN.shape)} does not fit rows of {self.out_features} columns")
        self._run(x_RK, out_RN, True)

    def _run(self, rows: Tensor, out: Tensor, accumulate: bool) -> None:
        x_code, out_code = CODES.get(rows.dtype), CODES.get(out.dtype)
        if x_code is None or out_code is None or not rows.is_cpu or rows.shape[1] != self.in_features:
            raise ValueError(
                f"a packed linear map takes float rows of {self.in_features} inputs on the CPU, "
                f"got {list(rows.shape)} {rows.dtype} on {rows.device}, for a result in {out.dtype}"
            )
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        _native.linear(
            self._level,
            self.handle,
            x_code,
            rows.data_ptr(),
            rows.shape[0],
            rows.stride(0),
            out_code,
            out.data_ptr(),
            out.stride(0),
            accumulate,
        )


class NativeExperts:
    """`PackedExperts` on panels; all experts of a call are tasks of the same two parallel products.

    handle: the weights as native code takes them; valid as long as this object.
    """

    __slots__ = ("handle", "num_bytes", "gate_up", "down", "_level")

    def __init__(self, level: int, gate_up: Sequence[NativeLinear], down: Sequence[NativeLinear]) -> None:
        self._level, self.gate_up, self.down = level, tuple(gate_up), tuple(down)
        self.handle = _native.Experts([each.handle for each in gate_up], [each.handle for each in down])
        self.num_bytes = sum(each.num_bytes for each in (*gate_up, *down))

    def __call__(self, x_TM: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, M] -> [T, M]. Raises ValueError on an id that is no expert, and as `NativeLinear` does."""
        code, (tokens, width) = CODES.get(x_TM.dtype), x_TM.shape
        if code is None or not x_TM.is_cpu or width != self.gate_up[0].in_features:
            raise ValueError(f"packed experts do not take {list(x_TM.shape)} {x_TM.dtype} on {x_TM.device}")
        if topk_ids.shape != topk_weights.shape or topk_ids.shape[:1] != (tokens,):
            raise ValueError(f"{tokens} tokens, ids {list(topk_ids.shape)}, weights {list(topk_weights.shape)}")
        x = x_TM if x_TM.stride(1) == 1 else x_TM.contiguous()
        ids, weights = topk_ids.to(torch.int64).contiguous(), topk_weights.float().contiguous()
        out = torch.empty((tokens, self.down[0].out_features), dtype=x.dtype)
        _native.experts(
            self._level,
            self.handle,
            code,
            x.data_ptr(),
            tokens,
            x.stride(0),
            ids.data_ptr(),
            weights.data_ptr(),
            ids.shape[1],
            out.data_ptr(),
            out.stride(0),
        )
        return out


class Packer:
    """`PackLinear` and `PackExperts` of one level. Holds the chunk that small weights are cut from."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._panels = PanelMemory()

    def pack_linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """Panels of a weight on the CPU; what there are no kernels for stays with the reference. Raises ConfigError."""
        weight = _widened(weight)
        if isinstance(weight, QuantizedWeight):
            return self._pack_quantized(weight, bias, activation, out_dtype)
        if isinstance(weight, UnroundedWeight):
            return self._pack_unrounded(weight, bias, activation, out_dtype)
        if not _is_native(weight):
            return reference.pack_linear(weight, bias, activation=activation, out_dtype=out_dtype)
        assert isinstance(weight, Tensor)
        return self._pack(weight, bias, activation, out_dtype)

    def pack_experts(
        self,
        gate_up: Sequence[Weight],
        down: Sequence[Weight],
        activation: str,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> PackedExperts:
        """Panels of float experts of one dtype and shape; others expert by expert."""
        gate_up, down = [_widened(weight) for weight in gate_up], [_widened(weight) for weight in down]
        first = [weight for weight in gate_up if isinstance(weight, Tensor) and _is_native(weight)]
        second = [weight for weight in down if isinstance(weight, Tensor) and _is_native(weight)]
        kinds = {(weight.dtype, weight.shape) for weight in first}, {(weight.dtype, weight.shape) for weight in second}
        if len(first) != len(gate_up) or len(second) != len(down) or any(len(each) != 1 for each in kinds):
            return reference.pack_experts(gate_up, down, activation, gate_up_bias, down_bias, self.pack_linear)
        ups = [self._pack(weight, _row(gate_up_bias, e), activation, None) for e, weight in enumerate(first)]
        downs = [self._pack(weight, _row(down_bias, e), None, None) for e, weight in enumerate(second)]
        return NativeExperts(self._level, ups, downs)

    def _pack(
        self, weight: Tensor, bias: Tensor | None, activation: str | None, out_dtype: torch.dtype | None
    ) -> NativeLinear:
        kind, (n, k), code = CODES[weight.dtype], weight.shape, checked_activation(activation, weight.shape[0])
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        panels = self._panels.take(_native.panel_bytes(kind, n, k, code))
        _native.pack(kind, kind, weight.data_ptr(), weight.stride(0), n, k, code, panels.data_ptr())
        spec = PanelSpec(kind, n, k, k, code, 16, False)
        bias_memory = None if bias is None else per_output(bias, n, code)
        return NativeLinear(self._level, spec, PanelParts(panels, None, bias_memory), out_dtype)

    def _pack_quantized(
        self, weight: QuantizedWeight, bias: Tensor | None, activation: str | None, out_dtype: torch.dtype | None
    ) -> PackedLinear:
        n, code = weight.shape[0], checked_activation(activation, weight.shape[0])
        try:
            spec, panels, factors = cpu_quantized.pack_quantized(weight, code, self._panels.take)
        except ValueError:
            return reference.pack_linear(weight, bias, activation=activation, out_dtype=out_dtype)
        memory = PanelParts(panels, factors, None if bias is None else per_output(bias, n, code))
        return NativeLinear(self._level, PanelSpec(*spec), memory, out_dtype)

    def _pack_unrounded(
        self, weight: UnroundedWeight, bias: Tensor | None, activation: str | None, out_dtype: torch.dtype | None
    ) -> NativeLinear:
        n, code = weight.shape[0], checked_activation(activation, weight.shape[0])
        spec, panels, factors = cpu_quantized.pack_unrounded(self._level, weight, code, self._panels.take)
        memory = PanelParts(panels, factors, None if bias is None else per_output(bias, n, code))
        return NativeLinear(self._level, PanelSpec(*spec), memory, out_dtype)


def checked_activation(kind: str | None, n: int) -> int:
    """The code of an activation of n outputs. Raises ConfigError, too, if they are no gate and up part."""
    code = activation_code(kind)
    if code >= 0 and n % 2:
        raise ConfigError(f"a gate and an up part of {n} outputs together do not divide evenly", param="activation")
    return code


def activation_code(kind: str | None) -> int:
    """Code of a gated activation, -1 for none. Raises ConfigError on an unknown kind."""
    if kind is None:
        return -1
    if kind not in ACTIVATION_CODES:
        known = ", ".join(ACTIVATION_CODES)
        raise ConfigError(f"activation {kind!r} is not known; known: {known}", param="activation")
    return ACTIVATION_CODES[kind]


def per_output(values: Tensor, n: int, activation: int) -> Tensor:
    """values [n] in panel order and padded with zeros, float32."""
    assert values.shape == (n,), (values.shape, n)
    source = values.detach().to("cpu", torch.float32).contiguous()
    out = torch.empty(_native.panel_bytes(0, n, 1, activation) // 4, dtype=torch.float32)
    _native.pack_outputs(source.data_ptr(), n, activation, out.data_ptr())
    return out


_widens: set[str] = set()


def _widened(weight: Weight) -> Weight:
    """A weight in float8, for which there are no panels, in bfloat16; others as they are."""
    if not isinstance(weight, QuantizedWeight) or not weight.is_float:
        return weight
    if not _widens:
        _widens.add("said")
        _log.warning("weights in float8 become bfloat16 on a CPU, twice the memory: --quantization int8 keeps 8 bits")
    return weight.dequantize().bfloat16()


def _is_native(weight: Weight) -> bool:
    return isinstance(weight, Tensor) and weight.is_cpu and weight.dtype in CODES and weight.numel() > 0


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the vector units and the memory of this machine gave just now on all threads of the kernels.

    flops: multiply-adds between registers, counted as two, per second. read_bytes: read in order, per second.
    """

    flops: float
    read_bytes: float


def limits(level: int, kind: int = 1, num_bytes: int = 1 << 29) -> Limits:
    """The best of several passes, for the arithmetic of a weight kind (csrc/linear.hpp) and over `num_bytes` of memory.

    Any integer kind stands for bytes summed in int32, where the level has an instruction for it.
    """
    memory = torch.ones(num_bytes // 4)
    return Limits(
        flops=max(_rate(lambda: _native.burn(level, kind, 20_000)) for _ in range(60)),
        read_bytes=max(_rate(lambda: _read(level, memory)) for _ in range(5)),
    )


def _read(level: int, memory: Tensor) -> int:
    _native.read_through(level, memory.data_ptr(), memory.nbytes)
    return memory.nbytes


def _rate(work: Callable[[], int]) -> float:
    begin = time.perf_counter()
    done = work()
    return done / (time.perf_counter() - begin)
