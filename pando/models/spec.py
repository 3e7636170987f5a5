"""A decoder as data. `read_spec` fills a Spec from a Hugging Face config; a family adapter passes only what differs.

    h = embed(ids) * embed_multiplier                      Which of the four norms a layer has is its *placement*:
    per layer:                                             pre      Llama, Qwen, Mistral, Phi-3, Granite, gpt-oss
        h += post_attention(attention(pre_attention(h)))   post     OLMo-2
        h += post_mlp(mlp(pre_mlp(h)))                     all four Gemma-2, Gemma-3, GLM-4
    logits = head(final_norm(h))                           parallel: both branches read the same h (Cohere, Phi)

No torch here: `pando plan` reads a spec without loading a tensor library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pando.errors import ConfigError
from pando.layers.shapes import LayerShape, MixerShape, MoeShape, RopeKind, RopeShape
from pando.models.hf_config import HFConfig

Norms = Mapping[str, str]
"""Norm role (pre_attention, post_attention, pre_mlp, post_mlp) -> its name in a checkpoint's layer."""

PRE_NORM: Norms = {"pre_attention": "input_layernorm", "pre_mlp": "post_attention_layernorm"}
POST_NORM: Norms = {"post_attention": "post_attention_layernorm", "post_mlp": "post_feedforward_layernorm"}
SANDWICH_NORM: Norms = {
    "pre_attention": "input_layernorm",
    "post_attention": "post_attention_layernorm",
    "pre_mlp": "pre_feedforward_layernorm",
    "post_mlp": "post_feedforward_layernorm",
}

LAYER_NAMES: Mapping[str, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "qkv": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "sinks": "self_attn.sinks",
    "mixer": "mixer",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate",
    "correction": "mlp.gate.e_score_correction_bias",
    "expert": "mlp.experts.{e}",
    "expert_gate": "gate_proj",
    "expert_up": "up_proj",
    "expert_down": "down_proj",
    "experts": "mlp.experts",
    "experts_gate_up": "mlp.experts.gate_up_proj",
    "experts_down": "mlp.experts.down_proj",
    "shared": "mlp.shared_experts",
    "shared_whole": "gate_up_proj",
    "shared_down": "down_proj",
    "shared_gate": "mlp.shared_expert_gate",
}
"""Role of a tensor in a layer -> its usual name in a checkpoint. Families override single entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One decoder-only language model.

    scale: factor on attention scores. softcap, final_softcap: 0 = off. norm_offset: added to stored norm weights
    (Gemma keeps w of 1 + w). qk_norm: norm of queries and keys over the full width, per head (each_head: with weights
    of its own), or per head after rotary. gated: the MLP is act(gate) * up. Multipliers: of embeddings, of each branch
    before it joins the residual, of the logits. draft_layers: layers past the last one that are on disk and not run.
    qkv_layout per_head: a fused projection whose rows are q, k, v of the first head, then of the second...
    expert_layout: a tensor per expert, all experts in one, or gpt-oss's transposed and interleaved ones.
    out_gate: attention's output is multiplied by sigmoid(gate), and the query projection holds query and gate of the
    first head, then of the second... attention_factor: on attention's result, where another mixer runs beside it.
    gate_multiplier: on an MLP's gate, before the activation; mlp_multiplier: on its result.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position: int
    layers: tuple[LayerShape, ...]
    eps: float
    scale: float
    tied: bool
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    norm_bias: bool = False
    norm_weight: bool = True
    norms: Norms = field(default_factory=lambda: PRE_NORM)
    parallel: bool = False
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: Literal["full", "head", "each_head", "head_after_rope"] | None = None
    sinks: bool = False
    out_gate: bool = False
    attention_factor: float = 1.0
    gate_multiplier: float = 1.0
    mlp_multiplier: float = 1.0
    softcap: float = 0.0
    final_softcap: float = 0.0
    embed_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    names: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    prefix: str = "model."
    top_names: Mapping[str, str] = field(default_factory=dict)
    qkv_layout: Literal["stacked", "per_head"] = "stacked"
    expert_layout: Literal["separate", "stacked", "gpt_oss"] = "separate"
    draft_layers: int = 0

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    def layer_name(self, layer: int, role: str) -> str:
        """Checkpoint name of a layer's tensor or module, without `.weight`."""
        return self.layer_prefix(layer) + (self.norms[role] if role in self.norms else self.names[role])

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"{self.prefix}{self.top_names.get('layers', 'layers')}.{layer}."

    def top_name(self, role: str) -> str:
        """Checkpoint name of a module outside the layers: embed_tokens, norm; lm_head has no prefix."""
        return (
            self.top_names.get(role, "lm_head") if role == "lm_head" else self.prefix + self.top_names.get(role, role)
        )


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "relu2",
}


