"""MLPs, mixtures and recurrent mixers as instructions of a program. False: something has no instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from pando.kernels.mixing import DeltaHeads, GroupNorm, Modulation, Routing, SpaceHeads
from pando.kernels.ops import PackedLinear, Program
from pando.layers.causal_conv import CausalConv
from pando.layers.gated_delta import GatedDelta
from pando.layers.gated_norm import GatedNorm
from pando.layers.mixer import Mixer
from pando.layers.mlp import GatedMLP, PlainMLP
from pando.layers.moe import LatentExperts, MoE, SharedExpert
from pando.layers.norm import LayerNorm, RMSNorm
from pando.layers.state_space import StateSpace

if TYPE_CHECKING:
    from pando.models.decoder import Branch

_ACTIVATIONS: dict[str, Modulation] = {"silu": "silu", "relu2": "relu2", "gelu_tanh": "gelu_tanh", "gelu": "gelu"}


class Writer(Protocol):
    """What parts need of whoever writes a model's program."""

    program: Program

    def buffer(self, role: str, width: int | None = None) -> int:
        """The buffer of a role, of the model's width unless another is given."""

    def join(self, source: int, packed: PackedLinear, after: Branch | None) -> bool:
        """Residual stream += after(packed(source))."""

    def join_branch(self, branch: int, after: Branch | None) -> bool:
        """Residual stream += after(branch)."""


def group_norm(norm: RMSNorm | LayerNorm, groups: int, size: int) -> GroupNorm:
    """A norm over groups of neighbouring elements."""
    if isinstance(norm, RMSNorm):
        return GroupNorm(groups, size, norm.weight, None, norm.eps, False)
    return GroupNorm(groups, size, norm.weight, norm.bias, norm.eps, True)


def write_mlp(writer: Writer, source: int, mlp: Callable[[Tensor], Tensor], after: Branch | None) -> bool:
    """Residual stream += after(mlp(source))."""
    if isinstance(mlp, MoE):
        out = writer.buffer("experts")
        return _mixture(writer, source, mlp, out) and writer.join_branch(out, after)
    inner = _inner(writer, source, mlp)
    return inner is not None and isinstance(mlp, GatedMLP | PlainMLP) and writer.join(inner, mlp.down.packed, after)


def _inner(writer: Writer, source: int, mlp: Callable[[Tensor], Tensor]) -> int | None:
    """The buffer of what the second matrix of an MLP is multiplied with."""
    if not isinstance(mlp, GatedMLP | PlainMLP):
        return None
    inner = writer.buffer("inner", mlp.down.in_features)
    first = mlp.gate_up if isinstance(mlp, GatedMLP) else mlp.up
    if not writer.program.linear(source, inner, first.packed, False):
        return None
    if isinstance(mlp, PlainMLP):
        writer.program.modulate(inner, 0, inner, _ACTIVATIONS.get(mlp.activation, "gelu"))
    return inner


def _mixture(writer: Writer, source: int, moe: MoE, out: int) -> bool:
    """out = the mixture, with the expert all tokens share."""
    shape, program, experts = moe.shape, writer.program, moe.experts
    logits = writer.buffer("logits", shape.num_experts)
    if not program.linear(source, logits, moe.router.packed, False):
        return False
    routing = Routing(
        *(shape.num_experts, shape.top_k, shape.score, moe.correction),
        *(shape.groups, shape.top_groups, shape.group_scores),
        shape.renormalise,
        shape.scale,
    )
    if isinstance(experts, LatentExperts):
        narrow, mixed = writer.buffer("latent", shape.latent), writer.buffer("mixed", shape.latent)
        written = (
            program.linear(source, narrow, experts.down.packed, False)
            and program.mixture(narrow, logits, mixed, experts.experts, routing)
            and program.linear(mixed, out, experts.up.packed, False)
        )
    else:
        written = program.mixture(source, logits, out, experts, routing)
    return written and (moe.shared is None or _shared(writer, source, moe.shared, out))


def _shared(writer: Writer, source: int, shared: SharedExpert, out: int) -> bool:
    """out += the shared expert."""
    inner = _inner(writer, source, shared.mlp)
    if inner is None:
        return False
    if shared.gate is None:
        return writer.program.linear(inner, out, shared.mlp.down.packed, True)
    branch, gate = writer.buffer("branch"), writer.buffer("gate", 1)
    if not (
        writer.program.linear(inner, branch, shared.mlp.down.packed, False)
        and writer.program.linear(source, gate, shared.gate.packed, False)
    ):
        return False
    writer.program.modulate(gate, 0, branch, "times_sigmoid", broadcast=True)
    writer.program.add(branch, out)
    return True


def write_recurrent(writer: Writer, source: int, mixer: Mixer, after: Branch | None) -> bool:
    """Residual stream += after(mixer(source)), for mixers whose past is a state."""
    if isinstance(mixer, GatedDelta):
        return _gated_delta(writer, source, mixer, after)
    return isinstance(mixer, StateSpace) and _state_space(writer, source, mixer, after)


def _conv(writer: Writer, source: int, offset: int, layer: int, conv: CausalConv) -> int | None:
    """The buffer of a convolution's result."""
    target = writer.buffer("convolved", conv.weight.shape[0])
    silu = conv.activation == "silu"
    if not silu and conv.activation is not None:
        return None
    return target if writer.program.conv(source, offset, target, layer, conv.weight, conv.bias, silu) else None


def _gate(writer: Writer, y: int, z: int, offset: int, width: int, norm: GatedNorm) -> None:
    """y = the gated norm of y, with the gate in columns of z."""
    size = width if norm.weight is None else norm.weight.shape[1]
    groups = GroupNorm(width // size, size, norm.weight, None, norm.eps, False)
    writer.program.gated_norm(y, z, offset, groups, gate_first=norm.place == "after_gate")


def _gated_delta(writer: Writer, source: int, mixer: GatedDelta, after: Branch | None) -> bool:
    shape, program = mixer.shape, writer.program
    inputs = writer.buffer("projected", shape.conv_channels + shape.value_width)
    gates = writer.buffer("gates", 2 * shape.value_heads)
    if not (
        program.linear(source, inputs, mixer.inputs.packed, False)
        and program.linear(source, gates, mixer.gates.packed, False)
    ):
        return False
    qkv, out = _conv(writer, inputs, 0, mixer.index, mixer.conv), writer.buffer("mixed", shape.value_width)
    if qkv is None:
        return False
    heads = DeltaHeads(shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim, mixer.rate, mixer.dt_bias)
    program.delta(qkv, gates, out, mixer.index, heads)
    _gate(writer, out, inputs, shape.conv_channels, shape.value_width, mixer.norm)
    return writer.join(out, mixer.o.packed, after)


def _state_space(writer: Writer, source: int, mixer: StateSpace, after: Branch | None) -> bool:
    shape, program = mixer.shape, writer.program
    projected = writer.buffer("projected", shape.width + shape.conv_channels + shape.heads)
    if mixer.factors is not None or not program.linear(source, projected, mixer.inputs.packed, False):
        return False
    xbc, out = _conv(writer, projected, shape.width, mixer.index, mixer.conv), writer.buffer("mixed", shape.width)
    if xbc is None:
        return False
    heads = SpaceHeads(
        *(shape.heads, shape.groups, shape.head_dim, shape.state_dim), mixer.a, mixer.d, mixer.dt_bias, shape.dt_limit
    )
    program.space(xbc, projected, shape.width + shape.conv_channels, out, mixer.index, heads)
    _gate(writer, out, projected, 0, shape.width, mixer.norm)
    return writer.join(out, mixer.o.packed, after)
