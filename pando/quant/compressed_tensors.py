"""compressed-tensors checkpoints (llm-compressor): integers of 4 and 8 bits, packed or not, and float8 e4m3.

pack-quantized: weight_packed [N, K * bits / 32] int32, words of neighbouring inputs, lowest bits first; the stored
    field is q + 2^(bits - 1). weight_scale [N, G]; weight_zero_point packed along the outputs, [N * bits / 32, G]
    int32; weight_shape [2]; weight_g_idx [K] where groups were formed in another order
int-quantized, naive-quantized: weight [N, K] int8, weight_scale [N, 1] or [1], weight_zero_point alike
float-quantized: weight [N, K] float8 e4m3, weight_scale [N, 1] or [1]; no zero points

w[n, k] = scale[n, g] * (q[n, k] - zero[n, g])
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pando.errors import ConfigError
from pando.kernels.weights import QuantizedWeight
from pando.quant.gptq import from_codes
from pando.quant.order import OrderedWeight
from pando.quant.packed_words import unpack
from pando.quant.settings import group_of, integer, read_shaped, require, section
from pando.quant.source import TensorSource, WeightProblem

PACKED, UNPACKED, FLOATS = ("pack-quantized",), ("int-quantized", "naive-quantized"), ("float-quantized",)


@dataclass(frozen=True, slots=True)
class Group:
    """An entry of `config_groups`: which modules, and how their weights and activations are rounded."""

    targets: tuple[str, ...]
    bits: int
    group_size: int
    activation_bits: int
    floats: bool

    def names(self, module: str) -> bool:
        """Whether a target is this module, or a pattern ("re:...") for it."""
        for target in self.targets:
            if target.startswith("re:") and re.match(target[3:], module):
                return True
            if module == target or module.endswith("." + target):
                return True
        return False


class CompressedTensors:
    """Reads modules of a compressed-tensors checkpoint."""

    suffixes: tuple[str, ...]

    def __init__(self, settings: Mapping[str, object]) -> None:
        require(settings, "format", PACKED + UNPACKED + FLOATS, "compressed-tensors")
        sparsity = section(settings, "sparsity_config").get("format", "dense")
        if sparsity != "dense":
            raise ConfigError(f"compressed-tensors with sparse weights ({sparsity}) can not be read")
        groups = section(settings, "config_groups")
        self.groups = tuple(_group(section(groups, name)) for name in groups)
        if not self.groups:
            raise ConfigError("compressed-tensors without config_groups can not be read")
        for group in self.groups:
            if group.floats != (settings.get("format") in FLOATS):
                kind = "float" if group.floats else "int"
                raise ConfigError(f"compressed-tensors with {kind} weights as {settings.get('format')} can not be read")
        self.packed = settings.get("format", PACKED[0]) in PACKED
        first = (".weight_packed",) if self.packed else (".weight_scale",)
        self.suffixes = (*first, ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
        self.suffixes += (".weight_g_idx",)

    def weight(self, source: TensorSource, module: str, rows: int, columns: int) -> QuantizedWeight | OrderedWeight:
        """The matrix [rows, columns]."""
        group = next((g for g in self.groups if g.names(module)), self.groups[0])
        scales = self._scales(source, module, rows)
        if group.floats:
            return _float8(source, module, columns, scales, group.activation_bits)
        codes = self._codes(source, module, rows, columns, group.bits)
        zeros = self._zeros(source, module, rows, scales, group.bits)
        values, scale, offset = from_codes(codes, scales, zeros, group.bits)
        size = group_of(columns, scale.shape[1], group.group_size, f"{module}.weight_scale")
        order = _order(source, module, columns, size)
        if order is not None:
            values = values[:, order].contiguous()
        some = None if group.bits == 8 and not bool(offset.any()) else offset
        weight = QuantizedWeight(values, scale, some, group.bits, size, group.activation_bits)
        return weight if order is None else OrderedWeight(weight, order)

    def _scales(self, source: TensorSource, module: str, rows: int) -> Tensor:
        """Scales [N, G] float32."""
        scales = source.read(f"{module}.weight_scale").float()
        if scales.numel() == 1:
            scales = scales.reshape(1, 1).expand(rows, 1)
        if scales.shape[0] != rows or scales.dim() != 2:
            raise WeightProblem(f"{module}.weight_scale has shape {list(scales.shape)}, [{rows}, groups] expected")
        return scales

    def _codes(self, source: TensorSource, module: str, rows: int, columns: int, bits: int) -> Tensor:
        """uint8 [rows, columns]: q + 2^(bits - 1)."""
        if self.packed:
            words = read_shaped(source, f"{module}.weight_packed", rows, -(-columns * bits // 32))
            return unpack(words, bits)[:, :columns].contiguous()
        stored = read_shaped(source, f"{module}.weight", rows, columns)
        if stored.dtype is not torch.int8 or bits != 8:
            raise WeightProblem(f"{module}.weight holds {stored.dtype} for {bits} bits; int8 expected")
        return stored.contiguous().view(torch.uint8) ^ 128

    def _zeros(self, source: TensorSource, module: str, rows: int, scales: Tensor, bits: int) -> Tensor:
        """Zero points [N, G] float32, shifted as the codes are."""
        middle, name = 1 << (bits - 1), f"{module}.weight_zero_point"
        if name not in source.names():
            return torch.full_like(scales, middle)
        stored = source.read(name)
        if stored.dtype is torch.int32 and self.packed:
            words = read_shaped(source, name, -(-rows * bits // 32), scales.shape[1])
            return unpack(words.T, bits)[:, :rows].T.float()
        return stored.float().reshape(-1, 1 if stored.numel() == 1 else scales.shape[1]).expand_as(scales) + middle


def _float8(source: TensorSource, module: str, columns: int, scales: Tensor, activation_bits: int) -> QuantizedWeight:
    """A matrix of float8 with a scale per output."""
    stored = read_shaped(source, f"{module}.weight", len(scales), columns)
    if stored.dtype is not torch.float8_e4m3fn:
        raise WeightProblem(f"{module}.weight holds {stored.dtype}; float8_e4m3fn expected")
    if scales.shape[1] != 1:
        raise WeightProblem(f"{module}.weight_scale has {scales.shape[1]} scales per output; 1 of float8 can be read")
    return QuantizedWeight(stored, scales.contiguous(), None, 8, columns, activation_bits)


def _order(source: TensorSource, module: str, columns: int, group_size: int) -> Tensor | None:
    """The inputs sorted by group, None where they are; -1 in weight_g_idx stands for that too."""
    name = f"{module}.weight_g_idx"
    if name not in source.names():
        return None
    stored, groups = read_shaped(source, name, columns).long(), torch.arange(columns) // group_size
    if torch.equal(stored, groups) or bool((stored < 0).all()):
        return None
    order = stored.argsort(stable=True)
    if not torch.equal(stored[order], groups):
        raise WeightProblem(f"{name} does not divide {columns} inputs into groups of {group_size}")
    return order


def _group(settings: Mapping[str, object]) -> Group:
    """A checked entry of `config_groups`. Raises ConfigError naming the scheme that can not be read."""
    weights, inputs = section(settings, "weights"), section(settings, "input_activations")
    kind, bits = weights.get("type", "int"), integer(weights, "num_bits", 8)
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise ConfigError(
            f"compressed-tensors with {kind} weights of {bits} bits can not be read (int of 4 and 8 and float of 8 can)"
        )
    allowed = ("channel", "tensor") if kind == "float" else ("group", "channel", "tensor")
    require(weights, "strategy", allowed, f"compressed-tensors {kind} weights")
    if inputs and (inputs.get("type", "int") != kind or inputs.get("num_bits", 8) != 8):
        what = f"{inputs.get('type')} activations of {inputs.get('num_bits')} bits"
        raise ConfigError(f"compressed-tensors with {what} can not be read ({kind} of 8 can)")
    if inputs and not inputs.get("dynamic", False):
        raise ConfigError("compressed-tensors with static activation scales can not be read (dynamic ones can)")
    targets = settings.get("targets") or ()
    if not isinstance(targets, list | tuple):
        raise ConfigError(f"quantization_config: targets is {targets!r}; expected a list")
    size = weights.get("group_size")
    group_size = integer(weights, "group_size", -1) if size is not None else -1
    activation_bits = 8 if inputs or bits == 4 else 16
    return Group(tuple(str(target) for target in targets), bits, group_size, activation_bits, kind == "float")
