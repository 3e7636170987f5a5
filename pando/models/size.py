"""How large a model is and what a token costs, from its spec alone: no weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pando.cache.spec import DTYPE_BYTES
from pando.layers.shapes import LayerShape
from pando.models.cached import cache_plan
from pando.models.hf_config import HFConfig
from pando.models.mixer_size import mixer_flops, mixer_matrices, mixer_vectors, plain_matrices, visible_keys
from pando.models.registry import spec_of
from pando.models.spec import Spec
from pando.quant.size import MatrixBits


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Counts of one model. Elements unless named otherwise.

    num_parameters: all weights, a tied head once. active_parameters: matrix elements a token is multiplied with in the
    layers (embedding and head left out; only the chosen experts of a mixture). head_parameters: those of the head.
    """

    spec: Spec
    num_parameters: int
    active_parameters: int
    head_parameters: int

    @classmethod
    def of(cls, spec: Spec) -> ModelSize:
        """Sizes of a spec."""
        embedding = spec.vocab_size * spec.hidden_size
        head = (0 if spec.tied else embedding) + (spec.vocab_size if spec.head_bias else 0)
        layers = sum(_layer_parameters(spec, layer) for layer in spec.layers)
        active = sum(_layer_matrices(spec, layer, active=True) for layer in spec.layers)
        return cls(spec, embedding + head + layers + _norm_parameters(spec, spec.hidden_size), active, embedding)

    @classmethod
    def of_config(cls, config: Mapping[str, object]) -> ModelSize:
        """Sizes of a parsed `config.json`. Raises UnsupportedModel or ConfigError."""
        return cls.of(spec_of(HFConfig(config)))

    def weight_bytes(self, dtype: str, bits: MatrixBits | None = None) -> int:
        """Bytes of the weights (norms are counted in the same dtype).

        bits: of projections and head where they are quantised; a tied embedding then stays beside the head.
        """
        width = DTYPE_BYTES[dtype]
        if bits is None:
            return self.num_parameters * width
        linear = sum(_projections(self.spec, layer) for layer in self.spec.layers)
        head = self.head_parameters
        rest = self.num_parameters - linear - (0 if self.spec.tied else head)
        return rest * width + int(linear * bits.linear + head * bits.head) // 8

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes one cached token takes over all layers."""
        return cache_plan(self.spec, dtype).bytes_per_token

    @property
    def window(self) -> int:
        """Tokens that layers with a sliding window read, the most of any; 0 = there are none."""
        return max((layer.window for layer in self.spec.layers if layer.heads > 0), default=0)

    def window_bytes_per_token(self, dtype: str) -> int:
        """Bytes one cached token takes over all layers with a sliding window."""
        return cache_plan(self.spec, dtype).window_bytes_per_token

    def state_bytes(self, dtype: str) -> int:
        """Bytes one sequence's recurrent states take over all layers, whatever its length; 0 = there are none."""
        return cache_plan(self.spec, dtype).bytes_per_state

    def prefill_flops(self, num_tokens: int, start: int = 0) -> int:
        """Floating-point operations of running `num_tokens` positions from `start`; the head runs for the last one."""
        mixing = sum(_mixing_flops(layer, start, num_tokens) for layer in self.spec.layers)
        return 2 * (num_tokens * self.active_parameters + self.head_parameters) + mixing

    def decode_flops(self, context: int) -> int:
        """Floating-point operations of one new token that sees `context` tokens, itself included."""
        return self.prefill_flops(1, max(context - 1, 0))


def _mixing_flops(layer: LayerShape, start: int, num_tokens: int) -> int:
    """What a layer's attention and other mixer do beside multiplying with matrices."""
    return _attention_flops(layer, start, num_tokens) + mixer_flops(layer.mixer, start, num_tokens)


def _attention_flops(layer: LayerShape, start: int, num_tokens: int) -> int:
    """Scores and weighted sum: 2 operations per head, dim and visible key, each."""
    if layer.window <= 0:
        keys = visible_keys(start, num_tokens)
    else:
        growing = max(0, min(num_tokens, layer.window - start))
        keys = visible_keys(start, growing) + (num_tokens - growing) * layer.window
    return 2 * layer.heads * (layer.head_dim + layer.v_dim) * keys


def _norm_parameters(spec: Spec, size: int) -> int:
    return size * (2 if spec.norm_bias else 1) if spec.norm_weight else 0


def _layer_parameters(spec: Spec, layer: LayerShape) -> int:
    norms = _num_norms(spec, layer) * _norm_parameters(spec, spec.hidden_size)
    if spec.qk_norm is not None and layer.heads > 0:
        q, k = (layer.heads, layer.kv_heads) if spec.qk_norm in ("full", "each_head") else (1, 1)
        norms += (q + k) * layer.head_dim
    sinks = layer.heads if spec.sinks else 0
    vectors = norms + sinks + _biases(spec, layer) + mixer_vectors(layer.mixer, spec.hidden_size)
    return vectors + _layer_matrices(spec, layer, active=False)


def _num_norms(spec: Spec, layer: LayerShape) -> int:
    """Norms around the layer's branches: a layer with one branch has only those of the first."""
    return sum(1 for role in spec.norms if layer.has_branches or role in ("pre_attention", "post_attention"))


def _biases(spec: Spec, layer: LayerShape) -> int:
    total = 0
    if layer.heads > 0:
        total += (_qkv_rows(spec, layer) if spec.qkv_bias else 0) + (spec.hidden_size if spec.o_bias else 0)
    moe, ups = layer.moe, 2 if spec.gated else 1
    if moe is None:
        return total + (ups * layer.intermediate + spec.hidden_size if spec.mlp_bias and layer.has_mlp else 0)
    per_expert = ups * moe.intermediate + spec.hidden_size if moe.expert_bias else 0
    router = moe.num_experts * (int(moe.router_bias) + int(moe.correction))
    latent = moe.latent + spec.hidden_size if moe.latent > 0 and spec.mlp_bias else 0
    return total + moe.num_experts * per_expert + router + latent


def _qkv_rows(spec: Spec, layer: LayerShape) -> int:
    rows = layer.heads * layer.head_dim + layer.kv_heads * (layer.head_dim + layer.v_dim)
    return rows + (layer.heads * layer.v_dim if spec.out_gate else 0)


def _projections(spec: Spec, layer: LayerShape) -> int:
    """Elements of a layer's matrices that quantisation covers: all but routers, gates, and what attends by itself."""
    kept = 0 if layer.moe is None else spec.hidden_size * (layer.moe.num_experts + int(layer.moe.shared_gate))
    return _layer_matrices(spec, layer, active=False) - kept - plain_matrices(layer.mixer, spec.hidden_size)


def _layer_matrices(spec: Spec, layer: LayerShape, *, active: bool) -> int:
    """Elements of a layer's matrices; `active` counts only the experts a token is sent to."""
    hidden, moe = spec.hidden_size, layer.moe
    total = hidden * (_qkv_rows(spec, layer) + layer.heads * layer.v_dim) if layer.heads > 0 else 0
    total += mixer_matrices(layer.mixer, hidden)
    projections = 3 if spec.gated else 2
    if moe is None:
        return total + projections * hidden * layer.intermediate
    experts = moe.top_k if active else moe.num_experts
    shared = projections * hidden * moe.shared_intermediate + (hidden if moe.shared_gate else 0)
    routed = experts * projections * (moe.latent or hidden) * moe.intermediate + 2 * moe.latent * hidden
    return total + moe.num_experts * hidden + routed + shared
