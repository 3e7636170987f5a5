"""From a Spec and a Loader to a DecoderModel: which tensors a layer needs, under which names, fused how."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pando.cache.spec import CachePlan, FullAttention, LayerSpec, SlidingWindow
from pando.forward import AttentionParams
from pando.kernels.ops import OpTable, PackedExperts
from pando.kernels.weights import Weight, concatenate
from pando.layers.attention import Attention, QKNorm
from pando.layers.embedding import Embedding, Head
from pando.layers.linear import Linear
from pando.layers.mlp import GatedMLP, PlainMLP
from pando.layers.moe import MoE, SharedExpert
from pando.layers.norm import LayerNorm, NoNorm, Norm, RMSNorm, Scale
from pando.layers.rotary import Rotary
from pando.layers.shapes import LayerShape, MoeShape, RopeShape
from pando.models.decoder import Branch, DecoderLayer, DecoderModel, ModelInfo
from pando.models.fused import fuse
from pando.models.spec import Spec
from pando.models.weights import Loader
from pando.quant.on_load import AS_STORED, OnLoad
from pando.quant.order import InputWeight, OrderedWeight


def detect(spec: Spec, names: Collection[str]) -> Spec:
    """The spec with what the tensors themselves tell: key prefix, tied head, biases, query-key norms, sinks."""
    if not names:
        return spec
    embed = spec.top_names.get("embed_tokens", "embed_tokens") + ".weight"
    prefixes = sorted((n.removesuffix(embed) for n in names if n.endswith("." + embed) or n == embed), key=len)
    if prefixes and spec.prefix not in prefixes:
        spec = replace(spec, prefix=next((p for p in prefixes if "language_model" in p), prefixes[0]))
    changes: dict[str, object] = {"tied": spec.tied or head_name(spec, names) not in names}

    def present(role: str, suffix: str) -> bool:
        return any(spec.layer_name(layer, role) + suffix in names for layer in range(spec.num_layers))

    changes["qkv_bias"] = present("q", ".bias") or present("qkv", ".bias")
    changes["o_bias"] = present("o", ".bias")
    changes["mlp_bias"] = present("down", ".bias")
    changes["sinks"] = present("sinks", "")
    if not present("q_norm", ".weight"):
        changes["qk_norm"] = None
    elif spec.qk_norm is None:
        changes["qk_norm"] = "head"
    return replace(spec, **changes)  # type: ignore[arg-type]


def head_name(spec: Spec, names: Collection[str] = ()) -> str:
    """Tensor name of the output head; beside the language model in checkpoints that nest it."""
    name = spec.top_name("lm_head") + ".weight"
    if names and name not in names:
        nested = spec.prefix.removesuffix("model.") + name
        return nested if nested in names else name
    return name


def build_model(
    spec: Spec,
    loader: Loader,
    ops: OpTable,
    context_length: int,
    info: ModelInfo,
    rounding: OnLoad = AS_STORED,
) -> DecoderModel:
    """Load every tensor the spec asks for. Raises ConfigError naming what is missing, misshapen or left over."""
    spec = detect(spec, loader.names)
    builder = _Builder(spec, loader, ops, context_length, rounding)
    embed = loader.tensor(spec.top_name("embed_tokens") + ".weight", spec.vocab_size, spec.hidden_size)
    layers = tuple(builder.layer(index, shape) for index, shape in enumerate(spec.layers))
    norm = builder.norm(spec.top_name("norm"), spec.hidden_size)
    head = Head(builder.head(embed), spec.logit_multiplier, spec.final_softcap)
    for layer in range(spec.num_layers, spec.num_layers + spec.draft_layers):
        loader.skip("^" + re.escape(spec.layer_prefix(layer)))
    loader.finish()
    loader.release()
    model = DecoderModel(
        spec,
        Embedding(embed, spec.embed_multiplier),
        layers,
        norm,
        head,
        builder.rotaries,
        cache_plan(spec, str(loader.dtype).removeprefix("torch.")),
        info,
    )
    if not spec.parallel:
        model.fused = fuse(model.embed, layers, norm, builder.rotaries, loader.dtype, ops)
    return model


def cache_plan(spec: Spec, dtype: str) -> CachePlan:
    """What the layers keep per token, in a cache of this dtype."""
    return CachePlan.of([_layer_cache(layer, dtype) for layer in spec.layers])


def _layer_cache(layer: LayerShape, dtype: str) -> LayerSpec:
    if layer.window > 0:
        return SlidingWindow(layer.kv_heads, layer.head_dim, layer.v_dim, dtype, layer.window)
    return FullAttention(layer.kv_heads, layer.head_dim, layer.v_dim, dtype)


class _Builder:
    """Builds the layers of one model; layers with equal rotary embeddings share a table."""

    def __init__(self, spec: Spec, loader: Loader, ops: OpTable, context_length: int, rounding: OnLoad) -> None:
        self.spec = spec
        self.loader = loader
        self.ops = ops
        self.rounding = rounding
        self._context_length = context_length
        self._rotaries: dict[RopeShape, Rotary] = {}

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The distinct rotary embeddings of the layers built so far."""
        return tuple(self._rotaries.values())

    def layer(self, index: int, shape: LayerShape) -> DecoderLayer:
        """One decoder layer."""
        pre_attention = self._placed(index, "pre_attention")
        pre_mlp = self._placed(index, "pre_mlp")
        layer = DecoderLayer(
            pre_attention=pre_attention or NoNorm(),
            attention=self._attention(index, shape),
            post_attention=self._after_branch(index, "post_attention"),
            pre_mlp=pre_mlp if self.spec.parallel else pre_mlp or NoNorm(),
            mlp=self._moe(index, shape.moe) if shape.moe is not None else self._mlp(index, shape.intermediate),
            post_mlp=self._after_branch(index, "post_mlp"),
        )
        self.loader.release()
        return layer

    def head(self, embed: Tensor) -> Linear:
        """The output head: the embedding's own matrix where they are tied."""
        spec, loader = self.spec, self.loader
        name = head_name(spec, loader.names)
        weight: InputWeight = embed
        embedding = spec.top_name("embed_tokens") + ".weight"
        if spec.tied:
            loader.skip("^" + re.escape(name) + "$")
            if loader.source.is_quantized(embedding):
                weight = loader.weight(embedding, spec.vocab_size, spec.hidden_size)
        else:
            weight = loader.weight(name, spec.vocab_size, spec.hidden_size)
        bias = loader.tensor(name.removesuffix("weight") + "bias", spec.vocab_size) if spec.head_bias else None
        return Linear.fused([self.rounding.round_head(weight)], bias, self.ops, out_dtype=torch.float32)

    def norm(self, name: str, size: int) -> Norm:
        """A norm of the family's kind from its checkpoint name."""
        return self._norm(name, (size,))

    def _norm(self, name: str, shape: tuple[int, ...]) -> RMSNorm | LayerNorm:
        if not self.spec.norm_weight:
            return LayerNorm(None, None, self.spec.eps)
        weight = self.loader.float32(name + ".weight", *shape).add_(self.spec.norm_offset)
        if self.spec.norm == "rms":
            return RMSNorm(weight, self.spec.eps, self.ops)
        bias = self.loader.float32(name + ".bias", *shape) if self.spec.norm_bias else None
        return LayerNorm(weight, bias, self.spec.eps)

    def _placed(self, index: int, role: str) -> Norm | None:
        if role not in self.spec.norms:
            return None
        return self.norm(self.spec.layer_name(index, role), self.spec.hidden_size)

    def _after_branch(self, index: int, role: str) -> Branch | None:
        if self.spec.residual_multiplier != 1.0:
            return Scale(self.spec.residual_multiplier)
        return self._placed(index, role)

    def _linear(self, name: str, rows: int, columns: int, bias: bool) -> Linear:
        return self._fused([(name, rows)], columns, bias)

    def _plain_linear(self, name: str, rows: int, columns: int, bias: bool) -> Linear:
        """A linear map that is never rounded: a router, a gate."""
        vector = self.loader.tensor(name + ".bias", rows) if bias else None
        return Linear.fused([self.loader.weight(name + ".weight", rows, columns)], vector, self.ops)

    def _fused(self, parts: list[tuple[str, int]], columns: int, bias: bool, activation: str | None = None) -> Linear:
        weights = self._weights([(name + ".weight", rows) for name, rows in parts], columns)
        vector = self.loader.vectors([(name + ".bias", rows) for name, rows in parts]) if bias else None
        return Linear.fused(weights, vector, self.ops, activation=activation)

    def _weights(self, parts: Sequence[tuple[str, int]], columns: int) -> list[InputWeight]:
        """Matrices of one fused projection, rounded to one if that was asked for."""
        return self.rounding.round_linear([self.loader.weight(name, rows, columns) for name, rows in parts])

    def _parts(self, index: int, whole: str, parts: dict[str, int]) -> list[tuple[str, int]]:
        """Tensors of a fused linear: one when the checkpoint stores it fused, else one per part."""
        fused = self.spec.layer_name(index, whole)
        if fused + ".weight" in self.loader.names:
            return [(fused, sum(parts.values()))]
        return [(self.spec.layer_name(index, role), rows) for role, rows in parts.items()]

    def _attention(self, index: int, shape: LayerShape) -> Attention:
        spec, hidden = self.spec, self.spec.hidden_size
        sinks = self.loader.float32(spec.layer_name(index, "sinks"), shape.heads) if spec.sinks else None
        return Attention(
            index,
            shape,
            self._qkv(index, shape),
            self._linear(spec.layer_name(index, "o"), hidden, shape.heads * shape.v_dim, spec.o_bias),
            self._rotary(shape.rope),
            self._qk_norm(index, shape),
            AttentionParams(spec.scale, shape.window, spec.softcap, sinks),
        )

    def _qkv(self, index: int, shape: LayerShape) -> Linear:
        spec = self.spec
        rows = {
            "q": shape.heads * shape.head_dim,
            "k": shape.kv_heads * shape.head_dim,
            "v": shape.kv_heads * shape.v_dim,
        }
        if spec.qkv_layout == "stacked":
            return self._fused(self._parts(index, "qkv", rows), spec.hidden_size, spec.qkv_bias)

        # Rows are q, k, v of the first head, then of the second: sort them by role.
        name, total = spec.layer_name(index, "qkv"), sum(rows.values())
        order = torch.arange(total).view(shape.heads, 3, shape.head_dim).transpose(0, 1).flatten()
        bias = self.loader.tensor(name + ".bias", total)[order] if spec.qkv_bias else None
        (weight,) = self._weights([(name + ".weight", total)], spec.hidden_size)
        return Linear.fused([weight[order] if isinstance(weight, Tensor) else weight.rows(order)], bias, self.ops)

    def _rotary(self, rope: RopeShape | None) -> Rotary | None:
        if rope is None:
            return None
        if rope not in self._rotaries:
            self._rotaries[rope] = Rotary(rope, self._context_length, self.loader.device, self.ops)
        return self._rotaries[rope]

    def _qk_norm(self, index: int, shape: LayerShape) -> QKNorm | None:
        spec = self.spec
        if spec.qk_norm is None:
            return None
        sizes = {
            "full": ((shape.heads * shape.head_dim,), (shape.kv_heads * shape.head_dim,)),
            "each_head": ((shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim)),
        }
        q_size, k_size = sizes.get(spec.qk_norm, ((shape.head_dim,), (shape.head_dim,)))
        return QKNorm(
            self._norm(spec.layer_name(index, "q_norm"), q_size),
            self._norm(spec.layer_name(index, "k_norm"), k_size),
            "head" if spec.qk_norm == "each_head" else spec.qk_norm,
        )

    def _mlp(self, index: int, intermediate: int) -> Branch:
        spec, hidden = self.spec, self.spec.hidden_size
        down = self._linear(spec.layer_name(index, "down"), hidden, intermediate, spec.mlp_bias)
        if not spec.gated:
            up = self._linear(spec.layer_name(index, "up"), intermediate, hidden, spec.mlp_bias)
            return PlainMLP(up, down, spec.activation)
        parts = self._parts(index, "gate_up", {"gate": intermediate, "up": intermediate})
        return GatedMLP(self._fused(parts, hidden, spec.mlp_bias, spec.activation), down)

    def _moe(self, index: int, shape: MoeShape) -> MoE:
        spec, loader = self.spec, self.loader
        router = self._plain_linear(
            spec.layer_name(index, "router"), shape.num_experts, spec.hidden_size, shape.router_bias
        )
        correction = None
        if shape.correction:
            correction = loader.float32(spec.layer_name(index, "correction"), shape.num_experts, change=torch.flatten)
        layouts = {"separate": self._experts, "stacked": self._stacked_experts, "gpt_oss": self._gpt_oss_experts}
        experts = layouts[spec.expert_layout](index, shape)
        return MoE(shape, router, correction, experts, self._shared(index, shape))

    def _packed(
        self, gate_up: Sequence[Sequence[InputWeight]], down: Sequence[InputWeight], *biases: Tensor
    ) -> PackedExperts:
        """Experts one by one, each with its gate and up part or both in one; those of plain checkpoints are rounded."""
        gate_ups = [self._expert(parts) for parts in gate_up]
        downs = [self._expert([weight]) for weight in down]
        return self.ops.pack_experts(gate_ups, downs, self.spec.activation, *biases)

    def _expert(self, parts: Sequence[InputWeight]) -> Weight:
        """One matrix of an expert. The experts op takes no order of inputs: such a weight is multiplied as floats."""
        rounded = self.rounding.round_linear(parts)
        plain = [w.dequantize().to(self.loader.dtype) if isinstance(w, OrderedWeight) else w for w in rounded]
        return concatenate(plain)

    def _experts(self, index: int, shape: MoeShape) -> PackedExperts:
        """One tensor per expert and projection on disk."""
        names, hidden, inner = self.spec.names, self.spec.hidden_size, shape.intermediate
        base = self.spec.layer_name(index, "expert")

        def weight(expert: int, role: str, rows: int, columns: int) -> InputWeight:
            return self.loader.weight(f"{base.format(e=expert)}.{names[role]}.weight", rows, columns)

        experts = range(shape.num_experts)
        return self._packed(
            [[weight(e, role, inner, hidden) for role in ("expert_gate", "expert_up")] for e in experts],
            [weight(e, "expert_down", hidden, inner) for e in experts],
        )

    def _stacked_experts(self, index: int, shape: MoeShape) -> PackedExperts:
        """All experts in one tensor, as they are multiplied: [E, 2I, M], [E, M, I]."""
        size, hidden, inner = shape.num_experts, self.spec.hidden_size, shape.intermediate
        gate_up = self.loader.tensor(
            self.spec.layer_name(index, "experts_gate_up") + ".weight", size, 2 * inner, hidden
        )
        down = self.loader.tensor(self.spec.layer_name(index, "experts_down") + ".weight", size, hidden, inner)
        return self._packed([[part] for part in gate_up], list(down))

    def _gpt_oss_experts(self, index: int, shape: MoeShape) -> PackedExperts:
        """All experts in one tensor, transposed, gate and up columns interleaved: [E, M, 2I], [E, I, M]."""
        loader, base = self.loader, self.spec.layer_name(index, "experts")
        size, hidden, inner = shape.num_experts, self.spec.hidden_size, shape.intermediate

        def halves(stored: Tensor) -> Tensor:
            return torch.cat((stored[..., 0::2], stored[..., 1::2]), dim=-1)

        def rows(stored: Tensor) -> Tensor:
            return stored.transpose(1, 2)

        gate_up = loader.tensor(
            f"{base}.gate_up_proj", size, 2 * inner, hidden, change=lambda stored: rows(halves(stored))
        )
        down = loader.tensor(f"{base}.down_proj", size, hidden, inner, change=rows)
        gate_up_bias = loader.tensor(f"{base}.gate_up_proj_bias", size, 2 * inner, change=halves)
        return self._packed(
            [[part] for part in gate_up],
            list(down),
            gate_up_bias,
            loader.tensor(f"{base}.down_proj_bias", size, hidden),
        )

    def _shared(self, index: int, shape: MoeShape) -> SharedExpert | None:
        if shape.shared_intermediate == 0:
            return None
        spec, inner, hidden = self.spec, shape.shared_intermediate, self.spec.hidden_size
        base = spec.layer_name(index, "shared")
        parts = [(f"{base}.gate_proj", inner), (f"{base}.up_proj", inner)]
        gate_up = self._fused(parts, hidden, False, spec.activation)
        mlp = GatedMLP(gate_up, self._linear(f"{base}.down_proj", hidden, inner, False))
        gate = (
            self._plain_linear(spec.layer_name(index, "shared_gate"), 1, hidden, False) if shape.shared_gate else None
        )
        return SharedExpert(mlp, gate)