def read_spec(
    config: HFConfig,
    *,
    windows: Sequence[int] | None = None,
    ropes: Sequence[RopeShape | None] | None = None,
    moe: Sequence[MoeShape | None] | None = None,
    mixers: Sequence[MixerShape | None] | None = None,
    names: Mapping[str, str] | None = None,
    **overrides: object,
) -> Spec:
    """Spec of a config. `windows`, `ropes`, `moe` and `mixers` are per layer, a mixer is there instead of attention.

    `overrides` replace fields of Spec by name.
    """
    heads = config.integer("num_attention_heads")
    hidden = config.integer("hidden_size")
    head_dim = read_head_dim(config)
    num_layers = config.integer("num_hidden_layers")
    windows = windows if windows is not None else [0] * num_layers
    ropes = ropes if ropes is not None else [read_rope(config)] * num_layers
    moe = moe if moe is not None else [None] * num_layers
    mixers = mixers if mixers is not None else [None] * num_layers
    assert {len(windows), len(ropes), len(moe), len(mixers)} == {num_layers}, (windows, ropes, moe, mixers, num_layers)
    layers = tuple(
        LayerShape(
            heads=heads if mixer is None else 0,
            kv_heads=config.integer("num_key_value_heads", default=heads) if mixer is None else 0,
            head_dim=head_dim if mixer is None else 0,
            v_dim=head_dim if mixer is None else 0,
            window=window if mixer is None else 0,
            rope=rope if mixer is None else None,
            intermediate=config.integer("intermediate_size"),
            moe=experts,
            mixer=mixer,
        )
        for window, rope, experts, mixer in zip(windows, ropes, moe, mixers, strict=True)
    )
    fields: dict[str, object] = {
        "family": config.text("model_type"),
        "vocab_size": config.integer("vocab_size"),
        "hidden_size": hidden,
        "max_position": config.integer("max_position_embeddings"),
        "layers": layers,
        "eps": config.number("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", default=1e-6),
        "scale": head_dim**-0.5,
        "tied": config.flag("tie_word_embeddings", default=False),
        "activation": read_activation(config),
        "qkv_bias": config.flag("attention_bias", default=False),
        "o_bias": config.flag("attention_bias", default=False),
        "mlp_bias": config.flag("mlp_bias", default=False),
        "draft_layers": config.integer("num_nextn_predict_layers", "num_mtp_layers", default=0),
        "names": {**LAYER_NAMES, **(names or {})},
        **overrides,
    }
    return Spec(**fields)  # type: ignore[arg-type]


def read_head_dim(config: HFConfig) -> int:
    """Dims of a query head: given, or hidden_size / heads."""
    return config.integer("head_dim", default=config.integer("hidden_size") // config.integer("num_attention_heads"))


def read_activation(config: HFConfig) -> str:
    """The op table's name of the config's activation."""
    name = config.text("hidden_activation", "hidden_act", default="silu")
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{config.source}: activation {name!r} is not known; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def read_layer_types(config: HFConfig, default: list[str] | None = None) -> list[str]:
    """One of full_attention, sliding_attention per layer: given, or `default`, or all full."""
    num_layers = config.integer("num_hidden_layers")
    given = config.items("layer_types")
    types = [str(item) for item in given] if given is not None else default or ["full_attention"] * num_layers
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown or len(types) < num_layers:
        raise ConfigError(f"{config.source}: layer_types {unknown or types} can not be served", param="layer_types")
    return types[:num_layers]


def read_windows(config: HFConfig, layer_types: list[str]) -> list[int]:
    """Visible tokens per layer: `sliding_window` where the type says so (0 = all, also when no window is given)."""
    window = config.integer("sliding_window", default=0)
    return [window if kind == "sliding_attention" else 0 for kind in layer_types]


_THETA = {
    "cohere": 5e5,
    "cwm": 1e6,
    "ernie4_5": 5e5,
    "ernie4_5_moe": 5e5,
    "flex_olmo": 5e5,
    "gpt_oss": 1.5e5,
    "helium": 1e5,
    "lfm2": 1e6,
    "lfm2_moe": 1e6,
    "minimax_m2": 5e6,
    "mixtral": 1e6,
    "olmo3": 5e5,
    "smollm3": 2e6,
}
"""Rotary base of families whose configs may leave it out and mean something other than 10,000."""


def read_rope(
    config: HFConfig,
    layer_type: str = "",
    *,
    theta: float | None = None,
    partial: float = 1.0,
    interleaved: bool = False,
) -> RopeShape:
    """Rotary embedding from `rope_parameters` (nested by layer type or not) or the older rope_theta / rope_scaling."""
    scaling = config.section("rope_scaling") or config.section("rope_parameters") or HFConfig({}, config.source)
    if layer_type and scaling.has(layer_type):
        nested = scaling.section(layer_type)
        assert nested is not None
        scaling = nested
    kind = scaling.text("rope_type", "type", default="default")
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ("default", "linear", "llama3", "yarn", "longrope"):
        raise ConfigError(f"{config.source}: rope type {kind!r} is not supported", param="rope_scaling")
    partial = scaling.number(
        "partial_rotary_factor", default=config.number("partial_rotary_factor", "rotary_pct", default=partial)
    )
    theta = theta or _THETA.get(config.text("model_type", default=""), 10000.0)
    base = {
        "theta": scaling.number("rope_theta", default=config.number("rope_theta", "rotary_emb_base", default=theta)),
        "dim": int(read_head_dim(config) * partial),
        "interleaved": interleaved,
        "kind": kind,
    }
    return RopeShape(**base, **({} if kind == "default" else _scaling(config, scaling, kind)))  # type: ignore[arg-type]


def _scaling(config: HFConfig, scaling: HFConfig, kind: RopeKind | str) -> dict[str, object]:
    """Fields of RopeShape that only scaled kinds read."""
    longest = config.integer("max_position_embeddings")
    original = config.integer(
        "original_max_position_embeddings",
        default=scaling.integer("original_max_position_embeddings", default=longest),
    )
    fields: dict[str, object] = {
        "original_max": original,
        "factor": scaling.number("factor", default=longest / original),
    }
    if scaling.has("attention_factor"):
        fields["attention_factor"] = scaling.number("attention_factor")
    for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if scaling.has(name):
            fields[name] = scaling.number(name)
    if scaling.has("truncate"):
        fields["truncate"] = scaling.flag("truncate")
    for name in ("short_factor", "long_factor"):
        items = scaling.items(name)
        if items is not None:
            fields[name] = tuple(float(str(item)) for item in items)
    if kind == "longrope" and not (fields.get("short_factor") and fields.get("long_factor")):
        raise ConfigError(f"{scaling.source}: longrope needs short_factor and long_factor", param="rope_scaling")
    return fields
