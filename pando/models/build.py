"""From a Spec and a Loader to a DecoderModel: which tensors a layer needs, under which names, fused how."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from pando.kernels.ops import OpTable
from pando.layers.embedding import Embedding, Head
from pando.layers.linear import Linear
from pando.layers.mixer import Mixer, SideBySide, TokenByToken
from pando.layers.norm import NoNorm, Norm, Scale
from pando.layers.shapes import LayerShape
from pando.models.cached import cache_plan
from pando.models.decoder import Branch, DecoderLayer, DecoderModel, ModelInfo
from pando.models.fused import fuse
from pando.models.mixers import build_attention, build_mixer
from pando.models.mlps import build_mlp
from pando.models.parts import Parts
from pando.models.spec import Spec
from pando.models.weights import Loader
from pando.quant.on_load import AS_STORED, OnLoad
from pando.quant.order import InputWeight


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
    head = Head(builder.head(embed), spec.logit_multiplier, spec.final_softcap, ops.fuse)
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
    model.fused = fuse(model.embed, layers, norm, parts.rotaries, ops, parallel=spec.parallel)
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
        mixers, mlp = self._mixers(index, shape), build_mlp(self.parts, index, shape)
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
            post_mlp=None if mlp is None else self._after_branch(index, "post_mlp", self.spec.mlp_multiplier),
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

    def _after_branch(self, index: int, role: str, factor: float = 1.0) -> Branch | None:
        factor *= self.spec.residual_multiplier
        return self._placed(index, role) if factor == 1.0 else Scale(factor)
