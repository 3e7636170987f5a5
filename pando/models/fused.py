"""A decoder's layers as one program of the op table, where it has programs and the layers are made of what they know.

What a program does is what `pando.models.decoder` does op by op; tests hold the two against each other. A family with
a part no instruction exists for (latent attention, Mamba-1, short convolutions, experts without a gate) runs op by op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pando.cache.pool import KVPool
from pando.forward import ForwardBatch
from pando.kernels.ops import HeadsShape, OpTable, PackedLinear, Program, StepTensors
from pando.layers.attention import Attention, QKNorm
from pando.layers.embedding import Embedding
from pando.layers.mixer import Followed, Mixer, SideBySide, TokenByToken
from pando.layers.norm import LayerNorm, NoNorm, Norm, RMSNorm, Scale
from pando.layers.rotary import Rotary
from pando.models.fused_parts import group_norm, write_mlp, write_recurrent

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
            pool.states,
            batch.states,
        )
        return self._program.run(batch.input_ids, step, [rotary.table for rotary in self._rotaries])


def fuse(
    embed: Embedding,
    layers: Sequence[DecoderLayer],
    norm: Norm,
    rotaries: Sequence[Rotary],
    ops: OpTable,
    *,
    parallel: bool = False,
) -> FusedLayers | None:
    """The layers as a program, or None if they can not be one. parallel: both branches of a layer read its input."""
    dtype, width = embed.weight.dtype, embed.weight.shape[1]
    if ops.program is None:
        return None
    writer = _Writer(ops.program(dtype, width), width, rotaries)
    if not writer.program.embed(embed.weight):
        return None
    if embed.multiplier != 1.0:
        writer.program.scale(RESIDUAL, embed.multiplier)
    write = writer.parallel_layer if parallel else writer.layer
    if all(write(layer) for layer in layers) and writer.norm(norm, RESIDUAL, RESULT):
        return FusedLayers(writer.program, rotaries)
    return None


class _Writer:
    """Appends a layer's instructions; each method is False if something has no instruction."""

    def __init__(self, program: Program, width: int, rotaries: Sequence[Rotary]) -> None:
        self.program = program
        self.width = width
        self._rotaries = rotaries
        self._buffers: dict[tuple[str, int], int] = {}

    def buffer(self, role: str, width: int | None = None) -> int:
        """The buffer of a role, of the model's width unless another is given; layers share theirs."""
        key = (role, width or self.width)
        if key not in self._buffers:
            self._buffers[key] = self.program.buffer(key[1])
        return self._buffers[key]

    def layer(self, layer: DecoderLayer) -> bool:
        """Mixer, then MLP if there is one, each added to the residual stream."""
        source = self._normed(layer.pre_attention)
        if source is None or not self._mixer(source, layer.mixer, layer.post_attention):
            return False
        if layer.mlp is None:
            return True
        source = None if layer.pre_mlp is None else self._normed(layer.pre_mlp)
        return source is not None and write_mlp(self, source, layer.mlp, layer.post_mlp)

    def parallel_layer(self, layer: DecoderLayer) -> bool:
        """Mixer and MLP of what the layer was given: both norms come before the first sum."""
        source = self._normed(layer.pre_attention)
        beside = source if layer.pre_mlp is None else self._normed(layer.pre_mlp, "beside")
        if source in (None, RESIDUAL) or beside in (None, RESIDUAL) or layer.mlp is None:
            return False
        return self._mixer(source, layer.mixer, None) and write_mlp(self, beside, layer.mlp, None)

    def norm(self, norm: Norm | Branch, source: int, target: int) -> bool:
        """target = norm(source)."""
        if isinstance(norm, RMSNorm) and norm.weight.dim() == 1:
            self.program.norm(source, target, norm.weight, norm.eps)
            return True
        if isinstance(norm, LayerNorm) and (norm.weight is None or norm.weight.dim() == 1):
            self.program.normalize(source, 0, target, 0, group_norm(norm, 1, self.width))
            return True
        return False

    def join(self, source: int, packed: PackedLinear, after: Branch | None) -> bool:
        """Residual stream += after(packed(source))."""
        if after is None:
            return self.program.linear(source, RESIDUAL, packed, True)
        branch = self.buffer("branch")
        return self.program.linear(source, branch, packed, False) and self.join_branch(branch, after)

    def join_branch(self, branch: int, after: Branch | None) -> bool:
        """Residual stream += after(branch), which is used up."""
        if isinstance(after, Scale):
            self.program.scale(branch, after.factor)
        elif after is not None:
            normed = self.buffer("normed")
            if not self.norm(after, branch, normed):
                return False
            branch = normed
        self.program.add(branch, RESIDUAL)
        return True

    def _normed(self, norm: Norm, role: str = "x") -> int | None:
        """The buffer with the normalised residual stream: the stream itself where there is no norm."""
        if isinstance(norm, NoNorm):
            return RESIDUAL
        target = self.buffer(role)
        return target if self.norm(norm, RESIDUAL, target) else None

    def _mixer(self, source: int, mixer: Mixer, after: Branch | None) -> bool:
        if isinstance(mixer, Attention):
            return self._attention(source, mixer, after)
        if isinstance(mixer, SideBySide):  # each joins by itself: no norm may come between
            apart = source != RESIDUAL and (after is None or isinstance(after, Scale))
            return apart and all(self._mixer(source, one, after) for one in mixer.mixers)
        if isinstance(mixer, Followed):
            return after is None and self._mixer(source, mixer.mixer, mixer.after)
        if isinstance(mixer, TokenByToken):
            return write_mlp(self, source, mixer.mlp, after)
        return write_recurrent(self, source, mixer, after)

    def _attention(self, source: int, attention: Attention, after: Branch | None) -> bool:
        shape, rope, params = attention.shape, attention.rotary, attention.params
        qk_norm = attention.qk_norm
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        width, values = queries + keys + shape.kv_heads * shape.v_dim, shape.heads * shape.v_dim
        qkv, out = self.buffer("qkv", width + values if attention.gated else width), self.buffer("attended", values)
        if not self.program.linear(source, qkv, attention.qkv.packed, False):
            return False
        norms, eps = None, 0.0
        if qk_norm is not None and not _is_plain(qk_norm):
            if qk_norm.place == "head_after_rope":
                return False
            for norm, offset, heads in ((qk_norm.q, 0, shape.heads), (qk_norm.k, queries, shape.kv_heads)):
                groups = 1 if qk_norm.place == "full" else heads
                size = heads * shape.head_dim // groups
                self.program.normalize(qkv, offset, qkv, offset, group_norm(norm, groups, size))
        elif qk_norm is not None:
            assert qk_norm.q.weight is not None and qk_norm.k.weight is not None
            norms, eps = (qk_norm.q.weight, qk_norm.k.weight), qk_norm.q.eps
        heads_shape = HeadsShape(
            *(shape.heads, shape.kv_heads, shape.head_dim, shape.v_dim),
            rope.rope.dim if rope is not None else 0,
            rope is not None and rope.interleaved,
            qk_norm is not None and qk_norm.place == "head_after_rope",
        )
        rotary = self._rotaries.index(rope) if rope is not None else -1
        self.program.heads(qkv, attention.index, rotary, heads_shape, norms, eps)
        self.program.attend(
            qkv, out, attention.index, heads_shape, params.scale, params.window, params.softcap, params.sinks
        )
        if attention.gated:
            self.program.modulate(qkv, width, out, "times_sigmoid")
        return self.join(out, attention.o.packed, after)


def _is_plain(norm: QKNorm) -> bool:
    """Whether the heads' own instruction takes it: RMS per head, all heads alike."""
    both = (norm.q, norm.k)
    return norm.place != "full" and all(isinstance(one, RMSNorm) and one.weight.dim() == 1 for one in both)
