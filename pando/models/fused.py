"""A decoder's layers as one program of the op table, where it has programs and the layers are made of what they know.

What a program does is what `pando.models.decoder` does op by op; tests hold the two against each other. A family with
a part no instruction exists for (layer norms, ungated MLPs, mixtures, parallel branches, mixers other than attention,
gates on its output) runs op by op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pando.cache.pool import KVPool
from pando.forward import ForwardBatch
from pando.kernels.ops import HeadsShape, OpTable, PackedLinear, Program, StepTensors
from pando.layers.attention import Attention
from pando.layers.embedding import Embedding
from pando.layers.mlp import GatedMLP
from pando.layers.norm import NoNorm, Norm, RMSNorm, Scale
from pando.layers.rotary import Rotary

if TYPE_CHECKING:
    from pando.models.decoder import Branch, DecoderLayer

RESIDUAL, RESULT = 0, 1


class FusedLayers:
    """Embedding, all layers and the final norm in one call."""

    def __init__(self, program: Program, rotaries: Sequence[Rotary]) -> None:
        self._program = program
        self._rotaries = rotaries

    def __call__(self, batch: ForwardBatch, pool: KVPool) -> Tensor:
        """Final hidden states [T, M]."""
        step = StepTensors(
            batch.positions,
            batch.out_loc,
            batch.cu_q_lens,
            batch.kv_lens,
            batch.page_table,
            batch.page_size,
            pool.k,
            pool.v,
            pool.groups,
        )
        return self._program.run(batch.input_ids, step, [rotary.table for rotary in self._rotaries])


def fuse(
    embed: Embedding,
    layers: Sequence[DecoderLayer],
    norm: Norm,
    rotaries: Sequence[Rotary],
    dtype: torch.dtype,
    ops: OpTable,
) -> FusedLayers | None:
    """The layers as a program, or None if they can not be one."""
    width = _width(norm)
    if ops.program is None or width is None:
        return None
    writer = _Writer(ops.program(dtype, width), width, rotaries)
    if not writer.program.embed(embed.weight):
        return None
    if embed.multiplier != 1.0:
        writer.program.scale(RESIDUAL, embed.multiplier)
    if all(writer.layer(layer) for layer in layers) and writer.norm(norm, RESIDUAL, RESULT):
        return FusedLayers(writer.program, rotaries)
    return None


def _width(norm: Norm) -> int | None:
    return norm.weight.shape[0] if isinstance(norm, RMSNorm) else None


class _Writer:
    """Appends a layer's instructions; each method is False if something has no instruction."""

    def __init__(self, program: Program, width: int, rotaries: Sequence[Rotary]) -> None:
        self.program = program
        self._rotaries = rotaries
        self._widths = {"x": width, "branch": width, "normed": width}
        self._buffers: dict[tuple[str, int], int] = {}

    def _buffer(self, role: str, width: int | None = None) -> int:
        """The buffer of a role; layers share theirs."""
        key = (role, width or self._widths[role])
        if key not in self._buffers:
            self._buffers[key] = self.program.buffer(key[1])
        return self._buffers[key]

    def layer(self, layer: DecoderLayer) -> bool:
        """Attention, then MLP, each added to the residual stream."""
        if layer.pre_mlp is None or not isinstance(layer.mlp, GatedMLP) or not isinstance(layer.mixer, Attention):
            return False
        source = self._normed(layer.pre_attention)
        if source is None or not self._attention(source, layer.mixer, layer.post_attention):
            return False
        source = self._normed(layer.pre_mlp)
        return source is not None and self._mlp(source, layer.mlp, layer.post_mlp)

    def norm(self, norm: Norm | Branch, source: int, target: int) -> bool:
        """target = norm(source)."""
        if not isinstance(norm, RMSNorm) or norm.weight.dim() != 1:
            return False
        self.program.norm(source, target, norm.weight, norm.eps)
        return True

    def _normed(self, norm: Norm) -> int | None:
        """The buffer with the normalised residual stream: the stream itself where there is no norm."""
        if isinstance(norm, NoNorm):
            return RESIDUAL
        target = self._buffer("x")
        return target if self.norm(norm, RESIDUAL, target) else None

    def _attention(self, source: int, attention: Attention, after: Branch | None) -> bool:
        shape, rope, qk_norm, params = attention.shape, attention.rotary, attention.qk_norm, attention.params
        if attention.gated or (qk_norm is not None and qk_norm.place == "full"):
            return False
        norms, eps = None, 0.0
        if qk_norm is not None:
            if not isinstance(qk_norm.q, RMSNorm) or not isinstance(qk_norm.k, RMSNorm) or qk_norm.q.weight.dim() != 1:
                return False
            norms, eps = (qk_norm.q.weight, qk_norm.k.weight), qk_norm.q.eps
        heads = HeadsShape(
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.v_dim,
            rope.rope.dim if rope is not None else 0,
            rope is not None and rope.interleaved,
            qk_norm is not None and qk_norm.place == "head_after_rope",
        )
        qkv = self._buffer("qkv", (shape.heads + shape.kv_heads) * shape.head_dim + shape.kv_heads * shape.v_dim)
        out = self._buffer("attended", shape.heads * shape.v_dim)
        if not self.program.linear(source, qkv, attention.qkv.packed, False):
            return False
        rotary = self._rotaries.index(rope) if rope is not None else -1
        self.program.heads(qkv, attention.index, rotary, heads, norms, eps)
        self.program.attend(qkv, out, attention.index, heads, params.scale, params.window, params.softcap, params.sinks)
        return self._join(out, attention.o.packed, after)

    def _mlp(self, source: int, mlp: GatedMLP, after: Branch | None) -> bool:
        inner = self._buffer("inner", mlp.down.in_features)
        return self.program.linear(source, inner, mlp.gate_up.packed, False) and self._join(
            inner, mlp.down.packed, after
        )

    def _join(self, source: int, packed: PackedLinear, after: Branch | None) -> bool:
        """Residual stream += after(packed(source))."""
        if after is None:
            return self.program.linear(source, RESIDUAL, packed, True)
        branch = self._buffer("branch")
        if not self.program.linear(source, branch, packed, False):
            return False
        if isinstance(after, Scale):
            self.program.scale(branch, after.factor)
        else:
            normed = self._buffer("normed")
            if not self.norm(after, branch, normed):
                return False
            branch = normed
        self.program.add(branch, RESIDUAL)
        return True
