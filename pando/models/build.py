"""From a Spec and a Loader to a DecoderModel: which tensors a layer needs, under which names, fused how."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pando.kernels.ops import OpTable, PackedExperts
from pando.kernels.weights import Weight, concatenate
from pando.layers.embedding import Embedding, Head
from pando.layers.linear import Linear
from pando.layers.mixer import Mixer, SideBySide, TokenByToken
from pando.layers.mlp import GatedMLP, PlainMLP
from pando.layers.moe import MoE, SharedExpert
from pando.layers.norm import NoNorm, Norm, Scale
from pando.layers.shapes import LayerShape, MoeShape
from pando.models.cached import cache_plan
from pando.models.decoder import Branch, DecoderLayer, DecoderModel, ModelInfo
from pando.models.fused import fuse
from pando.models.mixers import build_attention, build_mixer
from pando.models.parts import Parts
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
    parts = Parts(spec, loader, ops, context_length, rounding)
    builder = _Builder(parts)
    embed = loader.tensor(spec.top_name("embed_tokens") + ".weight", spec.vocab_size, spec.hidden_size)
    layers = tuple(builder.layer(index, shape) for index, shape in enumerate(spec.layers))
    norm = parts.norm(spec.top_name("norm"), spec.hidden_size)
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
        parts.rotaries,
        cache_plan(spec, str(loader.dtype).removeprefix("torch.")),
        info,
    )
    if not spec.parallel:
        model.fused = fuse(layers, norm, parts.rotaries, loader.dtype, ops)
    return model


class _Builder:
    """Builds the layers of one model, one after the other."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.spec = parts.spec
        self.loader = parts.loader
        self._entries = 0

    def layer(self, index: int, shape: LayerShape) -> DecoderLayer:
        """One decoder layer."""
        pre_attention = self._placed(index, "pre_attention")
        mixers, mlp = self._mixers(index, shape), self._mlp_of(index, shape)
        if not mixers:
            assert mlp is not None, shape
            mixers, mlp = [TokenByToken(mlp)], None
        pre_mlp = None if mlp is None else self._placed(index, "pre_mlp")
        layer = DecoderLayer(
            pre_attention=pre_attention or NoNorm(),
            mixer=mixers[0] if len(mixers) == 1 else SideBySide(mixers),
            post_attention=self._after_branch(index, "post_attention"),
            pre_mlp=pre_mlp if self.spec.parallel else pre_mlp or NoNorm(),
            mlp=mlp,
            post_mlp=None if mlp is None else self._after_branch(index, "post_mlp"),
        )
        self.loader.release()
        return layer

    def _mixers(self, index: int, shape: LayerShape) -> list[Mixer]:
        """Attention and the other mixer, whichever the layer has, each with the next entry of the cache."""
        mixers: list[Mixer] = []
        if shape.heads > 0:
            mixers.append(build_attention(self.parts, index, self._next_entry(), shape))
        if shape.mixer is not None:
            mixers.append(build_mixer(self.parts, index, self._next_entry(), shape.mixer))
        return mixers

    def _next_entry(self) -> int:
        self._entries += 1
        return self._entries - 1

    def _mlp_of(self, index: int, shape: LayerShape) -> Branch | None:
        if shape.moe is not None:
            return self._moe(index, shape.moe)
        return self._mlp(index, shape.intermediate) if shape.intermediate > 0 else None

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
        return Linear.fused([self.parts.rounding.round_head(weight)], bias, self.parts.ops, out_dtype=torch.float32)

    def _placed(self, index: int, role: str) -> Norm | None:
        if role not in self.spec.norms:
            return None
        return self.parts.norm(self.spec.layer_name(index, role), self.spec.hidden_size)

    def _after_branch(self, index: int, role: str) -> Branch | None:
        if self.spec.residual_multiplier != 1.0:
            return Scale(self.spec.residual_multiplier)
        return self._placed(index, role)

    def _mlp(self, index: int, intermediate: int) -> Branch:
        spec, hidden = self.spec, self.spec.hidden_size
        down = self.parts.linear(spec.layer_name(index, "down"), hidden, intermediate, spec.mlp_bias)
        if not spec.gated:
            up = self.parts.linear(spec.layer_name(index, "up"), intermediate, hidden, spec.mlp_bias)
            return PlainMLP(up, down, spec.activation)
        parts = self.parts.tensors(index, "gate_up", {"gate": intermediate, "up": intermediate})
        return GatedMLP(self.parts.fused(parts, hidden, spec.mlp_bias, spec.activation), down)

    def _moe(self, index: int, shape: MoeShape) -> MoE:
        spec, loader = self.spec, self.loader
        router = self.parts.plain([(spec.layer_name(index, "router"), shape.num_experts)], shape.router_bias)
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
        return self.parts.ops.pack_experts(gate_ups, downs, self.spec.activation, *biases)

    def _expert(self, parts: Sequence[InputWeight]) -> Weight:
        """One matrix of an expert. The experts op takes no order of inputs: such a weight is multiplied as floats."""
        rounded = self.parts.rounding.round_linear(parts)
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
        whole = f"{base}.{spec.names['shared_whole']}"
        parts = [(f"{base}.gate_proj", inner), (f"{base}.up_proj", inner)]
        if whole + ".weight" in self.loader.names:
            parts = [(whole, 2 * inner)]
        gate_up = self.parts.fused(parts, hidden, False, spec.activation)
        mlp = GatedMLP(gate_up, self.parts.linear(f"{base}.{spec.names['shared_down']}", hidden, inner, False))
        gate = self.parts.plain([(spec.layer_name(index, "shared_gate"), 1)], False) if shape.shared_gate else None
        return SharedExpert(mlp, gate)
