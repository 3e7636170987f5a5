"""The canonical decoder: every family is this one, with what differs read from its Spec.

Legend: T tokens of the step, E emitting positions, M hidden size, V vocabulary.

    h = embed(ids)
    for each layer:   h += mixer(norm(h));  h += mlp(norm(h))
    logits = head(norm(h))

The mixer is attention or one of its kin. A layer may lack the MLP, or have nothing else (it is then in the
mixer's place).
A norm is applied where the family has one (see `pando.models.spec`); adding a branch to h and taking the next norm is
one op, so the loop carries two tensors: the residual stream h and its normalised view x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pando.cache.spec import CachePlan
from pando.forward import AttentionBackend, ForwardBatch
from pando.layers.embedding import Embedding, Head
from pando.layers.mixer import Mixer
from pando.layers.norm import Norm
from pando.layers.rotary import Rotary
from pando.models.fused import FusedLayers
from pando.models.size import ModelSize
from pando.models.spec import Spec

Branch = Callable[[Tensor], Tensor]
"""[T, M] -> [T, M]."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Mixer and MLP, each with an optional norm or factor on its output; norms on the input belong to the loop.

    pre_attention normalises h before the layer, pre_mlp between its branches. In a parallel layer both branches read
    h as it was on entry: pre_mlp is None when they also share the norm. mlp None: the mixer is the only branch.
    """

    pre_attention: Norm
    mixer: Mixer
    post_attention: Branch | None
    pre_mlp: Norm | None
    mlp: Branch | None
    post_mlp: Branch | None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a checkpoint says beside its weights. eos_token_ids end a sequence; config_dict is the raw config."""

    eos_token_ids: tuple[int, ...]
    config_dict: dict[str, object]


class DecoderModel:
    """A loaded model; implements `pando.forward.LanguageModel`."""

    def __init__(
        self,
        spec: Spec,
        embed: Embedding,
        layers: tuple[DecoderLayer, ...],
        norm: Norm,
        head: Head,
        rotaries: tuple[Rotary, ...],
        cache_plan: CachePlan,
        info: ModelInfo,
    ) -> None:
        self.spec = spec
        self.embed = embed
        self.layers = layers
        self.norm = norm
        self.head = head
        self.cache_plan = cache_plan
        self.vocab_size = spec.vocab_size
        self.hidden_size = spec.hidden_size
        self.max_position = spec.max_position
        self.dtype = embed.weight.dtype
        self.device = embed.weight.device
        self.eos_token_ids = info.eos_token_ids
        self.config_dict = info.config_dict
        self.fused: FusedLayers | None = None
        """Everything up to the logits in one call; set by the builder where the ops have a program for them."""
        self._rotaries = rotaries
        self._num_positions = 0
        # The norm that follows a layer is the next layer's first, or the final one.
        following = [layer.pre_attention for layer in layers[1:]] + [norm]
        both = _parallel_layer if spec.parallel else _sequential_layer
        steps = (both if layer.mlp is not None else _mixer_layer for layer in layers)
        self._steps = tuple(zip(steps, layers, following, strict=True))

    @property
    def num_parameters(self) -> int:
        """Elements of all weights; a tied head counts once."""
        return ModelSize.of(self.spec).num_parameters

    def reserve_positions(self, num_positions: int) -> None:
        """Make positions 0 .. num_positions - 1 usable without any later allocation (before graph capture)."""
        self._num_positions = max(num_positions, self._num_positions)
        for rotary in self._rotaries:
            rotary.reserve(num_positions)

    def set_context_length(self, context_length: int) -> None:
        """Tell the served context; longrope models choose short or long factors by it. Before the first step only."""
        for rotary in self._rotaries:
            rotary.set_context_length(context_length)

    def forward(self, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """Final hidden states [T, M] after the last norm."""
        if batch.max_kv_len > self._num_positions:
            self.reserve_positions(max(batch.max_kv_len, min(2 * self._num_positions, self.max_position)))
        if self.fused is not None:
            return self.fused(batch, attention.pool)
        h_TM = self.embed(batch.input_ids)
        x_TM = self.layers[0].pre_attention(h_TM)
        for step, layer, following in self._steps:
            x_TM = step(layer, x_TM, h_TM, following, batch, attention)
        return x_TM

    def logits(self, hidden_EM: Tensor) -> Tensor:
        """Float32 logits [E, V], scaling and soft-capping applied."""
        return self.head(hidden_EM)


def _sequential_layer(
    layer: DecoderLayer, x_TM: Tensor, h_TM: Tensor, following: Norm, batch: ForwardBatch, attention: AttentionBackend
) -> Tensor:
    """Mixer, then MLP. Adds both to h in place and returns `following` of it."""
    branch_TM = layer.mixer(x_TM, batch, attention)
    if layer.post_attention is not None:
        branch_TM = layer.post_attention(branch_TM)
    assert layer.pre_mlp is not None and layer.mlp is not None
    x_TM = layer.pre_mlp.add(branch_TM, h_TM)
    branch_TM = layer.mlp(x_TM)
    if layer.post_mlp is not None:
        branch_TM = layer.post_mlp(branch_TM)
    return following.add(branch_TM, h_TM)


def _mixer_layer(
    layer: DecoderLayer, x_TM: Tensor, h_TM: Tensor, following: Norm, batch: ForwardBatch, attention: AttentionBackend
) -> Tensor:
    """The only branch. Adds it to h in place and returns `following` of it."""
    branch_TM = layer.mixer(x_TM, batch, attention)
    if layer.post_attention is not None:
        branch_TM = layer.post_attention(branch_TM)
    return following.add(branch_TM, h_TM)


def _parallel_layer(
    layer: DecoderLayer, x_TM: Tensor, h_TM: Tensor, following: Norm, batch: ForwardBatch, attention: AttentionBackend
) -> Tensor:
    """Mixer and MLP side by side. Adds both to h in place and returns `following` of it."""
    assert layer.mlp is not None
    branch_TM = layer.mixer(x_TM, batch, attention)
    mlp_TM = layer.mlp(x_TM if layer.pre_mlp is None else layer.pre_mlp(h_TM))
    return following.add(branch_TM + mlp_TM, h_TM)
